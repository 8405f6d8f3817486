"""Batches in which dialogues that the model does not know yet come more often.

A share of each batch is drawn by the model's latest loss on each dialogue, as in online batch selection
(arXiv 1511.06343) and prioritised replay (arXiv 1511.05952); the rest is the stream that it would have
been, so every dialogue still comes once an epoch of that rest, and its loss is measured anew. The losses
are those of training itself, reported after each step: nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from toolmem.data.text.dialog_tokens import DialogTokenGenerator
from toolmem.data.text.token_table import TokenTable
from toolmem.errors import ToolmemError

# Lightning fetches a batch ahead, so that batch i is made before step i - 1 is taken. Batch i is drawn by
# what the batches up to i - LAG reported, whenever it is made: so a resumed run draws the same.
LAG = 2
LEAST = 1e-6  # a weight below this is this: what is known for sure can still be drawn


def check_share(share: float, num_workers: int) -> None:
    """Refuse a share that cannot be, or loaders that training's losses do not reach.

    Args:
        share: of each batch that is to be drawn by loss.
        num_workers: processes that make batches.

    Raises:
        ToolmemError: for either.
    """
    if not 0 <= share < 1:
        raise ToolmemError(
            f"data.init_args.prefer_unknown is {share}, but it is a share from 0 (off) to below 1"
        )
    if share and num_workers:
        raise ToolmemError(
            "data.init_args.prefer_unknown: batches hang on training's losses, so they are made in its "
            f"process: set data.init_args.num_workers (now {num_workers}) to 0"
        )


class LatestLosses:
    """The model's latest loss on each of many dialogues, and draws by it.

    Args:
        n: dialogues.
    """

    def __init__(self, n: int) -> None:
        self.losses = np.full(n, np.nan, np.float32)  # nan: not measured yet
        self.measured = np.zeros(n, np.int64)  # number of the batch
        self._reports: dict[int, tuple[Tensor, Tensor]] = {}  # by batch, of those not yet taken in
        self._drawn = -1

    def begin(self) -> None:
        """A loader begins anew: what another one made ahead is forgotten."""
        self._drawn = -1

    def report(self, index: int, dialogues: Tensor, losses: Tensor) -> None:
        """Take down what training found.

        Args:
            index: number of the batch.
            dialogues: (n,) int64, its dialogues.
            losses: (n,) the summed loss of each in nats, on any device; read when it is needed.

        Raises:
            ToolmemError: when a later batch was already drawn without it.
        """
        if index + LAG <= self._drawn:
            raise ToolmemError(
                f"data.init_args.prefer_unknown: batch {self._drawn} was made before batch {index} was "
                f"trained on; batches may be fetched {LAG - 1} ahead at most"
            )
        self._reports[index] = dialogues, losses

    def weights(self, index: int, half_life: float) -> np.ndarray:
        """(n,) float64, what each dialogue's chance in batch ``index`` is proportional to.

        Its latest loss, drawn towards the mean as it ages; the largest of all where none was measured.

        Args:
            index: number of the batch.
            half_life: batches after which a loss has moved half-way to the mean.
        """
        for batch in sorted(batch for batch in self._reports if batch <= index - LAG):
            dialogues, of_each = self._reports.pop(batch)
            told, numbers = of_each.detach().float().cpu().numpy(), dialogues.numpy()
            there = np.isfinite(told)
            self.losses[numbers[there]] = told[there]
            self.measured[numbers[there]] = batch
        known = ~np.isnan(self.losses)
        if not known.any():
            return np.ones(len(self.losses))
        losses = self.losses[known].astype(np.float64)
        fresh = 0.5 ** ((index - self.measured[known]) / half_life)
        found = np.full(len(known), losses.max())
        found[known] = losses.mean() + (losses - losses.mean()) * fresh
        return np.maximum(found, LEAST)

    def draw(self, index: int, n: int, rows: np.ndarray, half_life: float, seed: int) -> np.ndarray:
        """Draw different dialogues for batch ``index``, one after the other, by weight.

        Args:
            index: number of the batch.
            n: how many; all, if there are fewer.
            rows: (candidates,) int64, the dialogues to draw from.
            half_life: as of `weights`.
            seed: of the draw.
        """
        self._drawn = max(self._drawn, index)
        weights = self.weights(index, half_life)[rows]
        # Waiting times of rates `weights`: the first n to come are n draws without replacement.
        waits = np.random.default_rng([seed, index, len(rows)]).exponential(size=len(rows))
        waits /= weights
        n = min(n, len(rows))
        return rows[np.argpartition(waits, n - 1)[:n]]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "losses": torch.from_numpy(self.losses.copy()),
            "measured": torch.from_numpy(self.measured.copy()),
            "reports": [
                (batch, dialogues, losses.detach().float().cpu())
                for batch, (dialogues, losses) in sorted(self._reports.items())
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` returned."""
        self.losses = state["losses"].numpy().copy()
        self.measured = state["measured"].numpy().copy()
        self._reports = {batch: (rows, losses) for batch, rows, losses in state["reports"]}
        self.begin()


class UnknownFirst(DialogTokenGenerator):
    """An endless stream of batches of dialogues, a share of them drawn by the model's latest loss.

    The other dialogues of a batch are those of a `DialogTokenGenerator` of smaller batches. One of them may
    be drawn too, and then counts twice. The stream goes one way: a batch depends on what was reported of
    those before.

    Args:
        table: the dialogues.
        batch_size: dialogues in a batch.
        share: of them that are drawn by loss, above 0 and below 1.
        latest: the losses; training reports to it.
        options: as of `DialogTokenGenerator`.

    Raises:
        ToolmemError: when a batch is too small to be shared, or there are several processes.
    """

    def __init__(
        self,
        table: TokenTable,
        batch_size: int,
        *,
        share: float,
        latest: LatestLosses,
        **options: Any,
    ) -> None:
        self.n_drawn = round(batch_size * share)
        if not 0 < self.n_drawn < batch_size:
            raise ToolmemError(
                f"data.init_args.prefer_unknown is {share}: of a batch of {batch_size} that is "
                f"{self.n_drawn} dialogues, but some must be drawn by loss, and some not"
            )
        if options.get("world_size", 1) > 1:
            raise ToolmemError(
                "data.init_args.prefer_unknown: processes do not tell each other their losses, so it "
                "needs trainer.devices: 1; set it to 0 to train on several"
            )
        super().__init__(table, batch_size - self.n_drawn, with_dialogues=True, **options)
        self.latest = latest
        latest.begin()

    def dialogues_at(self, index: int) -> np.ndarray:
        """(n,) numbers of batch ``index``'s dialogues: those in turn, then those drawn."""
        half_life = self.batches_per_epoch  # of the others: by then each was measured again
        drawn = self.latest.draw(index, self.n_drawn, self.rows, half_life, self.seed)
        return np.concatenate([super().dialogues_at(index), drawn])
