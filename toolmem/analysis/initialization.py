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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.models import LanguageModel
from toolmem.models.context import Extras
from toolmem.training import OptimizerConfig

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
