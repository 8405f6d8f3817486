"""Training the way one would write it in an afternoon: what `train.py` compares with.

Every dialogue is a row padded to the same length, the model computes logits at every position, and
the loss looks away where none is borne. Same model class, same dialogues, same loss mask, same
optimizer, same precision: only where padding lies, where the head is computed, and compilation
differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from toolmem.data.text.token_table import ASSISTANT, TokenTable
from toolmem.models import LanguageModel

IGNORED = -100


class NaiveTraining:
    """An endless naive training run.

    Args:
        model: what is trained.
        table: the dialogues.
        row_length: tokens that every row is padded to.
        batch_size: rows of a batch.
        lr: AdamW's learning rate.
    """

    def __init__(
        self,
        model: LanguageModel,
        table: TokenTable,
        row_length: int = 257,
        batch_size: int = 128,
        lr: float = 1e-3,
    ) -> None:
        if table.longest > row_length:
            raise ValueError(f"a dialogue of {table.longest} tokens is longer than {row_length}")
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        self.tokens = torch.zeros(len(table), row_length, dtype=torch.int64)
        self.targets = torch.full((len(table), row_length), IGNORED)
        self.lengths = torch.zeros(len(table), dtype=torch.int64)
        for row in range(len(table)):
            tokens = torch.from_numpy(table.tokens(row))
            says = torch.from_numpy(table.roles(row) == ASSISTANT)
            self.tokens[row, : len(tokens)] = tokens
            self.targets[row, : len(tokens)] = tokens.where(says, IGNORED)
            self.lengths[row] = len(tokens) - 1
        self.batches = self._shuffled(batch_size)

    def _shuffled(self, batch_size: int) -> Iterator[torch.Tensor]:
        rng = np.random.default_rng(0)
        while True:
            order = torch.from_numpy(rng.permutation(len(self.tokens)))
            yield from order.split(batch_size)

    def step(self) -> int:
        """One training step; returns the number of its tokens that are not padding."""
        rows = next(self.batches)
        logits = self.model(self.tokens[rows, :-1])
        targets = self.targets[rows, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return int(self.lengths[rows].sum())
