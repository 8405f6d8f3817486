"""Choosing the next token of each lane.

Chance comes in as one uniform number a lane, drawn from the dialogue's own generator, so that what
a dialogue samples does not depend on its neighbours in the batch.

How a generator uses this file, once a step::

    uniform = uniform_numbers(...) where sampler.random, any number for a lane that needs none
    tokens = choose(samplers, logits, uniform, histories)

- ``samplers``: one ``Sampler`` for all lanes, or a sequence with one a lane; lanes of equal samplers are
  chosen by one vectorised call.
- ``histories``: a ``History`` a lane (``History(lane.tokens, lane.roles, lane.prompt_length)``: the lists
  themselves, not copies). Only a sampler that ``needs_history`` looks at it (penalties, no-repeat
  n-grams, constraints), so None will do where no sampler needs it.
- A ``Sampler`` without history is also callable alone: ``sampler(logits, uniform)``.

``Sampling`` holds every option (``processors.py`` has a function for each); ``Sampling.process(logits,
histories)`` is the pure function from logits to logits whose softmax is what is drawn from, which lossless
speculation needs too. Log-probabilities that a dialogue reports are of the unprocessed logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation import processors
from toolmem.generation.turns import ASSISTANT

# Logits that a CPU works on at once: what a sampler makes on the way should stay in the cache.
CHUNK = 2**17


class History(NamedTuple):
    """What a lane holds so far.

    Args:
        tokens: of the whole dialogue.
        roles: role code of each.
        prompt_length: how many of them were given; the rest was written, or is a tool's answer.
    """

    tokens: Sequence[int]
    roles: Sequence[int]
    prompt_length: int

    def written(self) -> list[int]:
        """The tokens that the model wrote, in all turns."""
        new = zip(self.tokens[self.prompt_length :], self.roles[self.prompt_length :], strict=True)
        return [token for token, role in new if role == ASSISTANT]

    def turn(self) -> tuple[int, Sequence[int]]:
        """The number of the turn that is being written, from 0, and what stands in it already."""
        own = [role == ASSISTANT for role in self.roles[self.prompt_length :]]
        ends = [i for i in range(1, len(own)) if own[i - 1] and not own[i]]
        start = next((i for i in range(len(own), 0, -1) if not own[i - 1]), 0)
        return len(ends), self.tokens[self.prompt_length + start :]


class Constraint(Protocol):
    """Which tokens may come next."""

    def allowed(self, history: History) -> Tensor | None:
        """(vocab,) bool on the host, with at least one True; None when every token is allowed."""


class Sampler(Protocol):
    """How the next tokens are chosen. Hashable, equal where it chooses alike."""

    @property
    def random(self) -> bool:
        """Whether it needs the uniform numbers."""

    @property
    def needs_history(self) -> bool:
        """Whether it looks at the lanes' histories; a sampler may leave this out when it does not."""

    def __call__(
        self,
        logits: Tensor,
        uniform: Tensor | None = None,
        histories: Sequence[History] | None = None,
    ) -> Tensor:
        """Choose from (lanes, vocab) by (lanes,) numbers in [0, 1): (lanes,) int64."""


def greedy(logits: Tensor) -> Tensor:
    """The most probable token of each lane, the first of a tie: (lanes, vocab) to (lanes,)."""
    return logits.argmax(dim=-1)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample by inverting the cumulative distribution.

    Args:
        logits: (lanes, vocab).
        uniform: (lanes,) numbers in [0, 1).

    Returns:
        (lanes,) int64.
    """
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    # Below the total even where the product rounds up: else a token that is ruled out could be drawn.
    threshold = (uniform.to(cumulative)[:, None] * total).minimum(total.nextafter(-total))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


@dataclass(frozen=True)
class Greedy:
    """Always the most probable token."""

    random: bool = False
    needs_history: bool = False

    def __call__(
        self,
        logits: Tensor,
        uniform: Tensor | None = None,
        histories: Sequence[History] | None = None,
    ) -> Tensor:
        """Choose from (lanes, vocab): (lanes,) int64."""
        return greedy(logits)


@dataclass(frozen=True)
class Sampling:
    """Draw from the distribution that these options leave, applied in this order.

    Constraint, logit bias, repetition penalty, frequency and presence penalties, no-repeat n-grams,
    temperature, top-k, top-p, min-p, typical, epsilon, eta (transformers' order).

    Args:
        temperature: divides the logits; at 0 the most probable token is taken.
        top_k: keep the k most probable tokens; None for all.
        top_p: then keep the nucleus of this mass; None for all (arXiv 1904.09751).
        min_p: drop tokens less probable than this share of the best one's (arXiv 2407.01082).
        typical_p: keep the typical set of this mass (arXiv 2202.00666).
        epsilon_cutoff: drop tokens less probable than this (arXiv 2210.15191).
        eta_cutoff: the same, with less dropped of a flat distribution (arXiv 2210.15191).
        repetition_penalty: on tokens of the dialogue, prompt and answers included (arXiv 1909.05858).
        frequency_penalty: taken off a logit for each time that the model wrote the token.
        presence_penalty: taken off once if it did.
        no_repeat_ngram_size: no n-gram of this size comes twice in the dialogue; None for no such rule.
        logit_bias: added to the logits of these token ids.
        constraint: says which tokens may come next.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram_size: int | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        def check(key: str, right: bool, rule: str) -> None:
            if not right:
                raise ToolmemError(f"{key} is {getattr(self, key)}: it must be {rule}")

        finite = math.isfinite
        check("temperature", self.temperature >= 0 and finite(self.temperature), "0 or above")
        for key in ("top_k", "no_repeat_ngram_size"):
            value = getattr(self, key)
            check(key, value is None or value >= 1, "at least 1, or left out")
        for key in ("top_p", "typical_p"):
            value = getattr(self, key)
            check(key, value is None or 0 < value <= 1, "above 0 and at most 1")
        check("min_p", self.min_p is None or 0 <= self.min_p <= 1, "from 0 to 1")
        for key in ("epsilon_cutoff", "eta_cutoff"):
            value = getattr(self, key)
            check(key, value is None or 0 < value < 1, "between 0 and 1")
        penalty = self.repetition_penalty
        check("repetition_penalty", penalty > 0 and finite(penalty), "above 0 (1 for none)")
        for key in ("frequency_penalty", "presence_penalty"):
            check(key, finite(getattr(self, key)), "a finite number")
        biases = (self.logit_bias or {}).values()
        check("logit_bias", all(x < math.inf for x in biases), "numbers below infinity")

    @property
    def random(self) -> bool:
        """Whether it needs the uniform numbers."""
        return self.temperature > 0

    @property
    def needs_history(self) -> bool:
        """Whether it looks at the lanes' histories."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.no_repeat_ngram_size is not None
            or self.constraint is not None
        )

    def process(self, logits: Tensor, histories: Sequence[History] | None = None) -> Tensor:
        """The logits whose softmax is drawn from (at temperature 0: whose largest is taken).

        Args:
            logits: (lanes, vocab) float32.
            histories: one a lane; None will do unless ``needs_history``.
        """
        if self.constraint is not None:
            logits = constrain(logits, self.constraint, _needed(histories))
        if self.logit_bias:
            logits = processors.add_bias(logits, self.logit_bias)
        if self.repetition_penalty != 1:
            seen = processors.token_counts([h.tokens for h in _needed(histories)], logits) > 0
            logits = processors.penalise_repetition(logits, seen, self.repetition_penalty)
        if self.frequency_penalty or self.presence_penalty:
            counts = processors.token_counts([h.written() for h in _needed(histories)], logits)
            logits = processors.penalise_frequency(
                logits, counts, self.frequency_penalty, self.presence_penalty
            )
        if self.no_repeat_ngram_size is not None:
            logits = processors.forbid_repeated_ngrams(
                logits, [h.tokens for h in _needed(histories)], self.no_repeat_ngram_size
            )
        return self._truncate(logits / self.temperature) if self.temperature else logits

    def _truncate(self, logits: Tensor) -> Tensor:
        if self.top_k is not None:
            logits = processors.keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = processors.keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = processors.keep_min_p(logits, self.min_p)
        if self.typical_p is not None:
            logits = processors.keep_typical(logits, self.typical_p)
        if self.epsilon_cutoff is not None:
            logits = processors.keep_epsilon(logits, self.epsilon_cutoff)
        if self.eta_cutoff is not None:
            logits = processors.keep_eta(logits, self.eta_cutoff)
        return logits

    def __call__(
        self,
        logits: Tensor,
        uniform: Tensor | None = None,
        histories: Sequence[History] | None = None,
    ) -> Tensor:
        """Choose from (lanes, vocab) by (lanes,) numbers in [0, 1): (lanes,) int64."""
        logits = self.process(logits, histories)
        if not self.random:
            return greedy(logits)
        assert uniform is not None, "a random sampler needs uniform numbers"
        return draw(logits, uniform)


def constrain(logits: Tensor, constraint: Constraint, histories: Sequence[History]) -> Tensor:
    """``logits`` (lanes, vocab) at -inf where the constraint does not allow a token."""
    allowed = torch.zeros(logits.shape, dtype=torch.bool)  # a head may be wider than the vocabulary
    for lane, history in enumerate(histories):
        mask = constraint.allowed(history)
        allowed[lane, : None if mask is None else len(mask)] = True if mask is None else mask
    return logits.masked_fill(~allowed.to(logits.device), -torch.inf)


def choose(
    samplers: Sampler | Sequence[Sampler],
    logits: Tensor,
    uniform: Tensor | None = None,
    histories: Sequence[History] | None = None,
) -> Tensor:
    """The next token of each lane, each by its own sampler.

    Args:
        samplers: one for all lanes, or one a lane; lanes of equal samplers share one call.
        logits: (lanes, vocab) float32.
        uniform: (lanes,) numbers in [0, 1); None when no sampler is random.
        histories: one a lane; None when no sampler needs them.

    Returns:
        (lanes,) int64.
    """
    if not isinstance(samplers, Sequence):
        return _call(samplers, logits, uniform, histories)
    groups: dict[Sampler, list[int]] = {}
    for lane, sampler in enumerate(samplers):
        groups.setdefault(sampler, []).append(lane)
    if len(groups) == 1:
        return _call(samplers[0], logits, uniform, histories)
    chosen = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for sampler, lanes in groups.items():
        rows = torch.tensor(lanes, device=logits.device)
        numbers = None if uniform is None else uniform[rows.to(uniform.device)]
        theirs = None if histories is None else [histories[lane] for lane in lanes]
        chosen[rows] = _call(sampler, logits[rows], numbers, theirs)
    return chosen


def _call(
    sampler: Sampler,
    logits: Tensor,
    uniform: Tensor | None,
    histories: Sequence[History] | None,
) -> Tensor:
    at_once = max(1, len(logits))
    if logits.device.type == "cpu":
        at_once = max(1, CHUNK // logits.shape[-1])
    chosen = []
    for start in range(0, max(1, len(logits)), at_once):
        rows = slice(start, start + at_once)
        numbers = None if uniform is None else uniform[rows]
        if getattr(sampler, "needs_history", False):
            chosen.append(sampler(logits[rows], numbers, _needed(histories)[rows]))
        else:
            chosen.append(sampler(logits[rows], numbers))
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen)


def _needed(histories: Sequence[History] | None) -> Sequence[History]:
    assert histories is not None, "this sampler needs the lanes' histories"
    return histories


def top_log_probs(logits: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n most probable tokens of each lane and their log-probabilities, best first.

    Args:
        logits: (lanes, vocab), not processed.
        n: how many; at most the vocabulary's.

    Returns:
        ids (lanes, n) int64 and log-probabilities (lanes, n) in nats.
    """
    best = logits.float().log_softmax(dim=-1).topk(min(n, logits.shape[-1]), dim=-1)
    return best.indices, best.values


def uniform_numbers(generators: list[torch.Generator]) -> Tensor:
    """One number in [0, 1) of each dialogue's generator: (lanes,) float64."""
    return torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
