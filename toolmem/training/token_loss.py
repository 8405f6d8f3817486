"""The loss of a batch: the head and the cross-entropy, computed only where a token bears loss.

Where logits are many (a large vocabulary), they are held by chunks of tokens alone (``model.loss_chunk``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.data.batch import Batch
from toolmem.models import LanguageModel
from toolmem.models.chunked_loss import rows_at_once, summed_cross_entropy
from toolmem.models.context import Extras


class TokenLoss:
    """Of a module that has a language model: what its loss is.

    Args:
        model: the model.
        z_loss: weight of the squared log of the softmax's denominator.
        loss_chunk: how many tokens' logits are held at once; None chooses, 0 holds all.
        sharded: its parameters are DTensors.
    """

    model: LanguageModel
    z_loss: float
    loss_chunk: int | None
    sharded: bool = False

    def loss_sum(
        self,
        batch: Batch,
        hidden: Callable[..., Tensor] | None = None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, int]:
        """The summed cross-entropy of a batch's loss-bearing tokens in nats, and their number.

        Args:
            batch: the batch, on the model's device.
            hidden: the model's body; ``model.hidden`` when None.
            extras: takes the model's own terms of the loss, and its figures.
        """
        total, losses = self._summed_losses(batch, hidden or self.model.hidden, extras)
        return total, losses.numel()

    def _summed_losses(
        self, batch: Batch, hidden: Callable[..., Tensor], extras: Extras | None = None
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy, for its gradients, and that of each loss-bearing token, to look at."""
        states, targets = self._states_and_targets(batch, hidden, extras)
        chunk = self._chunk(len(targets))
        if chunk:
            model = self.model
            states = states if model.logit_scale == 1.0 else states * model.logit_scale
            return summed_cross_entropy(
                states, model.head.weight, targets, chunk, model.logit_softcap
            )
        losses = F.cross_entropy(self._logits(states, extras), targets, reduction="none")
        return losses.sum(), losses.detach()

    def _chunk(self, rows: int) -> int:
        """How many rows' logits to hold at once; 0 for all."""
        if self.loss_chunk == 0 or self._why_no_chunks() is not None:
            return 0
        if self.loss_chunk is None:
            return rows_at_once(rows, self.model.vocab_size)
        return self.loss_chunk if rows > self.loss_chunk else 0

    def _why_no_chunks(self, asked: int | None = None) -> str | None:
        """Why the head and its loss cannot be computed by chunks; None where they can."""
        if asked is not None and asked < 0:
            return "it must be 0 (all at once) or more, or null"
        if asked == 0:
            return None
        if self.z_loss:
            return "z_loss is of all logits at once: leave one of them out"
        head = self.model.head
        if type(head) is not torch.nn.Linear or head.bias is not None:
            return (
                f"the head is a {type(head).__name__}, not a plain linear map: leave loss_chunk out"
            )
        if type(self.model).logits is not LanguageModel.logits:
            return f"{type(self.model).__name__} has a head of its own: leave loss_chunk out"
        if self.sharded:
            return "the head is split over devices: leave loss_chunk out"
        kind = head.weight.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16:
            return "float16 needs its losses scaled"
        return None

    def token_losses(
        self, batch: Batch, hidden: Callable[..., Tensor], extras: Extras | None = None
    ) -> Tensor:
        """Cross-entropy of each loss-bearing token in reading order, in nats, float32 or wider."""
        if not torch.is_grad_enabled():
            return self._summed_losses(batch, hidden, extras)[1]
        logits, targets = self.logits_and_targets(batch, hidden, extras)
        return F.cross_entropy(logits, targets, reduction="none")

    def logits_and_targets(
        self, batch: Batch, hidden: Callable[..., Tensor], extras: Extras | None = None
    ) -> tuple[Tensor, Tensor]:
        """What is predicted of each loss-bearing token in reading order, and what it is.

        Args:
            batch: the batch, on the model's device.
            hidden: the model's body.
            extras: takes the model's own terms of the loss, and its figures.

        Returns:
            (tokens, vocab_size) float32 or wider, and (tokens,) int64.
        """
        states, targets = self._states_and_targets(batch, hidden, extras)
        return self._logits(states, extras), targets

    def _states_and_targets(
        self, batch: Batch, hidden: Callable[..., Tensor], extras: Extras | None
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of each loss-bearing token, (tokens, dim), and what it is to predict."""
        states = hidden(batch.tokens, documents=batch.documents, spans=batch.spans, extras=extras)
        if extras is not None and self.model.multi_token is not None:
            self.model.multi_token.add_losses(
                self.model,
                extras,
                states,
                batch.tokens,
                batch.targets,
                batch.loss_mask,
                batch.documents,
            )
        states = states.flatten(0, 1)
        targets = batch.targets.flatten()
        positions = batch.positions()
        if positions.numel() < targets.numel():
            states, targets = states.index_select(0, positions), targets.index_select(0, positions)
        return states, targets

    def _logits(self, states: Tensor, extras: Extras | None) -> Tensor:
        logits = self.model.logits(states)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if extras is not None and self.z_loss:
            squares = logits.logsumexp(dim=-1).square()
            extras.add_loss("train/z_loss", self.z_loss * squares.sum() / max(len(squares), 1))
        return logits
