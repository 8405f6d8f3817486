"""Search instead of chance: beam search, diverse beam search, and the best of several samples.

The beams are lanes of one cache; after each step ``cache.gather`` puts every beam's state behind its
parent's, whatever the architecture keeps.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.reference import check_prompt, evaluating, foreign_spans
from toolmem.generation.sampling import History, Sampling
from toolmem.generation.turns import ASSISTANT, USER

if TYPE_CHECKING:
    from toolmem.generation.reference import Generated
    from toolmem.models.cache import Cache
    from toolmem.models.language_model import LanguageModel


@dataclass(frozen=True)
class Hypothesis:
    """A continuation that a search found.

    Args:
        tokens: what follows the prompt, a stop token included.
        log_probs: the model's own log-probability of each, in nats.
        score: what the search ranks by.
        stopped: whether it ends with a stop token; else its length ended it.
        group: of diverse beam search, from 0.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    score: float
    stopped: bool
    group: int = 0

    @property
    def log_prob(self) -> float:
        """The model's log-probability of the whole continuation, in nats."""
        return sum(self.log_probs)


@dataclass(frozen=True)
class _Beam:
    """A continuation under way.

    Args:
        tokens: so far.
        log_probs: of each.
        total: the sum of its steps' scores.
        lane: of the cache, where what its tokens but the last left behind is kept.
    """

    tokens: tuple[int, ...] = ()
    log_probs: tuple[float, ...] = ()
    total: float = 0.0
    lane: int = 0


@torch.no_grad()
def beam_search(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    n_beams: int = 4,
    max_new_tokens: int = 128,
    stop_tokens: Collection[int] = (),
    n_best: int | None = None,
    length_penalty: float = 1.0,
    n_groups: int = 1,
    diversity: float = 0.0,
    options: Sampling | None = None,
    roles: Sequence[int] | None = None,
) -> list[Hypothesis]:
    """The most probable continuations of a prompt that a beam finds; no tool is called.

    A step keeps, of all one-token continuations of the beams, the ``n_beams`` best that go on; those
    that stop are set aside when they are among the ``n_beams`` best of all. The search ends when no
    beam can still overtake what was set aside. With ``n_groups`` above 1 it is diverse beam search
    (arXiv 1610.02424, Hamming diversity): the groups choose one after the other, and a token costs
    ``diversity`` more for each beam of an earlier group that chose it in this step; that cost steers
    the choice of this step only.

    Args:
        model: on any device; its mode is put back.
        prompt: token ids.
        n_beams: beams, over all groups.
        max_new_tokens: longest continuation; the model's ``max_seq_len`` bounds it too.
        stop_tokens: ids that end a continuation (``<|end|>``, or ``<|database|>`` for a query).
        n_best: how many to return, at most ``n_beams``; None for that many.
        length_penalty: a continuation's score is its log-probability divided by its length to this
            power: 0 ranks by the sum, 1 by the mean.
        n_groups: divides ``n_beams``.
        diversity: cost in nats, 0 or above.
        options: what they do to a step's log-probabilities (constraint, penalties, ...) counts in the
            score; None for the model's own.
        roles: role code of each of the prompt's tokens; only a model of ``attention_mask: prefix``
            needs them.

    Returns:
        distinct hypotheses, best first; with groups the best of each group in turn. Fewer than
        ``n_best`` when there are no more.

    Raises:
        ToolmemError: for options that make no sense, or a prompt that the model cannot take.
    """
    n_best = n_beams if n_best is None else n_best
    _check(n_beams, max_new_tokens, n_best, n_groups, diversity)
    longest = min(max_new_tokens, model.max_seq_len - len(prompt))
    stops = frozenset(stop_tokens)
    width = n_beams // n_groups
    running = [[_Beam()] for _ in range(n_groups)]  # each group's beams; one at first
    done: list[list[Hypothesis]] = [[] for _ in range(n_groups)]
    with evaluating(model):
        cache, hidden = read_prompt(model, prompt, longest, roles)
        hidden = hidden[:, -1].expand(n_groups, -1)
        cache.gather(torch.zeros(n_groups, dtype=torch.int64, device=cache.device))
        for length in range(1, longest + 1):
            beams = [beam for group in running for beam in group]
            if not beams:
                break
            if length > 1:
                cache.gather(torch.tensor([beam.lane for beam in beams], device=cache.device))
                last = torch.tensor([[beam.tokens[-1]] for beam in beams], device=cache.device)
                hidden = model.hidden(last, cache=cache)[:, -1]
            log_probs = model.logits(hidden).float().log_softmax(dim=-1)
            steps = log_probs if options is None else _processed(options, log_probs, prompt, beams)
            falling = bool((steps <= 0).all())  # else an option may still lift any beam
            used = torch.zeros(steps.shape[-1], device=steps.device)
            lane = 0
            for index, group in enumerate(running):
                rows = slice(lane, lane + len(group))
                cost = diversity * used
                grown = _grow(group, lane, steps[rows], log_probs[rows], cost, width, stops)
                lane += len(group)
                running[index] = [beam for beam in grown if beam.tokens[-1] not in stops]
                ended = [beam for beam in grown if beam.tokens[-1] in stops]
                for beam in grown:
                    used[beam.tokens[-1]] += 1
                if length == longest:
                    ended = grown
                new = [_hypothesis(beam, length_penalty, stops, index) for beam in ended]
                done[index] = sorted(done[index] + new, key=lambda x: -x.score)[:width]
                reach = _reach(running[index], length, longest, length_penalty)
                if falling and len(done[index]) == width and reach <= done[index][-1].score:
                    running[index] = []
    return _distinct(done, n_best)


def _grow(
    group: list[_Beam],
    lane: int,
    steps: Tensor,
    log_probs: Tensor,
    cost: Tensor,
    width: int,
    stops: frozenset[int],
) -> list[_Beam]:
    """A group's next beams, best first: up to ``width`` that go on, and those that stop.

    Args:
        group: its beams.
        lane: of the group's first beam.
        steps: (beams, vocab), what a token adds to the beam's total.
        log_probs: (beams, vocab), the model's own.
        cost: (vocab,), taken off for the choice only.
        width: how many may go on; a beam that stops must be among the first so many.
        stops: tokens that end a beam.
    """
    totals = torch.tensor([[beam.total] for beam in group]).to(steps) + steps
    ranked = (totals - cost).flatten()
    # As many as are needed for ``width`` that go on if every beam's stop tokens come first.
    best = ranked.topk(min(ranked.numel(), (1 + len(stops)) * width))
    rows, tokens = best.indices // totals.shape[-1], best.indices % totals.shape[-1]
    grown: list[_Beam] = []
    room = width
    for rank, (value, row, token, total, log_prob) in enumerate(
        zip(
            best.values.tolist(),
            rows.tolist(),
            tokens.tolist(),
            totals[rows, tokens].tolist(),
            log_probs[rows, tokens].tolist(),
            strict=True,
        )
    ):
        if value == -torch.inf or room == 0:
            break
        if token in stops and rank >= width:
            continue
        room -= token not in stops
        old = group[row]
        grown.append(_Beam((*old.tokens, token), (*old.log_probs, log_prob), total, lane + row))
    return grown


def _hypothesis(
    beam: _Beam, length_penalty: float, stops: frozenset[int], group: int
) -> Hypothesis:
    score = beam.total / len(beam.tokens) ** length_penalty
    return Hypothesis(beam.tokens, beam.log_probs, score, beam.tokens[-1] in stops, group)


def _reach(running: list[_Beam], length: int, longest: int, length_penalty: float) -> float:
    """The best score that these beams can still come to when every step takes something away."""
    best = max((beam.total for beam in running), default=-torch.inf)
    return max(best / (length + 1) ** length_penalty, best / longest**length_penalty)


def _processed(
    options: Sampling, log_probs: Tensor, prompt: Sequence[int], beams: list[_Beam]
) -> Tensor:
    given = [USER] * len(prompt)  # whose they were is not asked: they were given
    histories = [
        History([*prompt, *beam.tokens], given + [ASSISTANT] * len(beam.tokens), len(prompt))
        for beam in beams
    ]
    return options.process(log_probs, histories)


def _distinct(groups: list[list[Hypothesis]], n_best: int) -> list[Hypothesis]:
    """The best of each group in turn, each continuation once."""
    best: dict[tuple[int, ...], Hypothesis] = {}
    for place in range(max(map(len, groups))):
        row = [group[place] for group in groups if place < len(group)]
        for hypothesis in sorted(row, key=lambda x: -x.score):
            best.setdefault(hypothesis.tokens, hypothesis)
    return list(best.values())[:n_best]


def read_prompt(
    model: LanguageModel,
    prompt: Sequence[int],
    max_new_tokens: int,
    roles: Sequence[int] | None,
) -> tuple[Cache, Tensor]:
    """Read a prompt into a cache of one lane.

    Args:
        model: reads it.
        prompt: token ids.
        max_new_tokens: that will follow.
        roles: role code of each token; needed where ``attention_mask`` is ``prefix``.

    Returns:
        the cache, and what the head reads at each token, (1, seq, dim).

    Raises:
        ToolmemError: for a prompt that the model cannot take.
    """
    check_prompt(model, prompt)
    cache = model.new_cache(1, len(prompt) + max(0, max_new_tokens))
    spans = None
    if model.attention_mask == "prefix":
        if roles is None or len(roles) != len(prompt):
            raise ToolmemError(
                "this model looks both ways within each turn: give `roles`, the role code of each "
                "of the prompt's tokens (toolmem.generation.reference.token_roles makes them)"
            )
        spans = torch.tensor([foreign_spans(roles)], device=cache.device)
    tokens = torch.tensor([list(prompt)], device=cache.device)
    return cache, model.hidden(tokens, cache=cache, spans=spans)


def _check(n_beams: int, max_new_tokens: int, n_best: int, n_groups: int, diversity: float) -> None:
    if n_beams < 1:
        raise ToolmemError(f"n_beams is {n_beams}: it must be at least 1")
    if max_new_tokens < 1:
        raise ToolmemError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    if not 1 <= n_best <= n_beams:
        raise ToolmemError(f"n_best is {n_best}: it must be from 1 to n_beams ({n_beams})")
    if n_groups < 1 or n_beams % n_groups:
        raise ToolmemError(f"n_groups is {n_groups}: it must divide n_beams ({n_beams})")
    if not diversity >= 0:
        raise ToolmemError(f"diversity is {diversity}: it must be 0 or above")
    if diversity and n_groups == 1:
        raise ToolmemError("diversity acts between groups: set n_groups above 1")


def n_best(
    dialogues: Sequence[Generated], n: int, *, length_penalty: float = 0.0
) -> list[tuple[Generated, float]]:
    """The n best of several finished dialogues, samples of one prompt mostly.

    Args:
        dialogues: with tools or without; of those with equal tokens one counts.
        n: at least 1.
        length_penalty: the score is the log-probability of what the model wrote, divided by the
            number of tokens that it wrote to this power: 0 ranks by the sum, 1 by the mean.

    Returns:
        dialogues with their scores, best first; fewer when there are no more.
    """
    if n < 1:
        raise ToolmemError(f"n is {n}: it must be at least 1")
    scored: dict[tuple[int, ...], tuple[Generated, float]] = {}
    for dialogue in dialogues:
        own = [x for x in dialogue.log_probs if x == x]  # nan: the model did not write it
        score = sum(own) / max(1, len(own)) ** length_penalty
        scored.setdefault(tuple(dialogue.tokens), (dialogue, score))
    return sorted(scored.values(), key=lambda pair: -pair[1])[:n]
