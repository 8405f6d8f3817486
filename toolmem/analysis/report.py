"""One self-contained HTML page: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import toolmem
from toolmem.analysis.pictures import FORMATS, picture_bytes, save
from toolmem.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TYPES = {"png": "image/png", "svg": "image/svg+xml", "pdf": "application/pdf", "csv": "text/csv"}

Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


@dataclass(frozen=True)
class Panel:
    """A figure with its table, as a page shows it and files hold it.

    Args:
        name: how its files are called, without an ending.
        caption: what the figure shows.
        figure: of matplotlib; None for a table alone.
        table: column heads and rows of cells, as one reads them; None for none.
        records: heads and rows of the CSV, numbers as they are; the table's when None.
        heading: above it; none when empty.
        text: what it says in words, above the figure; of several lines each is an item.
        made: by which runs it was made, in a line.
        picture: another picture's HTML in place of the figure's, made by the library itself, not by data.
    """

    name: str
    caption: str
    figure: Figure | None = None
    table: Table | None = None
    records: Table | None = None
    heading: str = ""
    text: str = ""
    made: str = ""
    picture: str = ""

    @property
    def data(self) -> Table | None:
        """What its CSV holds; None for nothing."""
        return self.table if self.records is None else self.records

    def csv(self) -> str:
        """Its CSV; empty cells for None."""
        heads, rows = self.data or ((), ())
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(heads)
        writer.writerows(rows)
        return stream.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """A file as a ``data:`` address.

    Args:
        content: of the file.
        kind: its ending: ``png``, ``svg``, ``pdf`` or ``csv``.
    """
    return f"data:{TYPES[kind]};base64,{base64.b64encode(content).decode()}"


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str,
    panels: Sequence[Panel],
    dialogues: Sequence[tuple[str, Sequence[tuple[str, str]], str]] = (),
    circumstances: Iterable[tuple[str, str]] = (),
    recipe: str = "",
) -> None:
    """Write the page in one step.

    Args:
        path: the HTML file.
        title: the page's heading.
        lead: a paragraph that says what one sees.
        panels: figures and tables, in order; their names differ.
        dialogues: (heading, (role, text) turns, verdict) of each dialogue shown.
        circumstances: (name, value) pairs: command, seeds, hardware, versions.
        recipe: the YAML that makes it again.
    """
    environment = Environment(
        loader=PackageLoader("toolmem.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        lead=lead,
        panels=[(panel, _downloads(panel)) for panel in panels],
        dialogues=dialogues,
        circumstances=list(circumstances),
        recipe=recipe,
        version=toolmem.__version__,
    )
    write_text(path, page)


def _downloads(panel: Panel) -> dict[str, str]:
    """The address of each of a panel's files, by ending."""
    found = {}
    if panel.figure is not None:
        for kind in ("svg", "png", "pdf"):
            found[kind] = data_uri(picture_bytes(panel.figure, kind), kind)
    if panel.data is not None:
        found["csv"] = data_uri(panel.csv().encode(), "csv")
    return found


def write_files(panels: Sequence[Panel], folder: str | Path, kinds: Sequence[str]) -> list[Path]:
    """Write panels as files, each called by its name; return them.

    Args:
        panels: to be written.
        folder: where to.
        kinds: their endings: ``csv``, and those of pictures.

    Raises:
        ToolmemError: for a file that cannot be written.
    """
    written = []
    for panel in panels:
        for kind in kinds:
            target = Path(folder) / f"{panel.name}.{kind}"
            if f".{kind}" in FORMATS and panel.figure is not None:
                written.append(save(panel.figure, target))
            elif kind == "csv" and panel.data is not None:
                write_text(target, panel.csv())
                written.append(target)
    return written
