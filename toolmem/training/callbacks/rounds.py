"""At which steps a probe looks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from toolmem.errors import ToolmemError


class Rounds:
    """The optimizer steps at which a probe has a round, each once.

    Args:
        key: of the probe's options, for messages.
        every_n_steps: every so many steps; 0 for none so.
        steps: these; 0 is before the first step.
        steps_per_decade: so many between a power of ten and the next, evenly by ratio (2: 1, 3, 10, 32,
            100, ...); 0 for none so.

    Raises:
        ToolmemError: for numbers below 0.
    """

    def __init__(
        self, key: str, every_n_steps: int, steps: Sequence[int] | None, steps_per_decade: int
    ) -> None:
        if every_n_steps < 0 or steps_per_decade < 0 or any(step < 0 for step in steps or ()):
            raise ToolmemError(
                f"{key}: every_n_steps, steps_per_decade and each of steps must be 0 or more"
            )
        self.every_n_steps = every_n_steps
        self.steps = frozenset(steps or ())
        self.per_decade = steps_per_decade
        self.last: int | None = None

    def __bool__(self) -> bool:
        """Whether there is any round."""
        return bool(self.every_n_steps or self.steps or self.per_decade)

    def begin(self, step: int) -> None:
        """Training begins, or goes on from a checkpoint whose round was had.

        Args:
            step: optimizer steps taken.
        """
        self.last = step or None

    def due(self, step: int, last_step: int) -> bool:
        """Whether there is a round at this step that was not had yet; then it is had.

        Args:
            step: optimizer steps taken.
            last_step: of the run, which has a round wherever there is any.
        """
        if step == self.last or not self:
            return False
        if step == 0:
            due = 0 in self.steps
        else:
            due = step in self.steps or step == last_step or self._regular(step)
        if due:
            self.last = step
        return due

    def _regular(self, step: int) -> bool:
        if self.every_n_steps and step % self.every_n_steps == 0:
            return True
        if not self.per_decade:
            return False
        number = round(self.per_decade * math.log10(step))
        return step == round(10 ** (number / self.per_decade))
