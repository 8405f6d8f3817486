"""Teacher forcing: what each token of a batch costs a model, whatever it would have said itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from toolmem.data.batch import Batch
    from toolmem.models import LanguageModel


@torch.no_grad()
def forced(model: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of each loss-bearing token, and whether it is the likeliest.

    Args:
        model: in evaluation mode.
        batch: on any device.

    Returns:
        (tokens,) float64 nats and (tokens,) bool, both on the host, in reading order.
    """
    batch = batch.to(model.embedding.weight.device)
    states = model.hidden(batch.tokens, documents=batch.documents, spans=batch.spans)
    places = batch.positions()
    logits = model.logits(states.flatten(0, 1).index_select(0, places))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    targets = batch.targets.flatten().index_select(0, places)
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.double().cpu(), (logits.argmax(-1) == targets).cpu()
