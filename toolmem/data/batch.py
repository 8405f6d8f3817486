"""What a loader hands to training: tokens, targets, where loss is borne, and where the loader stands."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Batch:
    """One batch of rows, padded on the right.

    Args:
        tokens: (batch, seq) int64, the inputs.
        targets: (batch, seq) int64, the token that follows each input.
        loss_mask: (batch, seq) bool, True where the target bears loss.
        documents: (batch, seq) int32, number of the document that each token belongs to within its
            row when attention between documents is blocked, -1 at padding; None when a row is one
            document or attention is free.
        spans: (batch, seq) int64, number of the span of each token within which attention looks both
            ways, -1 elsewhere; None when nobody asked for it.
        n_tokens: tokens that are not padding (what throughput counts).
        lengths: (n,) int64 on the host, tokens of each document where ``documents`` tells them apart,
            else of each row, padding left out; None when ``documents`` has to be looked at, or when all
            rows are full.
        state: where the loader stands after this batch, plain data.
        dialogues: (n,) int64 on the host, the number within the loader's table of each document, in
            reading order, where the loader wants to know each one's loss; else None.
        loss_positions: int64, indices into the flattened (batch * seq) positions that bear loss; None
            until somebody asks (``positions``) or the batch moves. They are found before a batch goes
            to a GPU: looking for them there would make the host wait.
    """

    tokens: Tensor
    targets: Tensor
    loss_mask: Tensor
    documents: Tensor | None = None
    spans: Tensor | None = None
    n_tokens: int = 0
    lengths: Tensor | None = None
    state: dict[str, Any] = field(default_factory=dict)
    dialogues: Tensor | None = None
    loss_positions: Tensor | None = None

    def positions(self) -> Tensor:
        """Indices into the flattened positions that bear loss, int64."""
        if self.loss_positions is None:
            self.loss_positions = self.loss_mask.flatten().nonzero().squeeze(1)
        return self.loss_positions

    def sums_by_document(self, losses: Tensor, n: int) -> Tensor:
        """(n,) the sum over each document's loss-bearing tokens, documents in reading order.

        Args:
            losses: (tokens,) one number for each loss-bearing token, in reading order.
            n: documents in the batch.
        """
        positions = self.positions()
        numbers = positions.div(self.tokens.shape[1], rounding_mode="floor")
        if self.documents is not None:
            counts = self.documents.amax(1) + 1
            firsts = counts.cumsum(0) - counts
            numbers = firsts[numbers] + self.documents.flatten()[positions]
        return losses.new_zeros(n).index_add_(0, numbers, losses)

    def _map(self, function: Any) -> Batch:
        return replace(
            self,
            tokens=function(self.tokens),
            targets=function(self.targets),
            loss_mask=function(self.loss_mask),
            documents=None if self.documents is None else function(self.documents),
            spans=None if self.spans is None else function(self.spans),
            loss_positions=function(self.positions()),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on ``device``."""
        if self.tokens.device == torch.device(device):
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._map(lambda tensor: tensor.pin_memory())

    def __len__(self) -> int:
        return self.tokens.shape[0]
