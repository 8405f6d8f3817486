"""How often a model that drafts is right, by teacher forcing: no text is generated."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models.draft_trees import Topology
from toolmem.models.masks import document_positions

if TYPE_CHECKING:
    from toolmem.data.batch import Batch
    from toolmem.models.drafting import Drafting

PLACES = 1024  # drafted for at once


@dataclass(frozen=True)
class DraftAccuracy:
    """How often drafted tokens are right where all tokens drafted before them were.

    Args:
        tried: by depth: places where the likeliest tokens up to there were right, and a token follows
            that the model is to write.
        right: by depth, by rank: places of those where that token of the draft is the one that follows.
        places: where a draft was made.
    """

    tried: tuple[int, ...]
    right: tuple[tuple[int, ...], ...]
    places: int

    @property
    def accuracies(self) -> list[list[float]]:
        """Shares by depth, by rank: what ``Topology.from_accuracies`` takes."""
        return [
            [hits / max(tried, 1) for hits in ranks]
            for tried, ranks in zip(self.tried, self.right, strict=True)
        ]

    @property
    def accepted(self) -> float:
        """Tokens of the likeliest path that are right, a mean over places."""
        return sum(ranks[0] for ranks in self.right) / max(self.places, 1)


def caterpillar(depth: int, ranks: int) -> Topology:
    """The likeliest path, and beside each of its tokens those of further ranks."""
    return Topology.of([0] * d + [rank] for d in range(depth) for rank in range(ranks))


@torch.no_grad()
def draft_accuracy(model: Drafting, batches: Iterable[Batch], ranks: int = 4) -> DraftAccuracy:
    """Draft at every place of dialogues where the model has just written a token, and compare.

    Args:
        model: in evaluation mode, on the batches' device.
        batches: dialogues that it was not trained on.
        ranks: likeliest tokens of each depth to look at.

    Raises:
        ToolmemError: when there is no place to draft at.
    """
    ranks = min(ranks, model.vocab_size)
    shape = caterpillar(model.depth, ranks)
    tried = torch.zeros(model.depth, dtype=torch.int64)
    right = torch.zeros(model.depth, ranks, dtype=torch.int64)
    places = 0
    for batch in batches:
        states = model.hidden(batch.tokens, documents=batch.documents, spans=batch.spans)
        rows, at = batch.loss_mask.nonzero(as_tuple=True)
        places += len(rows)
        position = _positions(batch)[rows, at]
        for chunk in torch.arange(len(rows), device=rows.device).split(PLACES):
            row, last = rows[chunk, None], at[chunk, None]
            back = torch.arange(1 - model.window, 1, device=row.device)
            counts = (position[chunk] + 1).clamp(max=model.window)
            columns = (last + back).clamp(min=0)
            tree = model.draft(states[row, columns], batch.targets[row, columns], counts, shape)
            wanted, there = _following(batch, row, last, model.depth)
            drafted = tree.tokens.view(len(chunk), model.depth, ranks)
            hits = drafted == wanted[:, :, None]
            # tried where the model writes this token, and the likeliest before it were right
            before = torch.cat((torch.ones_like(there[:, :1]), hits[:, :-1, 0]), dim=1)
            now = (there & before).cumprod(dim=1).bool()
            tried += now.sum(0).cpu()
            right += (hits & now[:, :, None]).sum(0).cpu()
    if not places:
        raise ToolmemError("no token of these batches is the model's to write: nothing to draft")
    return DraftAccuracy(tuple(tried.tolist()), tuple(map(tuple, right.tolist())), places)


def _positions(batch: Batch) -> Tensor:
    """Each token's position in its document, (b, s) int64."""
    if batch.documents is not None:
        return document_positions(batch.documents)
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)


def _following(batch: Batch, row: Tensor, last: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The tokens after the one that follows each place, and whether each is the model's own.

    Args:
        batch: the dialogues.
        row: (n, 1) int64.
        last: (n, 1) int64, the last place that is certain.
        depth: tokens to look at.

    Returns:
        (n, depth) int64 and (n, depth) bool.
    """
    ahead = last + torch.arange(1, depth + 1, device=last.device)
    inside = ahead < batch.tokens.shape[1]
    ahead = ahead.clamp(max=batch.tokens.shape[1] - 1)
    there = inside & batch.loss_mask[row, ahead]
    if batch.documents is not None:
        there &= batch.documents[row, ahead] == batch.documents[row, last]
    return batch.targets[row, ahead], there
