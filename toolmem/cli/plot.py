"""``toolmem plot``: pictures of a run, or of a sweep."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolmem.cli.functions import call, choose
from toolmem.cli.plot_circuits import circuits
from toolmem.errors import ToolmemError


def norms(run: str, measure: str | None = None, out: str | None = None) -> None:
    """Draw what the norms probe measured: heat-maps of layers over steps.

    Args:
        run: the run's folder.
        measure: one measure alone (weight, gradient, update_ratio, activation_rms, activation_max,
            dead_units, attention_entropy, attention_logit_max); all that there are when left out.
        out: the picture's file, .png, .svg or .pdf; norms.png in the run's folder when left out.
    """
    from toolmem.analysis.norms_plot import draw
    from toolmem.console import stdout

    stdout().print(draw(run, out, measure), highlight=False, markup=False, soft_wrap=True)


def page(
    folder: str,
    out: str | None = None,
    kind: str | None = None,
    metric: str | None = None,
    published: str | None = None,
    pdf: bool = False,
) -> None:
    """Draw what a sweep's or a run's folder has: one page of figures with their tables, and a CSV of each.

    ``toolmem plot KIND DIR`` draws one kind of figure alone. ``--pdf`` needs no value.

    Args:
        folder: a sweep's folder, or a run's.
        out: the page (.html), or a folder for report.html; or a picture (.pdf, .svg, .png), of which several
            figures make several; report.html in the folder when left out. CSVs are written beside.
        kind: one kind of figure alone; all that apply when left out.
        metric: draw this one: of a sweep one that it keeps, of a run any that it logged.
        published: a CSV of published results to draw beside; the recipe's report.published names its columns.
        pdf: write each figure as PDF and SVG too, beside the page.
    """
    from toolmem.analysis.page import Request, plot
    from toolmem.console import stdout

    pictures = ("pdf", "svg") if pdf else ()
    request = Request(published)
    for path in plot(folder, out, kind=kind, metric=metric, request=request, pictures=pictures):
        stdout().print(path, highlight=False, markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "norms": (norms, ("run",), "toolmem plot norms runs/first --measure gradient"),
    "circuits": (circuits, ("run",), "toolmem plot circuits runs/first --dialogues 64"),
}


EXAMPLE = "toolmem plot sweeps/figure1_quick --out report.html"
FLAGS = {"--pdf": "--pdf=true"}


def main(command: str, argv: list[str]) -> int:
    """Run ``toolmem plot``.

    Args:
        command: ``plot``.
        argv: the words after it.
    """
    from toolmem.analysis.page import kinds

    prog = f"toolmem {command}"
    if argv and argv[0] in COMMANDS:
        choose(COMMANDS, argv, prog=prog)
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} DIR [options]        a page of all that a sweep or a run has to show")
        print(f"       {prog} KIND DIR [options]   one kind of figure alone")
        print(f"       example: {EXAMPLE}\n")
        for name in sorted({*kinds(), *COMMANDS}):
            print(f"  {name:<10} {_summary(name)}")
        print(f"\n`{prog} DIR --help` shows the options")
        return 0
    words = [FLAGS.get(word, word) for word in argv]
    if words[0] in kinds():
        name, *words = words
        prog, words = f"{prog} {name}", [*words, "--kind", name]
    elif not (Path(words[0]).exists() or "/" in words[0] or len(words) > 1):
        near = difflib.get_close_matches(words[0], [*kinds(), *COMMANDS], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ToolmemError(
            f"{words[0]} is neither a folder nor a kind of figure ({', '.join([*kinds(), *COMMANDS])}){hint}"
        )
    call(page, words, prog=prog, positional=("folder",), example=EXAMPLE)
    return 0


def _summary(name: str) -> str:
    from toolmem.analysis.page import summary

    if name not in COMMANDS:
        return summary(name)
    function, _, example = COMMANDS[name]
    first = (inspect.getdoc(function) or "").partition("\n")[0]
    return f"{first}\n{'':13}example: {example}"
