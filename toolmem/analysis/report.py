"""One self-contained HTML page: no network, no script, readable on a phone and on paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, PackageLoader, StrictUndefined

import toolmem
from toolmem.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(figure: Figure) -> str:
    """A matplotlib figure as an ``<svg>`` element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def png_uri(figure: Figure, dpi: int = 160) -> str:
    """A matplotlib figure as a ``data:`` address, for a download link."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, bbox_inches="tight")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_report(
    path: str | Path,
    *,
    title: str,
    lead: str,
    table: tuple[Sequence[str], Iterable[Sequence[str]]],
    figures: Sequence[tuple[str, Figure]] = (),
    dialogues: Sequence[tuple[str, Sequence[tuple[str, str]], str]] = (),
    circumstances: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page in one step.

    Args:
        path: the HTML file.
        title: the page's heading.
        lead: a paragraph that says what one sees.
        table: column heads, and rows of cells.
        figures: (caption, figure) pairs.
        dialogues: (heading, (role, text) turns, verdict) of each dialogue shown.
        circumstances: (name, value) pairs: command, seeds, hardware, versions.
    """
    environment = Environment(
        loader=PackageLoader("toolmem.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    heads, rows = table
    page = environment.get_template("report.html.jinja").render(
        title=title,
        lead=lead,
        heads=heads,
        rows=[list(row) for row in rows],
        figures=[(caption, svg(figure), png_uri(figure)) for caption, figure in figures],
        dialogues=dialogues,
        circumstances=circumstances,
        version=toolmem.__version__,
    )
    write_text(path, page)
