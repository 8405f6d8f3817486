"""Dialogues that a model had, as training data: who wrote each token, how likely it was, what it earned.

Nothing here is tokenised again. Which tokens the model is answerable for is read from the roles that
generation kept: those of the assistant after the prompt. What the user asked and what a tool answered
is context, and bears no loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolmem.data.batch import Batch
from toolmem.generation import Generated
from toolmem.generation.reference import foreign_spans
from toolmem.generation.turns import ASSISTANT

EPSILON = 1e-6  # added to a group's standard deviation, as in the authors' later code


@dataclass(kw_only=True)
class Rollouts(Batch):
    """Sampled dialogues, one a row; ``loss_mask`` is True where the model sampled the target.

    Args:
        log_probs: (batch, seq) float32, each sampled target's log-probability when it was sampled
            (nats), 0 elsewhere.
        advantages: (batch, seq) float32, of each sampled target, 0 elsewhere.
        reference: (batch, seq) float32, ``log_probs`` under the reference model; None without one.
        counts: (batch,) int64, sampled tokens of each dialogue.
    """

    log_probs: Tensor
    advantages: Tensor
    reference: Tensor | None = None
    counts: Tensor

    def take(self, rows: Tensor) -> Rollouts:
        """Some of the dialogues, in rows no longer than they need.

        Args:
            rows: (n,) int64, at least one.
        """
        assert self.lengths is not None
        lengths = self.lengths[rows]
        width = int(lengths.max())

        def cut(tensor: Tensor) -> Tensor:
            return tensor[rows, :width]

        return replace(
            self,
            tokens=cut(self.tokens),
            targets=cut(self.targets),
            loss_mask=cut(self.loss_mask),
            spans=None if self.spans is None else cut(self.spans),
            log_probs=cut(self.log_probs),
            advantages=cut(self.advantages),
            reference=None if self.reference is None else cut(self.reference),
            counts=self.counts[rows],
            n_tokens=int(lengths.sum()),
            lengths=lengths,
            loss_positions=None,
        )


def gather(
    dialogues: Sequence[Generated],
    advantages: Tensor,
    *,
    with_spans: bool = False,
    device: torch.device | str = "cpu",
    state: dict[str, int] | None = None,
) -> Rollouts:
    """Generated dialogues as a batch, padded on the right.

    Args:
        dialogues: at least one.
        advantages: (dialogues, turns): of what the assistant writes before its first tool call, between
            the first and the second, ...; of the last turn also for all later ones.
        with_spans: number the spans that the assistant did not write, for models that look both ways
            within them.
        device: where to put it.
        state: where the loader of the prompts stands after them.
    """
    width = max(len(dialogue.tokens) for dialogue in dialogues)
    shape = (len(dialogues), width)
    tokens, spans = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
    sampled = torch.zeros(shape, dtype=torch.bool)
    turns = torch.zeros(shape, dtype=torch.int64)
    log_probs = torch.zeros(shape)
    for row, dialogue in enumerate(dialogues):
        length, start = len(dialogue.tokens), dialogue.prompt_length
        tokens[row, :length] = torch.tensor(dialogue.tokens)
        sampled[row, start:length] = torch.tensor(dialogue.roles[start:]) == ASSISTANT
        log_probs[row, :length] = torch.tensor(dialogue.log_probs)
        # A turn begins where the assistant goes on after somebody else.
        own = sampled[row]
        turns[row, 1:] = (own[1:] & ~own[:-1]).cumsum(0) - 1
        if with_spans:
            spans[row, :length] = torch.tensor(foreign_spans(dialogue.roles))
    log_probs = log_probs.where(sampled, torch.zeros(()))
    assert not log_probs.isnan().any(), "a sampled token without its log-probability"
    # The last token is only a target; a shorter dialogue's last one stays as an input without loss.
    lengths = torch.tensor([len(dialogue.tokens) - 1 for dialogue in dialogues])
    turns = turns.clamp(0, advantages.shape[1] - 1)
    of_tokens = advantages.gather(1, turns).float().where(sampled, torch.zeros(()))
    return Rollouts(
        tokens=tokens[:, :-1].to(device),
        targets=tokens[:, 1:].to(device),
        loss_mask=sampled[:, 1:].to(device),
        spans=spans[:, :-1].to(device) if with_spans else None,
        n_tokens=int(lengths.sum()),
        lengths=lengths,
        state=state or {},
        log_probs=log_probs[:, 1:].to(device),
        advantages=of_tokens[:, 1:].to(device),
        counts=sampled[:, 1:].sum(1).to(device),
    )


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """How much better each sample is than the others of its prompt (arXiv 2402.03300, 4.1.2).

    Args:
        rewards: (prompts, samples).
        scale: divide by the group's standard deviation; without it, arXiv 2503.20783.

    Returns:
        (prompts, samples): 0 where all samples of a prompt earned the same.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not scale:
        return centred
    return centred / (rewards.std(dim=1, correction=0, keepdim=True) + EPSILON)


def turn_advantages(
    rewards: Tensor, answers: Sequence[Sequence[Sequence[str]]], scale: bool = True
) -> Tensor:
    """Advantages of each turn among the samples that stood at the same place when it began.

    What is written after a tool's answer is compared with what other samples of the question made of
    the same answers (step-level groups at anchor states, arXiv 2505.10978): a conclusion from a wrong
    answer is neither praised nor blamed, since none could be right; the query before it is.

    Args:
        rewards: (prompts, samples).
        answers: of each prompt's samples, what the tools said, in order.
        scale: as of ``group_advantages``.

    Returns:
        (prompts, samples, turns): 0 where all samples at a place earned the same, or there is but one.
    """
    n_turns = 1 + max((len(said) for group in answers for said in group), default=0)
    found = torch.zeros(*rewards.shape, n_turns, dtype=rewards.dtype)
    for prompt, group in enumerate(answers):
        for turn in range(n_turns):
            places: dict[tuple[str, ...], list[int]] = {}
            for sample, said in enumerate(group):
                if len(said) >= turn:
                    places.setdefault(tuple(said[:turn]), []).append(sample)
            for samples in places.values():
                earned = rewards[prompt, samples][None]
                found[prompt, samples, turn] = group_advantages(earned, scale)[0]
    return found


def policy_losses(
    log_probs: Tensor, sampled: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of each token, to be minimised (arXiv 1707.06347, eq. 7).

    Args:
        log_probs: (tokens,) under the model as it is.
        sampled: (tokens,) under the model that sampled them.
        advantages: (tokens,).
        low: the ratio of the two counts from 1 - low ...
        high: ... to 1 + high; beyond, in the direction of the advantage, a token has no gradient.

    Returns:
        (tokens,) losses, and (tokens,) bool, where the ratio was clipped.
    """
    ratio = (log_probs - sampled).exp()
    plain, clipped = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


def kl_estimates(log_probs: Tensor, reference: Tensor) -> Tensor:
    """An unbiased estimate of KL(model || reference), never negative, at each sampled token.

    The third of Schulman's (http://joschu.net/blog/kl-approx.html), eq. 4 of arXiv 2402.03300.

    Args:
        log_probs: (tokens,) under the model, which sampled them.
        reference: (tokens,) under the reference.
    """
    difference = reference - log_probs
    return difference.exp() - difference - 1
