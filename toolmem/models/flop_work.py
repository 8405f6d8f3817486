"""Amounts of work in FLOPs: what one call asks for, and what was counted of a whole pass.

Shapes: b batch, s seq, h heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

from toolmem.models.flop_formulas import causal_flash_pairs


@dataclass(frozen=True)
class Work:
    """FLOPs of one call that no operation's formula sees, such as a scan's elementwise work.

    Args:
        forward: of the call.
        backward: of its gradient; twice ``forward`` when None.
    """

    forward: int
    backward: int | None = None

    @property
    def gradient(self) -> int:
        """FLOPs of the backward pass."""
        return 2 * self.forward if self.backward is None else self.backward

    @property
    def both(self) -> int:
        """FLOPs of both passes."""
        return self.forward + self.gradient


@dataclass(frozen=True, kw_only=True)
class PairWork(Work):
    """FLOPs for each pair of a token and one that it may see, over all heads: attention's.

    A recurrence's too, whatever chunks it is computed in: there a token sees itself (``token_work``).

    Args:
        forward: of one pair.
        backward: of its gradient; twice ``forward`` when None.
        seq: tokens in a row of this call.
        window: how many tokens back a token sees, itself included; 0 for all.
    """

    seq: int
    window: int = 0


def attention_work(queries: Tensor, values: Tensor, window: int = 0) -> PairWork:
    """Attention's work: a query meets a key, and a value is weighed.

    Args:
        queries: (b, h, s, d).
        values: (b, k, n, v).
        window: how many tokens back a token sees, itself included; 0 for all.
    """
    _, h, s, d = queries.shape
    return PairWork(forward=2 * h * (d + values.shape[3]), seq=s, window=window)


def token_work(forward: int, seq: int, backward: int | None = None) -> PairWork:
    """Work that is the same for every token, however many are computed together.

    Args:
        forward: for one token.
        seq: tokens in a row of this call.
        backward: of its gradient; twice ``forward`` when None.
    """
    return PairWork(forward=forward, backward=backward, seq=seq, window=1)


@dataclass(frozen=True)
class PairCount:
    """Work over pairs of tokens: attention of some layers alike.

    Args:
        group: ``parameter_group`` of the module around.
        window: how many tokens back a token sees, itself included; 0 for all.
        skips: the kernel passes over blocks that lie after the diagonal.
        seq: tokens in a row.
        forward: exact FLOPs of a pair.
        backward: exact FLOPs of a pair's gradient.
        executed_forward: what the machine was given to do, over all rows.
        executed_backward: the same of the backward pass.
    """

    group: str
    window: int
    skips: bool
    seq: int
    forward: int = 0
    backward: int = 0
    executed_forward: int = 0
    executed_backward: int = 0

    @property
    def executed(self) -> int:
        """What the machine was given to do, forward and backward."""
        return self.executed_forward + self.executed_backward

    def plus(self, other: PairCount) -> PairCount:
        """The work of both, alike in all else."""
        return replace(
            self,
            forward=self.forward + other.forward,
            backward=self.backward + other.backward,
            executed_forward=self.executed_forward + other.executed_forward,
            executed_backward=self.executed_backward + other.executed_backward,
        )

    def at(self, rows: Fraction, seq: int) -> PairCount:
        """The same with ``rows`` times as many rows, of ``seq`` tokens each."""
        share = rows * Fraction(self._computed(seq), self._computed(self.seq))
        return replace(
            self,
            seq=seq,
            executed_forward=int(self.executed_forward * share),
            executed_backward=int(self.executed_backward * share),
        )

    def _computed(self, seq: int) -> int:
        """How the executed work grows with the row; a guess that ``ModelFlops`` puts to the test."""
        if self.window == 1:  # work for each token
            return seq
        return causal_flash_pairs(seq, seq) if self.skips else seq * seq


def merged(pairs: Iterable[PairCount]) -> list[PairCount]:
    """Counts that are alike as one."""
    found: dict[tuple[Any, ...], PairCount] = {}
    for pair in pairs:
        key = (pair.group, pair.window, pair.skips, pair.seq)
        found[key] = found[key].plus(pair) if key in found else pair
    return list(found.values())


@dataclass
class Tally:
    """What was counted.

    Args:
        forward: FLOPs outside of a backward pass.
        backward: FLOPs in one.
        recomputed: FLOPs in one that were done before, by blocks that are run again (``recompute.py``).
        unknown: operations without a formula that are not known to be free: name -> calls.
        groups: ``forward`` by ``parameter_group`` of the module around.
        pairs: attention, where it is told apart; then it is not in the above.
        skips: was there a kernel that passes over blocks?
    """

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    unknown: Counter[str] = field(default_factory=Counter)
    groups: Counter[str] = field(default_factory=Counter)
    pairs: list[PairCount] = field(default_factory=list)
    skips: bool = False

    @property
    def total(self) -> int:
        """FLOPs forward and backward."""
        return self.forward + self.backward
