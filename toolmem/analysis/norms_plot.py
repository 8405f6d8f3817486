"""Heat-maps of what the norms probe measured: layers from first to last over steps, colour the value."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from toolmem.analysis.pictures import picture_file, save
from toolmem.analysis.report import Panel
from toolmem.analysis.sources import RunSource, Source
from toolmem.errors import ToolmemError
from toolmem.training.callbacks.norm_files import NormFile
from toolmem.training.callbacks.norm_measures import ALL

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    from toolmem.analysis.page import Request

TITLES = {
    "weight": "weight norm",
    "gradient": "gradient norm, before clipping",
    "update_ratio": "update / weight",
    "activation_rms": "activation, root mean square",
    "activation_max": "activation, largest magnitude",
    "dead_units": "share of dead units",
    "attention_entropy": "attention entropy, nats",
    "attention_logit_max": "largest attention logit",
}
MOST_LABELS = 40  # of layers in a panel
MISSING = "#d9d9d9"
LINEAR = ("attention_entropy",)
SHARES = {"dead_units": 0.05}  # from 0 to their largest, or to this
DECADES = 4  # that a logarithmic panel shows, at most


def applies(source: Source) -> bool:
    """To runs that measured norms."""
    return isinstance(source, RunSource) and NormFile(source.path).read() is not None


def panels(source: Source, request: Request) -> list[Panel]:
    """A figure of all the norms of a run.

    Raises:
        ToolmemError: for a run without norms.
    """
    if not isinstance(source, RunSource):
        raise ToolmemError(f"{source.path} is no run's folder: norms are drawn of a run")
    found = panels_of(source.path)
    rows = [
        [step, layer, measure, value]
        for measure, panel in found.items()
        for layer, values in panel.items()
        for step, value in values.items()
    ]
    return [
        Panel(
            f"{source.name}_norms",
            "Norms by layer over steps, first layer at the top.",
            _figure(found, source.name, columns=1),
            records=(["step", "layer", "measure", "value"], rows),
            made=source.made(),
        )
    ]


def draw(run: str | Path, out: str | Path | None = None, measure: str | None = None) -> Path:
    """Draw a run's norms.

    Args:
        run: the run's folder.
        out: the picture's file; ``norms.png`` (``norms_MEASURE.png``) in the run's folder when None.
        measure: one measure alone; all that there are when None.

    Returns:
        the picture's file.

    Raises:
        ToolmemError: for a run without norms, a measure that it has not, or a file that cannot be.
    """
    folder = Path(run)
    target = picture_file(out or folder / f"norms{'_' + measure if measure else ''}.png")
    panels = panels_of(folder)
    if measure is not None:
        if measure not in panels:
            raise ToolmemError(f"measure: {run} has no {measure!r}; it has {', '.join(panels)}")
        panels = {measure: panels[measure]}
    return save(_figure(panels, folder.resolve().name), target)


Grid = dict[str, dict[int, float]]


def panels_of(folder: Path) -> dict[str, Grid]:
    """Each measure's values by layer and step, layers as they are to be shown, top to bottom.

    Raises:
        ToolmemError: for a folder without norms.
    """
    if not folder.is_dir():
        raise ToolmemError(f"run: {folder} is not a run's folder (such as runs/first)")
    table = NormFile(folder).read()
    if table is None:
        raise ToolmemError(
            f"run: {folder} has no norms: train with --norms.every_n_steps 100 to measure them"
        )
    found: dict[str, Grid] = {}
    columns = (table[name].to_pylist() for name in ("step", "layer", "measure", "value"))
    for step, layer, measure, value in zip(*columns, strict=True):
        if layer != ALL:
            found.setdefault(measure, {}).setdefault(layer, {})[step] = value
    known = [name for name in TITLES if name in found]
    known += [name for name in found if name not in TITLES]
    return {name: {layer: found[name][layer] for layer in ordered(found[name])} for name in known}


def ordered(layers: Grid) -> list[str]:
    """Layers as they are to be shown: parts of blocks of one name together, first block to last.

    What stands before the blocks and after them stays there.
    """
    names = [split(layer) for layer in layers]
    parts = list(dict.fromkeys(part for part, number in names if number is not None))
    inside = [i for i, (_, number) in enumerate(names) if number is not None]
    first = inside[0] if inside else 0
    together = sorted(inside, key=lambda i: (parts.index(names[i][0]), names[i][1] or 0))
    outside = [i for i in range(len(names)) if names[i][1] is None]
    order = [i for i in outside if i < first] + together + [i for i in outside if i >= first]
    listed = list(layers)
    return [listed[i] for i in order]


def split(layer: str) -> tuple[str, int | None]:
    """``blocks.3.mixer`` as (``blocks.mixer``, 3); a layer without a number as itself and None."""
    words = layer.split(".")
    number = next((i for i, word in enumerate(words) if word.isdigit()), None)
    if number is None:
        return layer, None
    return ".".join(words[:number] + words[number + 1 :]), int(words[number])


def _figure(panels: dict[str, Grid], name: str, columns: int = 2) -> Figure:
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    grid = [list(panels)[i : i + columns] for i in range(0, len(panels), columns)]
    tallest = [max(len(panels[measure]) for measure in line) for line in grid]
    heights = [0.9 + 0.16 * min(max(n, 5), MOST_LABELS) for n in tallest]
    figure = Figure(figsize=(6.4 * columns, 0.5 + sum(heights)), layout="constrained")
    figure.suptitle(f"{name}: norms by layer over steps", fontsize=11)
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    for place, (measure, panel) in zip(axes.flat, panels.items(), strict=False):
        _draw_panel(figure, place, measure, panel)
    return figure


def _draw_panel(figure: Figure, axes: Axes, measure: str, panel: Grid) -> None:
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatter

    steps = sorted({step for values in panel.values() for step in values})
    grid = np.array([[values.get(s, math.nan) for s in steps] for values in panel.values()])
    grid[~np.isfinite(grid)] = math.nan
    image = axes.pcolormesh(
        edges(steps), np.arange(len(panel) + 1), grid, cmap="viridis", norm=_scale(measure, grid)
    )
    axes.set_facecolor(MISSING)
    axes.invert_yaxis()
    axes.set_title(TITLES.get(measure, measure), fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7, length=2)
    every = math.ceil(len(panel) / MOST_LABELS)
    shown = list(panel)[::every]
    axes.set_yticks(np.arange(0, len(panel), every) + 0.5, shown, fontsize=6.5)
    parts = [split(layer)[0] for layer in panel]
    for row in range(1, len(parts)):
        if parts[row] != parts[row - 1]:
            axes.axhline(row, color="white", linewidth=1.2)
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.05)
    bar.ax.tick_params(labelsize=7, length=2, which="both")
    if isinstance(image.norm, LogNorm):  # 0.4, not 4 x 10^-1
        bar.ax.yaxis.set_major_formatter(LogFormatter())
        bar.ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def edges(steps: list[int]) -> list[float]:
    """Where cells around the steps begin and end: half-way to their neighbours."""
    if len(steps) == 1:
        return [steps[0] - 0.5, steps[0] + 0.5]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    return [1.5 * steps[0] - steps[1] / 2, *middles, 1.5 * steps[-1] - steps[-2] / 2]


def _scale(measure: str, values: np.ndarray) -> Normalize:
    """Logarithmic but for shares, entropies, and numbers below 0.

    What is 0 takes the lowest colour, as does what is smaller than the largest by more than ``DECADES``.
    """
    import numpy as np
    from matplotlib.colors import LogNorm, Normalize

    there = values[np.isfinite(values)]
    high = float(there.max()) if len(there) else 1.0
    if measure in SHARES:
        return Normalize(0.0, max(high, SHARES[measure]))
    positive = there[there > 0]
    if measure in LINEAR or not len(positive) or (there < 0).any():
        return Normalize(float(there.min()) if len(there) else 0.0, high)
    low = max(float(positive.min()), high / 10**DECADES)
    return LogNorm(min(low, high * 0.9), high, clip=True)
