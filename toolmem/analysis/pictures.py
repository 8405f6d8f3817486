"""How pictures look and where they go: colours, fonts, endings, and writing one whole or not at all."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, explain_os_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
# Okabe and Ito's colours, told apart by colour-blind readers too, and a marker and a stroke each.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7f7f7f", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLES = ("-", "--", ":", "-.")
WIDTH = (
    5.2  # inches: of a page of print, and on a telephone's screen letters of 9 points stay readable
)
GREY = "#7f7f7f"
# Letters stay letters in a PDF; the same figure is the same file, whenever it is drawn.
SETTINGS: Any = {"pdf.fonttype": 42, "svg.hashsalt": "toolmem"}
NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
DPI = 160


def picture_file(out: str | Path) -> Path:
    """The file that a picture is to be.

    Raises:
        ToolmemError: for an ending that no picture has.
    """
    path = Path(out)
    if path.suffix not in FORMATS:
        raise ToolmemError(f"out: {path} must end in {', '.join(FORMATS)}")
    return path


def save(figure: Figure, target: Path) -> Path:
    """Write a figure; return its file.

    Raises:
        ToolmemError: for a file that cannot be written.
    """
    content = picture_bytes(figure, target.suffix[1:])
    try:
        with atomic_path(target) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise explain_os_error(error, target) from error
    return target


def picture_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the content of a file.

    Args:
        figure: of matplotlib.
        kind: ``png``, ``svg`` or ``pdf``.
    """
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(SETTINGS):
        figure.savefig(
            buffer, format=kind, dpi=DPI, bbox_inches="tight", metadata=NO_DATE.get(kind)
        )
    return buffer.getvalue()


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """A figure without a title: its caption says what it shows.

    Args:
        height: inches.
        width: inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(index: int) -> dict[str, Any]:
    """Colour and marker of the line of this number."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}


def tidy(axes: Axes, size: float = 9) -> None:
    """No frame on the top and right, pale lines along y.

    Args:
        axes: to be changed.
        size: of letters at ticks, points.
    """
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6, zorder=0)
    axes.tick_params(labelsize=size)


def legend_below(figure: Figure, axes: Axes, title: str | None = None) -> None:
    """What each line of some axes is, under the figure, where a narrow screen has room for it.

    Args:
        figure: around them.
        axes: with labelled lines; nothing is drawn where there are none.
        title: above it.
    """
    handles, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    longest = max(map(len, labels))
    figure.legend(
        handles, labels, frameon=False, fontsize=8.5, title=title, title_fontsize=8.5,
        loc="outside lower center", ncols=max(1, min(len(labels), 4, 64 // (longest + 6))),
    )  # fmt: skip


def places_of(labels: Sequence[Any]) -> tuple[dict[Any, float], bool]:
    """Where labels stand along x: numbers where they are (then True), words one after another."""
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in labels)
    return {x: x if numbers else index for index, x in enumerate(labels)}, numbers


def spans_wide(numbers: Sequence[float]) -> bool:
    """Do these numbers want a logarithmic scale?"""
    return len(numbers) > 2 and min(numbers) > 0 and max(numbers) / min(numbers) >= 4


def label_x(
    axes: Axes, labels: Sequence[Any], log: bool | None = None, size: float = 9, turned: float = 0
) -> None:
    """Write an axis' labels along x, on a logarithmic scale where they are numbers that want one.

    Args:
        axes: to be changed.
        labels: in order.
        log: logarithmic or not; by the numbers when None.
        size: points.
        turned: by so many degrees.
    """
    places, numbers = places_of(labels)
    if numbers and min(labels) > 0 and (spans_wide(labels) if log is None else log):
        axes.set_xscale("log")
    words = [f"{x:g}" if numbers and abs(x) < 1e6 else str(x) for x in labels]
    crowded = sum(len(word) + 2 for word in words) > 60
    axes.set_xticks(
        list(places.values()), words, fontsize=size, rotation=turned or (45 if crowded else 0),
        ha="right" if crowded and not turned else "center",
    )  # fmt: skip
    axes.minorticks_off()


def plain_log_y(axes: Axes, form: str = "{x:g}") -> None:
    """A logarithmic scale upwards, its numbers written out.

    Args:
        axes: to be changed.
        form: of a number ``x``.
    """
    plain_log(axes.yaxis, form)


def plain_log(axis: Axis, form: str = "{x:,g}") -> None:
    """A logarithmic scale, its numbers written out: what is drawn often spans less than a decade.

    Args:
        axis: ``axes.xaxis`` or ``axes.yaxis``.
        form: of a number ``x``.
    """
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    if axis is axis.axes.xaxis:
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter(form))
    axis.set_minor_formatter(NullFormatter())


def is_share(metric: str) -> bool:
    """Is a metric a fraction, seen against the whole?"""
    return any(word in metric for word in ("accuracy", "exact_match", "recall"))


def finite(value: Any) -> bool:
    """Is it there, and a number?"""
    return value is not None and math.isfinite(value)
