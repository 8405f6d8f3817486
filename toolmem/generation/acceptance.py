"""How drafts fare, and how long the next ones are to be."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolmem.generation.lanes import Lane
    from toolmem.generation.planning import DraftCosts


class Acceptance:
    """Learns how often a lane's drafted tokens are right, and drafts as many as pay.

    The d-th token of a draft is right with about p^d, where p is how often one behind right ones is, and
    then saves its lane a pass. So it is drafted where p^d is at least what it costs, if all together save
    more than the draft itself costs. A lane begins with what the others' drafts have shown; one whose
    drafts do not pay tries a token now and then.

    Args:
        max_tokens: the longest path.
    """

    PATIENCE = 8  # passes without drafts between two tries, where they do not pay
    MEMORY = 0.97  # what a token leaves of what was learned before it, for a lane
    SHARED_MEMORY = 0.995  # and for what a new lane begins with
    BEST = 0.95  # drafts that are right more often are not reckoned with
    BEGIN = 2.0  # tokens that this counts for

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.counts: Counter[tuple[int, int]] = Counter()  # (path's length, tokens right): passes
        self._right, self._tried = 2.8, 4.0  # of all lanes, fading

    def may_pay(self, costs: DraftCosts) -> bool:
        """Whether drafts can be worth what they cost at all."""
        return any(self._gain(self.BEST, n, costs) > 0 for n in range(1, self.max_tokens + 1))

    def limit(self, lane: Lane, costs: DraftCosts) -> int:
        """The longest path to draft for a lane now.

        Args:
            lane: that is to write.
            costs: of drafts now (``planning.draft_costs``).
        """
        limit = 0
        right = self._rate(lane)
        if costs.token < 1 and right > 0:
            limit = self.max_tokens
            if right < 1:
                limit = min(limit, int(math.log(costs.token) / math.log(right)))
        if limit and self._gain(right, limit, costs) > 0:
            return limit
        lane.draft_pause += 1
        if lane.draft_pause < self.PATIENCE:
            return 0
        lane.draft_pause = 0
        return 1

    @staticmethod
    def _gain(right: float, n: int, costs: DraftCosts) -> float:
        """Passes that a draft of n tokens saves, less its costs."""
        saved = n if right == 1 else right * (1 - right**n) / (1 - right)
        return saved - costs.lane - n * costs.token

    def _rate(self, lane: Lane) -> float:
        if lane.drafted is None:
            lane.drafted = (self.BEGIN * self._right / self._tried, self.BEGIN)
        right, tried = lane.drafted
        return right / tried

    def note(self, lane: Lane, drafted: int, right: int) -> None:
        """Learn from one pass.

        Args:
            lane: whose.
            drafted: tokens of the longest path; 0 tells nothing.
            right: that were accepted.
        """
        if not drafted:
            return
        self.counts[drafted, right] += 1
        self._rate(lane)
        assert lane.drafted is not None
        tried = right + (right < drafted)  # behind a wrong one nothing is learned
        keep, shared = self.MEMORY**tried, self.SHARED_MEMORY**tried
        lane.drafted = (keep * lane.drafted[0] + right, keep * lane.drafted[1] + tried)
        self._right = shared * self._right + right
        self._tried = shared * self._tried + tried

    def histogram(self) -> dict[str, object]:
        """Plain data: passes by length of path and tokens accepted, and tokens per pass."""
        passes = sum(self.counts.values())
        accepted = sum(right * n for (_, right), n in self.counts.items())
        return {
            "passes": passes,
            "accepted": accepted,
            "tokens_per_pass": 1 + accepted / passes if passes else 1.0,
            "by_length": {
                str(drafted): {
                    str(right): n
                    for (other, right), n in sorted(self.counts.items())
                    if other == drafted
                }
                for drafted in sorted({drafted for drafted, _ in self.counts})
            },
        }
