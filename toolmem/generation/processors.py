"""What may change the next token's distribution: pure functions on logits (lanes, vocab).

A token that is ruled out gets -inf. No function here rules out all of a lane's tokens: the most probable
one stays, and a ban that would leave nothing is not applied to that lane. ``docs/sampling.md`` has the
formulas in a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """``logits`` (lanes, vocab) with all but the k largest of each lane at -inf; ties are kept.

    arXiv 1805.04833.
    """
    smallest = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """``logits`` (lanes, vocab) with all but each lane's nucleus at -inf (arXiv 1904.09751).

    The nucleus is the smallest set of most probable tokens whose probabilities sum to ``p`` or
    more.
    """
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= p)
    return logits.masked_fill(outside, -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """``logits`` (lanes, vocab) without tokens less probable than ``p`` times the most probable one.

    arXiv 2407.01082.
    """
    probabilities = logits.softmax(dim=-1)
    least = p * probabilities.amax(dim=-1, keepdim=True)
    return logits.masked_fill(probabilities < least, -torch.inf)


def keep_typical(logits: Tensor, p: float) -> Tensor:
    """``logits`` (lanes, vocab) with all but each lane's typical set at -inf (arXiv 2202.00666).

    The typical set is the smallest set, of mass ``p`` or more, of tokens whose surprise (-log
    probability) is nearest to the distribution's entropy; ties at its border are kept.
    """
    log_probs = logits.log_softmax(dim=-1)
    distance = (-log_probs - entropy(log_probs)).abs()
    ordered, order = distance.sort(dim=-1, stable=True)
    mass = log_probs.exp().gather(-1, order).cumsum(dim=-1)
    last = (mass < p).sum(dim=-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return logits.masked_fill(distance > ordered.gather(-1, last), -torch.inf)


def keep_epsilon(logits: Tensor, epsilon: float) -> Tensor:
    """``logits`` (lanes, vocab) without tokens less probable than ``epsilon`` (arXiv 2210.15191)."""
    return _keep_above(logits, torch.full_like(logits[:, :1], epsilon))


def keep_eta(logits: Tensor, epsilon: float) -> Tensor:
    """``logits`` (lanes, vocab) without tokens less probable than eta (arXiv 2210.15191).

    eta = min(epsilon, sqrt(epsilon) exp(-entropy)): a flat distribution keeps more of its tail.
    """
    spread = entropy(logits.log_softmax(dim=-1))
    return _keep_above(logits, (epsilon**0.5 * (-spread).exp()).clamp(max=epsilon))


def _keep_above(logits: Tensor, least: Tensor) -> Tensor:
    """The tokens of probability ``least`` (lanes, 1) or more, and always the most probable one."""
    best = logits.amax(dim=-1, keepdim=True)
    outside = (logits.softmax(dim=-1) < least) & (logits < best)
    return logits.masked_fill(outside, -torch.inf)


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy in nats of each lane, from (lanes, vocab), -inf allowed: (lanes, 1)."""
    return -(log_probs.exp() * log_probs).nansum(dim=-1, keepdim=True)


def token_counts(histories: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """How often each token stands in each lane's history.

    Args:
        histories: token ids of each lane, of any lengths.
        like: (lanes, vocab), whose shape and device are taken.

    Returns:
        (lanes, vocab) int32.
    """
    lengths = torch.tensor([len(history) for history in histories], dtype=torch.int64)
    lanes = torch.arange(len(histories)).repeat_interleave(lengths)
    tokens = torch.tensor([token for history in histories for token in history], dtype=torch.int64)
    counts = torch.zeros(like.shape, dtype=torch.int32)
    ones = torch.ones(len(tokens), dtype=torch.int32)
    return counts.index_put_((lanes, tokens), ones, accumulate=True).to(like.device)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Push tokens that were seen towards less probable (CTRL, arXiv 1909.05858).

    Args:
        logits: (lanes, vocab); of a seen token, a positive one is divided by the penalty and a
            negative one multiplied.
        seen: (lanes, vocab) bool.
        penalty: above 0; above 1 discourages, below 1 encourages.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def penalise_frequency(logits: Tensor, counts: Tensor, frequency: float, presence: float) -> Tensor:
    """Subtract ``frequency`` for each time a token was written, and ``presence`` once (OpenAI's API).

    Args:
        logits: (lanes, vocab).
        counts: (lanes, vocab) integers, how often each token was written.
        frequency: taken off for each time.
        presence: taken off once.
    """
    return logits - frequency * counts - presence * (counts > 0)


def forbid_repeated_ngrams(logits: Tensor, histories: Sequence[Sequence[int]], n: int) -> Tensor:
    """Rule out tokens that would end an n-gram that is in the history already (arXiv 1705.04304).

    Args:
        logits: (lanes, vocab); a lane of which nothing would be left stays as it is.
        histories: token ids of each lane.
        n: tokens of an n-gram, 1 or more.
    """
    longest = max(map(len, histories))
    if longest < n:
        return logits
    padded = np.full((len(histories), longest), -1)  # on the left: all end in the last column
    for lane, history in enumerate(histories):
        padded[lane, longest - len(history) :] = history
    grams = torch.from_numpy(padded).unfold(1, n, 1)
    # A prefix with padding in it is a whole history, which nothing has followed yet.
    prefix = grams[:, -1, 1:]
    same = (grams[..., :-1] == prefix[:, None]).all(dim=-1) & (grams[..., -1] >= 0)
    lanes, places = same.nonzero(as_tuple=True)
    banned = torch.zeros(logits.shape, dtype=torch.bool)
    banned[lanes, grams[lanes, places, -1]] = True
    return rule_out(logits, banned.to(logits.device))


def rule_out(logits: Tensor, banned: Tensor) -> Tensor:
    """``logits`` (lanes, vocab) at -inf where ``banned`` (lanes, vocab) bool, unless nothing is left."""
    rest = logits.masked_fill(banned, -torch.inf)
    return torch.where(rest.isneginf().all(dim=-1, keepdim=True), logits, rest)


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Add to the logits (lanes, vocab) of some tokens; -inf rules a token out.

    Raises:
        ToolmemError: for a token outside the vocabulary.
    """
    vocab_size = logits.shape[-1]
    for token in bias:
        if not 0 <= token < vocab_size:
            raise ToolmemError(
                f"logit_bias names token {token}: the vocabulary has ids from 0 to {vocab_size - 1}"
            )
    added = torch.zeros_like(logits[:1])
    added[0, list(bias)] = torch.tensor(list(bias.values())).to(added)
    return rule_out(logits + added.nan_to_num(neginf=0.0), added.isneginf().expand_as(logits))
