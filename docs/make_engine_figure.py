"""Draw docs/assets/engine.svg: lanes, pages and tools of the engine.

python docs/make_engine_figure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

OUT = Path(__file__).parent / "assets" / "engine.svg"
READ, WRITE, WAIT, IDLE, INK = "#8fb8de", "#2f7fc1", "#f0b45c", "#e4e8ec", "#26323d"
# What four dialogues do, step by step: r(ead), w(rite), t(ool), nothing. One place for each of two lanes.
LANES = {
    "lane 1": "rwwwttttttrwww..",
    "lane 2": "rrwwwwwtttttrwww",
    "lane 3": "....rwwwwww.....",
    "lane 4": ".......rwwwttrww",
}
# Whose token each of a page's places holds: the first two pages are everybody's.
PAGES = [
    ("shared prefix", READ, 2),
    ("lane 1", WRITE, 2),
    ("lane 2", "#5aa469", 1),
    ("lane 4", "#b0699e", 1),
]


def box(axes: Axes, x: float, y: float, w: float, h: float, text: str, color: str) -> None:
    """A labelled box."""
    shape = FancyBboxPatch(
        (x, y), w, h, boxstyle="round,pad=0.02,rounding_size=0.12", fc=color, ec=INK, lw=0.8
    )
    axes.add_patch(shape)
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8.5, color=INK)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    bend: float = 0,
) -> None:
    """An arrow with a word beside it."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, lw=0.9, color=INK, connectionstyle=style
        )
    )
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(x, y + 0.12, text, ha="center", fontsize=7.5, color=INK)


def lanes(axes: Axes) -> None:
    """Time goes to the right; a column is a step."""
    axes.set_title(
        "Lanes: a column is a step; who waits for a tool takes no place", fontsize=9.5, loc="left"
    )
    colors = {"r": READ, "w": WRITE, "t": WAIT, ".": IDLE}
    for row, (name, steps) in enumerate(LANES.items()):
        for step, what in enumerate(steps):
            axes.add_patch(Rectangle((step, -row), 0.92, 0.8, fc=colors[what], ec="none"))
        axes.text(-0.3, 0.4 - row, name, ha="right", va="center", fontsize=8.5, color=INK)
    legend = [
        ("reads prompt or answer", READ),
        ("writes a token", WRITE),
        ("its tool is asked", WAIT),
    ]
    for at, (label, color) in enumerate(legend):
        axes.add_patch(Rectangle((at * 5.4, -4.35), 0.5, 0.5, fc=color, ec="none"))
        axes.text(at * 5.4 + 0.7, -4.1, label, va="center", fontsize=8, color=INK)
    axes.set_xlim(-2.6, 16.2)
    axes.set_ylim(-4.6, 1.1)


def flow(axes: Axes) -> None:
    """Where a dialogue is, and where its pages are."""
    axes.set_title("Where a dialogue is, and its pages", fontsize=9.5, loc="left")
    box(axes, 0, 2.6, 1.7, 0.7, "queue", IDLE)
    box(axes, 3.2, 2.6, 2.0, 0.7, "running", WRITE)
    box(axes, 7.4, 2.6, 2.0, 0.7, "asks its tool", WAIT)
    box(axes, 11.4, 2.6, 1.8, 0.7, "finished", IDLE)
    arrow(axes, (1.75, 2.95), (3.15, 2.95), "a place")
    arrow(axes, (5.25, 3.1), (7.35, 3.1), "<|database|>")
    arrow(axes, (7.35, 2.75), (5.25, 2.75), "")
    axes.text(6.3, 2.42, "answer, forced in", ha="center", fontsize=7.5, color=INK)
    arrow(axes, (4.2, 3.35), (12.3, 3.35), "", bend=-0.22)
    axes.text(8.4, 4.38, "<|end|>, a limit, cancelled", ha="center", fontsize=7.5, color=INK)
    x = 0.0
    for name, color, n in PAGES:
        for _ in range(n):
            axes.add_patch(Rectangle((x, 0.9), 0.84, 0.7, fc=color, ec="white", lw=1))
            x += 0.9
        axes.text(x - 0.45 * n - 0.03, 0.66, name, ha="center", fontsize=7, color=INK)
    axes.text(0, 1.72, "pages in memory, never beyond memory_limit", fontsize=8, color=INK)
    box(axes, 7.4, 0.85, 2.2, 0.75, "host memory", IDLE)
    box(axes, 11.2, 0.85, 2.0, 0.75, "a file", IDLE)
    arrow(axes, (5.5, 1.35), (7.35, 1.35), "idle longest")
    arrow(axes, (7.35, 1.05), (5.5, 1.05))
    arrow(axes, (9.65, 1.22), (11.15, 1.22), "beyond")
    axes.text(6.4, 0.72, "when it runs again", ha="center", fontsize=7.5, color=INK)
    axes.set_xlim(-0.3, 13.6)
    axes.set_ylim(0.4, 4.7)


def main() -> None:
    """Draw it."""
    matplotlib.rcParams["svg.hashsalt"] = "toolmem"
    figure = Figure(figsize=(8.4, 5.4))
    above, below = figure.subplots(2, 1)
    for axes, draw in ((above, lanes), (below, flow)):
        draw(axes)
        axes.axis("off")
    figure.tight_layout()
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
