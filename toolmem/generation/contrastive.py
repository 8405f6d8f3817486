"""Contrastive search: likely tokens that do not bring the model back to where it has been."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.beam import Hypothesis, read_prompt
from toolmem.generation.reference import evaluating

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


def contrastive_scores(
    probabilities: Tensor, candidates: Tensor, context: Tensor, alpha: float
) -> Tensor:
    """(1 - alpha) p(v) - alpha max_j cos(h_v, h_j), for each candidate v (arXiv 2202.06417).

    Args:
        probabilities: (k,), the model's.
        candidates: (k, dim), the hidden state after each candidate.
        context: (seq, dim), the hidden states so far.
        alpha: weight of the likeness that is to be avoided, from 0 to 1.

    Returns:
        (k,).
    """
    likeness = F.normalize(candidates.float(), dim=-1) @ F.normalize(context.float(), dim=-1).T
    return (1 - alpha) * probabilities - alpha * likeness.amax(dim=-1)


@torch.no_grad()
def contrastive_search(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    k: int = 4,
    alpha: float = 0.6,
    max_new_tokens: int = 128,
    stop_tokens: Collection[int] = (),
    roles: Sequence[int] | None = None,
) -> Hypothesis:
    """Continue a prompt by contrastive search (arXiv 2202.06417); no tool is called.

    Each step runs the k most probable tokens as k lanes of the cache and keeps the lane that scores
    best by ``contrastive_scores``; hidden states are what the head reads.

    Args:
        model: on any device; its mode is put back.
        prompt: token ids.
        k: candidates a step.
        alpha: 0 is greedy choice; towards 1 repetition is avoided at any price.
        max_new_tokens: longest continuation; the model's ``max_seq_len`` bounds it too.
        stop_tokens: ids that end it.
        roles: role code of each of the prompt's tokens; only a model of ``attention_mask: prefix``
            needs them.

    Returns:
        the continuation; its score is the sum of the steps'.

    Raises:
        ToolmemError: for options that make no sense, or a prompt that the model cannot take.
    """
    if k < 1:
        raise ToolmemError(f"k is {k}: it must be at least 1")
    if not 0 <= alpha <= 1:
        raise ToolmemError(f"alpha is {alpha}: it must be from 0 to 1")
    if max_new_tokens < 1:
        raise ToolmemError(f"max_new_tokens is {max_new_tokens}: it must be at least 1")
    longest = min(max_new_tokens, model.max_seq_len - len(prompt))
    tokens: list[int] = []
    log_probs: list[float] = []
    total = 0.0
    with evaluating(model):
        cache, hidden = read_prompt(model, prompt, longest, roles)
        context = hidden[0]
        while len(tokens) < longest and not (tokens and tokens[-1] in stop_tokens):
            best = (
                model.logits(context[-1]).float().log_softmax(dim=-1).topk(min(k, model.vocab_size))
            )
            cache.gather(torch.zeros(len(best.indices), dtype=torch.int64, device=cache.device))
            after = model.hidden(best.indices[:, None], cache=cache)[:, -1]
            scores = contrastive_scores(best.values.exp(), after, context, alpha)
            chosen = scores.argmax()
            cache.gather(chosen[None])
            context = torch.cat((context, after[chosen][None]))
            tokens.append(int(best.indices[chosen]))
            log_probs.append(float(best.values[chosen]))
            total += float(scores[chosen])
    stopped = bool(tokens) and tokens[-1] in stop_tokens
    return Hypothesis(tuple(tokens), tuple(log_probs), total, stopped)
