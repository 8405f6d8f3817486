"""The smallest member of an ordered family that reaches a value, found by about log2 of its members' runs.

Members are numbered from the smallest. Each is tried by a run, again by further seeds where that is needed,
and counts as reaching the value if most of its tries did:

1. From the last seed's answer in steps of 1, 2, 4, ..., then by halves; without one by halves at once.
2. Where a member reaches it and the one below does not, the one above is tried too: it should reach it.
3. A larger member that fails where a smaller one passed contradicts the order: both are tried with a
   further seed, and with a third where that makes it one to one. What most tries say counts; should the
   contradiction stay, the smaller one is the answer, and is said not to be monotone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Tries = Mapping[int, Sequence[bool]]


@dataclass(frozen=True)
class Step:
    """What a search wants next, or what it found.

    Args:
        wanted: (member, try) pairs whose runs are needed now; none when it is over.
        answer: the smallest member that reaches the value; None while it is open, and when none does.
        monotone: no larger member than the answer failed.
    """

    wanted: tuple[tuple[int, int], ...] = ()
    answer: int | None = None
    monotone: bool = True

    @property
    def over(self) -> bool:
        """Is there nothing left to be tried?"""
        return not self.wanted


def next_step(tries: Tries, n: int, guess: int | None = None, check: bool = True) -> Step:
    """What is to be tried next.

    Args:
        tries: by member, whether each of its tries reached the value, in order.
        n: members there are.
        guess: where to begin; None for the middle.
        check: try the member above the answer.
    """
    if tied := [member for member, found in tries.items() if 2 * sum(found) == len(found) > 0]:
        return Step(tuple((member, len(tries[member])) for member in sorted(tied)))
    passes = {member: 2 * sum(found) > len(found) for member, found in tries.items() if found}
    high = min((member for member, reached in passes.items() if reached), default=n)
    low = max(
        (member for member, reached in passes.items() if not reached and member < high), default=-1
    )
    if high - low > 1:
        return Step(((between(low, high, n, guess), 0),))
    if high == n:
        return Step()
    if check and high + 1 < n and high + 1 not in passes:
        return Step(((high + 1, 0),))
    against = [member for member, reached in passes.items() if member > high and not reached]
    again = [member for member in (high, *sorted(against)) if against and len(tries[member]) == 1]
    if again:
        return Step(tuple((member, 1) for member in again))
    return Step(answer=high, monotone=not against)


def between(low: int, high: int, n: int, guess: int | None) -> int:
    """The member to try in a bracket.

    Args:
        low: the largest member that fails; -1 while none does.
        high: the smallest that reaches it; n while none does.
        n: members there are.
        guess: where the search began; None for the middle.
    """
    middle = (low + high) // 2
    if guess is None or (low >= 0 and high < n):
        return middle
    if low < 0 and high == n:
        return min(max(guess, 0), n - 1)
    # in steps of 1, 2, 4, ... from the guess, but no further than halves would go
    if high == n:
        return min(low + max(low - guess, 0) + 1, max(middle, low + 1))
    return max(high - max(guess - high, 0) - 1, min(middle, high - 1), 0)


def trial_run(answer: int, n: int, guess: int | None, check: bool) -> list[int]:
    """Members that a search tries in a family in which all from the answer on reach the value.

    Args:
        answer: the smallest member that does; n when none does.
        n: members there are.
        guess: where to begin.
        check: try the member above the answer.
    """
    tries: dict[int, list[bool]] = {}
    while (step := next_step(tries, n, guess, check)).wanted:
        for member, _ in step.wanted:
            tries.setdefault(member, []).append(member >= answer)
    return [member for member, found in tries.items() for _ in found]
