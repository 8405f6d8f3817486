"""Tiny models of every architecture, and a training run of each under any strategy, in as many processes
as there are.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from toolmem.data.batch import Batch
from toolmem.data.modules.base import HeldOut, StatefulDataModule
from toolmem.data.stream import IndexedBatches, make_loader
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
from toolmem.models.lora import LoRA
from toolmem.training import (
    TRAINER_DEFAULTS,
    WSD,
    AdamW,
    Checkpointing,
    Flops,
    LanguageModelModule,
    Muon,
    NormProbe,
)

VOCAB, SEQ, ROWS, STEPS, ACCUMULATE = 12, 9, 8, 50, 2
SIZES = {"vocab_size": VOCAB, "dim": 16, "n_layers": 2, "max_seq_len": SEQ}


def transformer(**changes: Any) -> Transformer:
    return Transformer(**{**SIZES, "n_heads": 4, "n_kv_heads": 4, "hidden_dim": 32, **changes})


MODELS = {
    "transformer": lambda: transformer(
        dim=32, n_heads=8, qk_norm=True, conv_width=3, bias=True, residual_conv=2
    ),
    "plain": lambda: transformer(vocab_size=VOCAB + 1, norm="layer"),
    "gqa_tied": lambda: transformer(
        dim=32,
        n_heads=8,
        tie_embeddings=True,
        embedding_scale=True,
        position="learned",
        norm="layer",
        sandwich_norm=True,
        feed_forward="gelu",
        embedding_norm=True,
        logit_softcap=10.0,
        window=[4, 0],
    ),
    "mla": lambda: transformer(n_kv_heads=None, attention="mla", conv_width=2),
    "mla_q_latent": lambda: transformer(n_kv_heads=None, attention="mla", mla_q_rank=8),
    "value_residual": lambda: transformer(value_residual=True, attention_softcap=5.0),
    "multi_token": lambda: transformer(multi_token=2, vocab_size=VOCAB + 1),
    "mup": lambda: transformer(initialization="mup", mup_base_dim=8, tie_embeddings=True),
    "moe": lambda: MoETransformer(
        **{**SIZES, "n_heads": 4, "n_experts": 8, "hidden_dim": 8, "n_shared_experts": 1},
        dense_layers=1,
    ),
    "mamba": lambda: Mamba(**SIZES, state_dim=4),
    "mamba2": lambda: Mamba2(**SIZES, state_dim=4, head_dim=8),
    "mamba2_groups": lambda: Mamba2(**SIZES, state_dim=4, head_dim=8, n_groups=4, hidden_dim=32),
    "mingru": lambda: RNN(**SIZES, cell="mingru", conv_width=3),
    "minlstm": lambda: RNN(**SIZES, cell="minlstm"),
    "rglru": lambda: RNN(**SIZES, cell="rglru"),
    "lstm": lambda: RNN(**SIZES, cell="lstm"),
    "gru": lambda: RNN(**SIZES, cell="gru"),
    "gated_linear": lambda: LinearAttention(**SIZES, n_heads=4, rule="gated"),
    "hybrid": lambda: Hybrid(
        **{**SIZES, "n_layers": 4},
        pattern=["attention", "mamba2", "gated_delta", "latent_attention"],
        mixers={
            "attention": {"n_heads": 4, "rope": False},
            "mamba2": {"state_dim": 4, "head_dim": 8},
            "gated_delta": {"n_heads": 4},
            "latent_attention": {"n_heads": 4, "rope_dim": 2},
        },
        feed_forward=["swiglu", "moe"],
        feed_forwards={"moe": {"n_experts": 4, "hidden_dim": 8}},
    ),
    "hybrid_rows": lambda: Hybrid(
        **{**SIZES, "n_layers": 3},
        pattern=["attention", "lstm", "mingru"],
        mixers={"attention": {"n_heads": 4}},
        feed_forward=["moe", "swiglu"],
        feed_forwards={"moe": {"n_experts": 4, "hidden_dim": 8}},
    ),
}  # fmt: skip


@dataclass
class Case:
    """A run: an architecture, how it is spread, and what trains it."""

    model: str
    data: int = 1  # processes that read different data
    tensor: int = 1  # processes that share layers
    strategy: str = "one"  # one, ddp, split
    optimizer: str = "adamw"
    sequence: bool = False
    steps: int = STEPS
    wide: bool = False  # float64
    keep: str = ""  # where to keep a checkpoint of each second step
    begin: str = ""  # a checkpoint to go on from
    probes: bool = False  # norms of the last step, and FLOPs
    lora: bool = False  # adapters alone are trained

    @property
    def name(self) -> str:
        how = {"one": "one", "ddp": f"ddp{self.data}"}.get(
            self.strategy, f"fsdp{self.data}_tp{self.tensor}" + ("_seq" if self.sequence else "")
        )
        more = ("-kept" if self.keep else "") + ("-resumed" if self.begin else "")
        more += "-probes" if self.probes else ""
        more += "-lora" if self.lora else ""
        return f"{self.model}-{self.optimizer}-{how}{more}"

    @property
    def alone(self) -> Case:
        """The same training in one process."""
        same = {"optimizer": self.optimizer, "steps": self.steps, "wide": self.wide}
        return Case(self.model, probes=self.probes, lora=self.lora, **same)


@dataclass
class Found:
    """What a run left."""

    losses: list[float] = field(default_factory=list)
    tokens: float = 0.0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


class Rows(IndexedBatches):
    """Rows that count up from somewhere, two documents each, shared out over ranks."""

    def batch_at(self, index: int) -> Batch:
        generator = np.random.default_rng(index)
        start = generator.integers(VOCAB, size=(ROWS, 1))
        tokens = (start + np.arange(SEQ + 1)) % VOCAB
        chosen = generator.random((ROWS, SEQ)) < 0.5
        cut = generator.integers(1, SEQ, size=(ROWS, 1))
        documents = (np.arange(SEQ) >= cut).astype(np.int64)
        own = self.share(np.arange(ROWS))
        tokens, chosen, documents = (torch.from_numpy(x[own]) for x in (tokens, chosen, documents))
        return Batch(
            tokens[:, :-1].contiguous(),
            tokens[:, 1:].contiguous(),
            chosen,
            documents=documents,
            n_tokens=len(own) * SEQ,
            state={"batch": index + 1},
        )


class RowsData(StatefulDataModule):
    def signature(self) -> dict[str, Any]:
        return {}

    def checkpoint_info(self) -> dict[str, Any]:
        return {"tokenizer": {"kind": "toy"}, "factbase": None, "setting": None}

    def _rows(self) -> Rows:
        rank, world = self.rank_and_world
        return Rows(rank=rank, world_size=world)

    def train_dataloader(self) -> Any:
        rows = self._rows()
        if (state := self.resume_state()) is not None:
            rows.load_state_dict(state)
        return make_loader(rows)

    def val_dataloader(self) -> Any:
        return make_loader(HeldOut(self._rows(), 2))


class Notes(pl.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self.losses.append(module.reported["train/loss"][1])


def make_module(case: Case) -> LanguageModelModule:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64 if case.wide else torch.float32)
    try:
        model = MODELS[case.model]()
    finally:
        torch.set_default_dtype(torch.float32)
    muon = Muon(lr=1e-3, weight_decay=0.1)
    optimizer = muon if case.optimizer == "muon" else AdamW(lr=1e-3, weight_decay=0.1)
    return LanguageModelModule(
        model,
        optimizer,
        WSD(warmup_steps=2),
        fused=False,
        sequence_parallel=case.sequence,
        lora=LoRA(rank=2, dora=True) if case.lora else None,
    )


def make_trainer(case: Case, folder: str, **changes: Any) -> pl.Trainer:
    size = case.data * case.tensor
    strategy: Any = "auto"
    if case.strategy == "ddp":
        strategy = DDPStrategy(process_group_backend="gloo")
    elif case.strategy == "split":
        strategy = ModelParallelStrategy(case.data, case.tensor, save_distributed_checkpoint=False)
    arguments = {
        "max_steps": case.steps,
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": size,
        "strategy": strategy,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "accumulate_grad_batches": ACCUMULATE,
        "gradient_clip_val": 0.5,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**(TRAINER_DEFAULTS | arguments | changes))


def train(case: Case) -> Found:
    """Train, and take the whole weights back, on every rank."""
    notes = Notes()
    with tempfile.TemporaryDirectory() as folder, quiet():
        module = make_module(case)
        callbacks: list[pl.Callback] = [notes]
        if case.keep:
            callbacks.append(Checkpointing(2, None, keep_every_n_steps=2, folder=case.keep))
        if case.probes:  # all rows, whichever process has them
            probe = NormProbe(case.steps, rows=ROWS // case.data, per_layer=True)
            callbacks += [probe, Flops(utilisation=False)]
        trainer = make_trainer(
            case, folder, callbacks=callbacks, enable_checkpointing=bool(case.keep)
        )
        trainer.fit(module, RowsData(), ckpt_path=case.begin or None, weights_only=True)
        weights = whole_weights(module)
        figures = {name: value for name, (_, value) in module.reported.items()}
    measured = {n: v for n, v in figures.items() if n.startswith(("norms/", "flops/"))}
    return Found(notes.losses, figures["train/tokens"], weights, measured)


def whole_weights(module: LanguageModelModule) -> dict[str, torch.Tensor]:
    from toolmem.training.parallel.layout import whole

    return {name: whole(value).clone() for name, value in module.model.state_dict().items()}


@contextlib.contextmanager
def quiet() -> Any:
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def work(rank: int, size: int, port: int, cases: list[Case], folder: str) -> None:
    """A rank: runs every case in one process group, and rank zero writes what was found."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
    }
    torch.set_num_threads(1)
    for case in cases:
        try:
            found: Any = train(case)
        except Exception as error:
            import traceback

            found = "".join(traceback.format_exception(error))
        if rank == 0 or isinstance(found, str):
            torch.save(found, f"{folder}/{case.name}.{rank}.pt")
        if isinstance(found, str):
            raise SystemExit(found)


def run_cases(cases: list[Case], size: int, folder: str) -> dict[str, Found]:
    """Every case in ``size`` processes that are started once."""
    import socket

    import torch.multiprocessing as multiprocessing

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(work, (size, port, cases, folder), nprocs=size)
    return {
        case.name: torch.load(f"{folder}/{case.name}.0.pt", weights_only=False) for case in cases
    }
