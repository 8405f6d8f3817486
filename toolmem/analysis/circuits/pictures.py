"""Pictures of circuits: curves over steps, and attention by head."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from toolmem.analysis.circuits.nodes import Node
from toolmem.analysis.pictures import legend_below, new_figure, style, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

GREY = "#b8bec6"
MOST_LINES = 8
MOST_LABELLED = 4  # heads: with more, tokens beside each would be too small to read


def draw_curves(
    steps: Sequence[int],
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    lines: Sequence[str],
    low: float | None = 0.0,
    high: float | None = 1.0,
) -> Figure:
    """Curves over steps, one pair of axes below the other.

    Args:
        steps: of the checkpoints.
        curves: by the axes' title and the line's name, a value for each step; nan for none.
        lines: names of lines with a colour and a place in the legend, at most eight; the others are grey.
        low: where y begins; by the values when None.
        high: where it ends.
    """
    figure = new_figure(0.5 + 1.75 * len(curves))
    rows = figure.subplots(len(curves), 1, sharex=True, squeeze=False)[:, 0]
    shown = list(lines)[:MOST_LINES]
    for axes, (title, by_line) in zip(rows, curves.items(), strict=True):
        for name, values in by_line.items():
            if name not in shown:
                axes.plot(steps, values, color=GREY, linewidth=0.7)
        for index, name in enumerate(shown):
            if name in by_line:
                axes.plot(
                    steps, by_line[name], label=name, linewidth=1.5, markersize=3.5, **style(index)
                )
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_ylim(
            low if low is None else low - 0.03 * ((high or 1) - low),
            high if high is None else high + 0.03 * (high - (low or 0)),
        )
        tidy(axes)
    rows[-1].set_xlabel("step", fontsize=9)
    legend_below(figure, rows[0])
    return figure


def draw_attention(weights: Mapping[Node, Tensor], tokens: Sequence[str]) -> Figure:
    """What each head looks at in a dialogue: a row for each token that looks, dark where it looks.

    Args:
        weights: (s, s) uint8 by head, 255 for all.
        tokens: (s,) how each token is shown.
    """
    labelled = len(weights) <= MOST_LABELLED
    columns = min(len(weights), 2 if labelled else 4)
    rows = math.ceil(len(weights) / columns)
    side = 5.2 if labelled else 2.6
    figure = new_figure(side * rows, side * columns)
    places = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (node, values) in zip(places, weights.items(), strict=False):
        axes.imshow(values.numpy(), cmap="Greys", vmin=0, vmax=255, interpolation="nearest")
        axes.set_title(f"head {node.label}", fontsize=10, loc="left")
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.set_yticks([])
        if labelled:
            size = min(7.0, 330 / len(tokens))
            marks = range(len(tokens))
            texts = [token.replace("$", r"\$") for token in tokens]
            axes.set_xticks(marks, texts, fontsize=size, rotation=90)
            axes.set_yticks(marks, texts, fontsize=size)
            axes.xaxis.tick_top()
    for axes in list(places)[len(weights) :]:
        axes.set_axis_off()
    return figure
