"""A language model small enough to train in milliseconds, and a stream of batches for it."""

from __future__ import annotations

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from toolmem.data.batch import Batch
from toolmem.models import Transformer
from toolmem.training import TRAINER_DEFAULTS, WSD, LanguageModelModule, Muon

VOCAB = 11
SEQ = 9


def tiny(**changes) -> Transformer:
    torch.manual_seed(0)
    arguments = {"vocab_size": VOCAB, "dim": 8, "n_layers": 2, "n_heads": 2, "max_seq_len": SEQ}
    return Transformer(**(arguments | changes))


def make_batch(index: int, rows: int = 4, seq: int = SEQ, mask: float = 0.5) -> Batch:
    """Batch number ``index``: rows that count up from somewhere, so that they can be learned."""
    generator = torch.Generator().manual_seed(index)
    start = torch.randint(VOCAB, (rows, 1), generator=generator)
    tokens = (start + torch.arange(seq + 1)) % VOCAB
    chosen = torch.rand((rows, seq), generator=generator) < mask
    return Batch(
        tokens[:, :-1].contiguous(),
        tokens[:, 1:].contiguous(),
        chosen,
        n_tokens=rows * seq,
        state={"batch": index + 1},
    )


class Stream(IterableDataset):
    def __init__(self, begin: int, end: int | None, make=make_batch) -> None:
        self.begin, self.end, self.make = begin, end, make

    def __iter__(self):
        index = self.begin
        while self.end is None or index < self.end:
            yield self.make(index)
            index += 1


def loader(stream: Stream) -> DataLoader:
    return DataLoader(stream, batch_size=None, collate_fn=lambda batch: batch)


class ToyData(pl.LightningDataModule):
    """Remembers which batches training took, as the real data modules do."""

    def __init__(self, make=make_batch, fingerprint: str = "aaaa") -> None:
        super().__init__()
        self.make = make
        self.fingerprint = fingerprint
        self.position = 0
        self.log: list[int] = []

    def consumed(self, state) -> None:
        self.position = state["batch"]
        self.log.append(self.position - 1)

    def state_dict(self):
        return {"batch": self.position}

    def load_state_dict(self, state) -> None:
        self.position = state["batch"]

    def checkpoint_info(self):
        return {
            "tokenizer": {"kind": "toy", "vocab_size": VOCAB},
            "factbase": {"fingerprint": self.fingerprint, "people": 3},
            "setting": "in_weight",
            "templates": None,
        }

    def train_dataloader(self):
        return loader(Stream(self.position, None, self.make))

    def val_dataloader(self):
        return loader(Stream(1000, 1003, self.make))

    test_dataloader = predict_dataloader = val_dataloader


def make_module(model=None, **changes) -> LanguageModelModule:
    arguments = {"optimizer": Muon(lr=1e-2), "schedule": WSD(warmup_steps=2)}
    return LanguageModelModule(model or tiny(), **(arguments | changes))


def make_trainer(folder, max_steps=6, **changes) -> pl.Trainer:
    arguments = TRAINER_DEFAULTS | {
        "max_steps": max_steps,
        "default_root_dir": str(folder),
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    return pl.Trainer(**(arguments | changes))
