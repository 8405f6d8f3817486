"""``toolmem plot DIR``: the kinds of figures that apply to a folder, as one page, or as pictures.

A kind is one file, ``toolmem/analysis/NAME_plot.py``, and nothing beside: its docstring's first line says
what it draws, ``applies(source)`` whether a folder has it, and ``panels(source, request)`` makes its figures.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import toolmem.analysis
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.analysis.report import Panel
    from toolmem.analysis.sources import Source

ENDING = "_plot"
PICTURES = (".png", ".svg", ".pdf")

Bound = tuple[str, Callable[[float], float]]


@dataclass(frozen=True)
class Request:
    """What is asked of every kind of figure.

    Args:
        published: a CSV of published results to draw beside; None for none.
        bounds: lines to be drawn over what has parameters along x and facts upwards: a label, and a
            function of the number of parameters; what the kind itself knows when None.
    """

    published: str | None = None
    bounds: Sequence[Bound] | None = None


def kinds() -> list[str]:
    """The names of all kinds of figures."""
    names = [module.name for module in pkgutil.iter_modules(toolmem.analysis.__path__)]
    return sorted(name.removesuffix(ENDING) for name in names if name.endswith(ENDING))


def summary(kind: str) -> str:
    """What a kind draws, in a line, without importing it."""
    spec = find_spec(f"toolmem.analysis.{kind}{ENDING}")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def load_kind(name: str) -> ModuleType:
    """A kind of figure.

    Args:
        name: of it.

    Raises:
        ToolmemError: for one that there is not.
    """
    if name not in kinds():
        raise ToolmemError(
            f"kind: there is no kind of figure {name!r}; there are {', '.join(kinds())}"
        )
    return importlib.import_module(f"toolmem.analysis.{name}{ENDING}")


def panels_of(source: Source, request: Request, kind: str | None = None) -> list[Panel]:
    """The figures of a folder.

    Args:
        source: the folder.
        request: what is asked of them.
        kind: one kind alone; all that apply when None.

    Raises:
        ToolmemError: when none applies, or the one cannot be drawn.
    """
    if kind is not None:
        return load_kind(kind).panels(source, request)
    modules = [load_kind(name) for name in kinds()]
    found = [m for m in modules if hasattr(m, "applies") and m.applies(source)]
    if not found:
        raise ToolmemError(f"{source.path}: no kind of figure applies to it ({', '.join(kinds())})")
    return [panel for module in found for panel in module.panels(source, request)]


def write_page(
    source: Source, panels: Sequence[Panel], out: str | Path, pictures: Sequence[str] = ()
) -> list[Path]:
    """Write a page of figures, and beside it each one's CSV and pictures; return the files.

    Args:
        source: what was drawn.
        panels: its figures.
        out: the HTML file.
        pictures: endings of pictures to write beside.

    Raises:
        ToolmemError: for a file that cannot be written.
    """
    from toolmem.analysis.report import write_files, write_report
    from toolmem.analysis.sources import RunSource

    path = Path(out)
    write_report(
        path,
        title=source.title,
        lead=source.lead(),
        panels=panels,
        dialogues=source.dialogues() if isinstance(source, RunSource) else (),
        circumstances=source.circumstances(),
        recipe=source.recipe_text(),
    )
    return [path, *write_files(panels, path.parent, ("csv", *pictures))]


def plot(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    kind: str | None = None,
    metric: str | None = None,
    request: Request | None = None,
    pictures: Sequence[str] = (),
) -> list[Path]:
    """Draw what a folder has; return the files.

    Args:
        folder: a sweep's, or a run's.
        out: an HTML file, or a folder for ``report.html``; or a picture's file (.pdf, .svg, .png), of which
            several figures make several, each with its name; ``report.html`` in the folder when None.
        kind: one kind of figure alone; all that apply when None.
        metric: to be drawn in place of others.
        request: published results and bounds.
        pictures: endings of pictures to write beside a page.

    Raises:
        ToolmemError: for a folder with nothing to draw, or a file that cannot be written.
    """
    from toolmem.analysis.report import write_files
    from toolmem.analysis.sources import open_source

    target = _target(Path(folder) if out is None else Path(out))
    if kind is not None:
        load_kind(kind)
    source = open_source(folder, metric)
    panels = panels_of(source, request or Request(), kind)
    if target.suffix == ".html":
        return write_page(source, panels, target, pictures)
    from toolmem.analysis.pictures import save

    drawn = [panel for panel in panels if panel.figure is not None]
    if len(drawn) == 1 and drawn[0].figure is not None:
        written = [save(drawn[0].figure, target)]
    else:
        written = [
            save(panel.figure, target.with_stem(f"{target.stem}_{panel.name}"))
            for panel in drawn
            if panel.figure is not None
        ]
    return written + write_files(panels, target.parent, ("csv",))


def _target(out: Path) -> Path:
    if out.suffix in (".html", *PICTURES) and not out.is_dir():
        return out
    if out.suffix and not out.is_dir():
        raise ToolmemError(f"out: {out} must end in .html, {', '.join(PICTURES)}, or be a folder")
    return out / "report.html"
