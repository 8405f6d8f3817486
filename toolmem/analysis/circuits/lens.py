"""Logit lens: what a model would say if it stopped after a layer.

Shapes: b batch, s seq, v vocab.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolmem.analysis.circuits.hooks import record
from toolmem.models import LanguageModel


class Reading(NamedTuple):
    """What is said of the right next token after a layer.

    Args:
        log_probs: (b, s) natural logarithms of its probability.
        ranks: (b, s) int64, how many tokens are likelier: 0 for the likeliest.
    """

    log_probs: Tensor
    ranks: Tensor


def lens_points(model: LanguageModel) -> list[str]:
    """Where the stream is read: what enters the first block, and what leaves each."""
    return ["embedding", *(f"blocks.{index}.output" for index in range(len(model.blocks)))]


@torch.no_grad()
def logit_lens(model: LanguageModel, tokens: Tensor, **told: Any) -> dict[str, Tensor]:
    """The stream at each point, through the last norm and the head, (b, s, v) by point.

    Args:
        model: any architecture.
        tokens: (b, s) int64.
        **told: what else its forward takes.
    """
    found = record(model, tokens, lens_points(model), **told)
    return {name: model.logits(model.norm(stream)) for name, stream in found.items()}


@torch.no_grad()
def lens_readings(
    model: LanguageModel, tokens: Tensor, targets: Tensor | None = None, **told: Any
) -> dict[str, Reading]:
    """Log-probabilities and ranks of the right next tokens, by point.

    Args:
        model: any architecture.
        tokens: (b, s) int64.
        targets: (b, s) int64, what should come next; the row's own next tokens when None (the last
            column then means nothing).
        **told: what else its forward takes.
    """
    targets = tokens.roll(-1, 1) if targets is None else targets
    found = record(model, tokens, lens_points(model), **told)
    readings = {}
    for name, stream in found.items():  # one after the other: logits are large
        logits = model.logits(model.norm(stream)).float()
        right = logits.gather(-1, targets[..., None])
        log_probs = (right[..., 0] - logits.logsumexp(-1)).detach()
        readings[name] = Reading(log_probs, (logits > right).sum(-1))
    return readings
