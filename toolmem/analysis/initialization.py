"""How large activations are at the start of training, and how far the first steps move them.

Both over several widths of one architecture: the coordinate check of muP (arXiv 2203.03466, appendix
D.1). With the right parametrisation a few steps change every activation by as much in a wide model as
in a narrow one: the slope of log change against log width is 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.analysis.norms_plot import split
from toolmem.analysis.pictures import picture_file, save
from toolmem.models import LanguageModel
from toolmem.models.context import Extras
from toolmem.training import OptimizerConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BRANCHES = ("mixer", "feed_forward")

# name of an activation -> its root mean square at each width
Sizes = dict[str, list[float]]


@dataclass(frozen=True)
class WidthScan:
    """Root mean squares of activations over widths.

    Args:
        widths: the widths, rising.
        start: of the activations at the start.
        change: of what training changed in them; empty when nothing was trained.
        parameters: number of parameters of each model.
    """

    widths: list[int]
    start: Sizes = field(default_factory=dict)
    change: Sizes = field(default_factory=dict)
    parameters: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As plain data; a slope that is none is None."""
        found: dict[str, Any] = {"widths": self.widths, "parameters": self.parameters}
        for name, sizes in (("start", self.start), ("change", self.change)):
            slopes = self.slopes(sizes).items()
            found[name] = sizes
            found[f"{name}_slopes"] = {k: None if math.isnan(v) else v for k, v in slopes}
        return found

    def slopes(self, sizes: Sizes) -> dict[str, float]:
        """The slope of log size against log width, by least squares, for each activation."""
        return {name: slope(self.widths, values) for name, values in sizes.items()}


def slope(widths: Sequence[float], sizes: Sequence[float]) -> float:
    """The slope of log ``sizes`` against log ``widths``, by least squares; nan where a size is 0."""
    if min(sizes) <= 0:
        return math.nan
    x, y = ([math.log(value) for value in values] for values in (widths, sizes))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


@torch.no_grad()
def activations(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """What flows along the residual stream, by name, first to last.

    Args:
        model: any architecture.
        tokens: (batch, seq) int64.

    Returns:
        ``embedding``; for each block what its branches add (``blocks.0.mixer``) and the stream after it
        (``blocks.0``); ``norm``, what the head reads; ``logits``. float32, (batch, seq, ...).
    """
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        found[name] = (output[0] if isinstance(output, tuple) else output).float()

    def note_input(module: nn.Module, args: Any) -> None:
        found["embedding"] = args[0].float()

    handles = [model.blocks[0].register_forward_pre_hook(note_input)]
    for index, block in enumerate(model.blocks):
        for branch in BRANCHES:
            part = getattr(block, branch, None)
            if isinstance(part, nn.Module):
                hook = partial(note, f"blocks.{index}.{branch}")
                handles.append(part.register_forward_hook(hook))
        handles.append(block.register_forward_hook(partial(note, f"blocks.{index}")))
    handles.append(model.norm.register_forward_hook(partial(note, "norm")))
    try:
        found["logits"] = model(tokens).float()
    finally:
        for handle in handles:
            handle.remove()
    return found


def rms(values: Tensor) -> float:
    """The root of the mean square."""
    return values.double().square().mean().sqrt().item()


def train_steps(
    model: LanguageModel, optimizer: OptimizerConfig, tokens: Tensor, steps: int
) -> None:
    """Train on one batch: predict each next token."""
    stepper = optimizer.build(model)
    for _ in range(steps):
        extras = Extras()
        logits = model(tokens[:, :-1], extras=extras)
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss = loss + sum(extras.losses.values())
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        model.after_optimizer_step(lambda value: value)


def scan_widths(
    make: Callable[[int], LanguageModel],
    widths: Sequence[int],
    *,
    optimizer: OptimizerConfig | None = None,
    steps: int = 0,
    seeds: int = 1,
    rows: int = 4,
    seq: int = 32,
) -> WidthScan:
    """Measure activations at the start, and after some steps of training, at each width.

    Tokens are random, the same for all widths: it is the parametrisation that is looked at.

    Args:
        make: makes the model of a width.
        widths: the widths.
        optimizer: what trains; needed for steps.
        steps: optimizer steps, all on one batch.
        seeds: models of each width; mean squares are averaged over them.
        rows: rows of the batch.
        seq: tokens of a row.
    """
    scan = WidthScan(sorted(widths))
    for width in scan.widths:
        squares: dict[str, dict[str, float]] = {"start": {}, "change": {}}
        for seed in range(seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = make(width).eval()  # no dropout: it would be taken for a change
                tokens = torch.randint(
                    model.vocab_size, (rows, seq), generator=torch.Generator().manual_seed(seed)
                )
                before = activations(model, tokens)
                for name, values in before.items():
                    _add(squares["start"], name, rms(values) ** 2 / seeds)
                if optimizer is not None and steps:
                    train_steps(model, optimizer, tokens, steps)
                    after = activations(model, tokens)
                    for name in before:
                        change = rms(after[name] - before[name])
                        _add(squares["change"], name, change**2 / seeds)
        for name, value in squares["start"].items():
            scan.start.setdefault(name, []).append(math.sqrt(value))
        for name, value in squares["change"].items():
            scan.change.setdefault(name, []).append(math.sqrt(value))
        scan.parameters.append(sum(p.numel() for p in model.parameters()))
    return scan


def _add(sums: dict[str, float], name: str, value: float) -> None:
    sums[name] = sums.get(name, 0.0) + value


def draw(scan: WidthScan, out: str | Path, title: str, steps: int = 0) -> Path:
    """Draw sizes of activations, first layer to last, a line for each width; below, what training changed.

    Args:
        scan: what was measured.
        out: the picture's file, .png, .svg or .pdf.
        title: over it.
        steps: of training, for the second panel's title.

    Returns:
        the picture's file.

    Raises:
        ToolmemError: for a file that cannot be written.
    """
    from matplotlib.figure import Figure

    target = picture_file(out)
    panels = [("root mean square at the start", scan.start)]
    if scan.change:
        panels.append((f"root mean square of what {steps} steps change", scan.change))
    parts = groups(list(scan.start))
    figure = Figure(figsize=(3.0 + 1.6 * len(parts), 3.4 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=11)
    rows = figure.subplots(
        len(panels), len(parts), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": [max(2.0, len(names)) for names in parts.values()]},
    )  # fmt: skip
    for line, (panel, sizes) in zip(rows, panels, strict=True):
        for axes, (part, names) in zip(line, parts.items(), strict=True):
            _draw_part(axes, scan, sizes, part, names)
        line[0].set_ylabel(panel, fontsize=8)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, title="dim")
    return save(figure, target)


def groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Activations of one part of every block together, first block to last; those outside blocks alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(split(name)[0], []).append(name)
    return found


def _draw_part(axes: Axes, scan: WidthScan, sizes: Sizes, part: str, names: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.ticker import LogFormatter, MaxNLocator

    colours = colormaps["viridis"]
    for index, width in enumerate(scan.widths):
        axes.plot(
            range(len(names)), [sizes[name][index] for name in names], marker="o", markersize=3,
            linewidth=1.2, label=str(width), color=colours(0.9 * index / (len(scan.widths) - 1)),
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(LogFormatter())  # 0.4, not 4 x 10^-1
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_title(part, fontsize=8)
    slopes = scan.slopes(sizes)
    there = sorted(slopes[name] for name in names if not math.isnan(slopes[name]))
    text = (
        " to ".join(f"{value:+.2f}" for value in dict.fromkeys((there[0], there[-1])))
        if there
        else ""
    )
    axes.set_xlabel(f"slope {text}" if text else "0 at some width", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) == 1:
        axes.set_xticks([])
    axes.tick_params(labelsize=7, which="both")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
