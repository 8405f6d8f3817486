"""Learning-rate schedules in optimizer steps, as a factor on ``lr``: warm-up, then a shape."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from toolmem.errors import ToolmemError


@dataclass(frozen=True)
class Schedule(ABC):
    """A factor on the learning rate for each step; subclasses give the shape after the warm-up.

    Args:
        warmup_steps: steps over which the factor rises linearly to 1 (the first step has
            1/warmup_steps).
    """

    warmup_steps: int = 0

    needs_total = True  # does the shape depend on how many steps there will be?

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ToolmemError(f"warmup_steps is {self.warmup_steps}: it must be 0 or more")
        for name in ("final_fraction", "decay_fraction"):
            value = getattr(self, name, 0.0)
            if not 0 <= value <= 1:
                raise ToolmemError(f"{name} is {value}: it must be between 0 and 1")

    @abstractmethod
    def shape(self, step: int, total: int) -> float:
        """The factor of step ``step`` (from 0, past the warm-up) of ``total``."""

    def factor(self, step: int, total: int) -> float:
        """The factor of step ``step`` (from 0) of ``total``, warm-up included."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.shape(step, total)

    def progress(self, step: int, start: float, total: int) -> float:
        """How far ``step`` is from ``start`` (0) to ``total`` (1)."""
        return min(max((step - start) / max(total - start, 1), 0.0), 1.0)

    def factors(self, total_steps: int | None) -> Callable[[int], float]:
        """The factor of each step (from 0) of a run.

        Args:
            total_steps: optimizer steps of the whole run; None when nobody knows.

        Raises:
            ToolmemError: when the shape needs ``total_steps`` and it is not known.
        """
        if total_steps is None and self.needs_total:
            raise ToolmemError(
                f"model.schedule {type(self).__name__} must know how long the run is: set "
                "trainer.max_steps, or choose the schedule Constant or InverseSqrt"
            )
        total = total_steps or 0
        return lambda step: self.factor(step, total)

    def build(self, optimizer: Optimizer, total_steps: int | None) -> LambdaLR:
        """The schedule as PyTorch has it, to be stepped once an optimizer step.

        Args:
            optimizer: its groups' ``lr`` is what the factor multiplies.
            total_steps: optimizer steps of the whole run; None when nobody knows.

        Raises:
            ToolmemError: when the shape needs ``total_steps`` and it is not known.
        """
        return LambdaLR(optimizer, self.factors(total_steps))


@dataclass(frozen=True)
class Constant(Schedule):
    """Warm-up, then 1."""

    needs_total = False

    def shape(self, step: int, total: int) -> float:
        """Always 1."""
        return 1.0


@dataclass(frozen=True)
class Linear(Schedule):
    """Warm-up, then a straight line down to ``final_fraction`` at the run's end.

    Args:
        warmup_steps: steps of linear rise.
        final_fraction: the factor at the end.
    """

    final_fraction: float = 0.0

    def shape(self, step: int, total: int) -> float:
        """A straight line."""
        progress = self.progress(step, self.warmup_steps, total)
        return 1 - (1 - self.final_fraction) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Warm-up, then half a cosine down to ``final_fraction`` at the run's end (arXiv 1608.03983).

    Args:
        warmup_steps: steps of linear rise.
        final_fraction: the factor at the end.
    """

    final_fraction: float = 0.0

    def shape(self, step: int, total: int) -> float:
        """Half a cosine."""
        progress = self.progress(step, self.warmup_steps, total)
        wave = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_fraction + (1 - self.final_fraction) * wave


@dataclass(frozen=True)
class WSD(Schedule):
    """Warm-up, stable, decay: constant, then a straight line down over the last part of the run
    (arXiv 2404.06395).

    Args:
        warmup_steps: steps of linear rise.
        decay_fraction: the part of the run, at its end, over which the factor falls.
        final_fraction: the factor at the end.
    """

    decay_fraction: float = 0.5
    final_fraction: float = 0.0

    def shape(self, step: int, total: int) -> float:
        """1, then a straight line."""
        progress = self.progress(step, total * (1 - self.decay_fraction), total)
        return 1 - (1 - self.final_fraction) * progress


@dataclass(frozen=True)
class InverseSqrt(Schedule):
    """Warm-up, then 1 / sqrt(step), continuous where they meet (arXiv 1706.03762). Knows no end.

    Args:
        warmup_steps: steps of linear rise, and the scale of the fall.
    """

    warmup_steps: int = 100

    needs_total = False

    def shape(self, step: int, total: int) -> float:
        """The inverse square root."""
        return math.sqrt(max(self.warmup_steps, 1) / max(step + 1, 1))
