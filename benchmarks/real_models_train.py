"""Training steps of SmolLM2-135M: our trainer beside transformers and its Trainer, on the same rows.

Each side is a process of its own with one thread; they take steps by turns, so that a machine that others
use, too, slows both alike. Every step is of both trainers' own loops: forward, backward, clipping by norm,
fused AdamW. Peak memory is the process's largest resident set (VmHWM) from after the model was loaded on.

Rows are of 512 tokens, eight to a batch: *dialogues* in the model's chat format, several to a row, with loss
on what the assistant says; and *text*, with loss everywhere.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from toolmem.data.batch import Batch

SEQ = 512
IGNORED = -100  # a label of transformers' that bears no loss
PRECISIONS = ("float32", "bfloat16")
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "rope_theta": 100_000.0, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
QUICK_LAYERS = 2


class Case(NamedTuple):
    """What a process trains.

    Args:
        side: ``toolmem``, ``toolmem_checkpointed`` (activations of blocks) or ``transformers``.
        precision: ``float32``, or ``bfloat16`` by autocast.
        rows: file of the rows: ``tokens`` (batches, rows, SEQ + 1) and ``mask`` (batches, rows, SEQ).
        gguf: the model; None for random weights of its shape and few layers.
        checkpoint: the same, by ``toolmem convert``.
    """

    side: str
    precision: str
    rows: str
    gguf: str | None
    checkpoint: str | None


# ---- rows


def dialogue_rows(tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of people's dialogues with a tool, in ChatML, and where the assistant speaks."""
    from toolmem.data import FactsDataModule

    data = FactsDataModule(people=400, setting="in_tool", batch_size=8, unseen_people=0)
    data.setup()
    ids, mask = [], []
    while len(ids) < count * (SEQ + 1):
        for question in data.questions("known", 400):
            for turn in question.turns:
                says = turn.role == "assistant"
                head = tokenizer.encode(f"<|im_start|>{turn.role}\n", add_special_tokens=False)
                body = tokenizer.encode(f"{turn.text}<|im_end|>", add_special_tokens=False)
                end = tokenizer.encode("\n", add_special_tokens=False)
                ids += head + body + end
                mask += [False] * len(head) + [says] * len(body) + [False] * len(end)
    return _rows(ids, count), _rows(mask, count)[:, 1:]


def text_rows(tokenizer: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of this project's documentation."""
    pages = sorted((Path(__file__).parents[1] / "docs").rglob("*.md"))
    ids = tokenizer.encode("\n\n".join(page.read_text(encoding="utf-8") for page in pages))
    tokens = _rows((ids * (1 + count * (SEQ + 1) // len(ids)))[: count * (SEQ + 1)], count)
    return tokens, torch.ones(count, SEQ, dtype=torch.bool)


def random_rows(count: int, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of random tokens, a share of which bears loss, in runs as dialogues have them."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(SHAPE["vocab_size"], (count, SEQ + 1), generator=generator)
    mask = (torch.arange(SEQ) % 32 < 32 * share).expand(count, SEQ)
    return tokens, mask.clone()


def _rows(values: list[Any], count: int) -> torch.Tensor:
    return torch.tensor(values[: count * (SEQ + 1)]).view(count, SEQ + 1)


# ---- the sides


class Turns:
    """A process's end of the line: it waits for its turn, and says what a step took."""

    def __init__(self, line: Any) -> None:
        self.line = line
        self.began = self.worked = 0.0

    def begin(self) -> None:
        """Wait; end the process where there is no turn any more."""
        if self.line.recv() == "end":
            self.line.send(peak_memory())
            os._exit(0)
        self.began, self.worked = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Tell of the step: seconds, and processor seconds."""
        self.line.send((time.perf_counter() - self.began, time.process_time() - self.worked))


def peak_memory() -> int:
    """The largest resident set of this process since `forget_peak`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Begin to measure the peak anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def hf_model(case: Case) -> Any:
    """The model of transformers, in float32."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if case.gguf is None:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=QUICK_LAYERS))
    path = Path(case.gguf)
    read = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    # What comes from a GGUF file counts as quantised, which its Trainer refuses; the numbers are not.
    config = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model


def our_model(case: Case) -> Any:
    """Ours, of the same weights."""
    from toolmem import checkpoints
    from toolmem.models import Transformer
    from toolmem.models.interop.architectures import architecture_of

    if case.checkpoint is not None:
        return checkpoints.load(case.checkpoint).model
    theirs = hf_model(case)
    config = theirs.config.to_dict()
    architecture = architecture_of(config, "the benchmark")
    options = architecture.options(config, "the benchmark")
    model, weights = Transformer(**options), theirs.state_dict()
    own = {r.ours: r.whole([weights[n] for n in r.theirs]) for r in architecture.rules(options)}
    model.load_state_dict(own, strict=False)
    return model


def run_side(case: Case, line: Any) -> None:
    """Train in a process of its own."""
    torch.set_num_threads(1)
    (train_transformers if case.side == "transformers" else train_toolmem)(case, Turns(line))


def train_transformers(case: Case, turns: Turns) -> None:
    """Steps of ``transformers.Trainer``."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    rows = torch.load(case.rows)
    labels = rows["tokens"].clone()
    labels[:, :, 1:][~rows["mask"]] = IGNORED
    labels[:, :, 0] = IGNORED
    # Its model shifts labels itself, so a row has SEQ inputs, of which the last one predicts nothing.
    tokens, labels = rows["tokens"][:, :, :SEQ].flatten(0, 1), labels[:, :, :SEQ].flatten(0, 1)
    examples = [{"input_ids": a, "labels": b} for a, b in zip(tokens, labels, strict=True)]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end()

    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows["tokens"].shape[1], max_steps=10_000,
            use_cpu=True, bf16=case.precision == "bfloat16", learning_rate=1e-5, max_grad_norm=1.0,
            lr_scheduler_type="constant", optim="adamw_torch_fused", logging_strategy="no",
            save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=hf_model(case), args=options, train_dataset=examples, callbacks=[Steps()]
        )
        forget_peak()
        trainer.train()


def train_toolmem(case: Case, turns: Turns) -> None:
    """Steps of our trainer, as ``toolmem fit`` makes them."""
    import lightning.pytorch as pl
    from torch.utils.data import DataLoader

    from toolmem.cli.fit import be_quiet
    from toolmem.models.recompute import ActivationCheckpointing
    from toolmem.training import TRAINER_DEFAULTS, AdamW, Constant, LanguageModelModule

    rows = torch.load(case.rows)

    def batches() -> Iterator[Batch]:
        while True:
            for tokens, mask in zip(rows["tokens"], rows["mask"], strict=True):
                mask = mask.clone()
                mask[:, SEQ - 1] = False  # as above
                inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
                yield Batch(inputs, targets, mask, n_tokens=inputs.numel())

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[Batch]:
            return batches()

    class Steps(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            turns.begin()

        def on_train_batch_end(self, *args: Any) -> None:
            turns.end()

    be_quiet()
    checkpointed = case.side == "toolmem_checkpointed"
    module = LanguageModelModule(
        our_model(case).train(),
        AdamW(lr=1e-5),
        Constant(warmup_steps=0),
        activation_checkpointing=ActivationCheckpointing("blocks") if checkpointed else None,
    )
    precision = "bf16-mixed" if case.precision == "bfloat16" else "32-true"
    options = TRAINER_DEFAULTS | {
        "accelerator": "cpu", "devices": 1, "max_steps": 10_000, "precision": precision,
        "gradient_clip_val": 1.0, "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "callbacks": [Steps()],
    }  # fmt: skip
    trainer = pl.Trainer(**options)
    forget_peak()
    trainer.fit(module, DataLoader(Rows(), batch_size=None, collate_fn=lambda batch: batch))


# ---- the comparison


class Side:
    """A process that takes steps when it is told to."""

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=run_side, args=(case, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> tuple[float, float]:
        """Seconds of a step, and processor seconds."""
        self.line.send("step")
        seconds, worked = self.line.recv()
        return float(seconds), float(worked)

    def end(self) -> int:
        """Its peak memory in bytes."""
        self.line.send("end")
        peak = int(self.line.recv())
        self.process.join(60)
        return peak


def compare(
    cases: dict[str, Case], steps: int
) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int]]:
    """Seconds of each side's steps, by turns, the first of each left out; and its peak memory."""
    sides = {name: Side(case) for name, case in cases.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for number in range(steps + 1):
        for name in list(cases) if number % 2 else list(cases)[::-1]:
            took = sides[name].step()
            if number:  # the first makes what later ones find
                seconds[name].append(took)
    return seconds, {name: side.end() for name, side in sides.items()}


def train(
    gguf: Path | None,
    checkpoint: Path | None,
    steps: int,
    rows: int = 8,
    precisions: tuple[str, ...] = PRECISIONS,
) -> dict[str, Any]:
    """Compare training steps.

    Args:
        gguf: SmolLM2-135M, which transformers reads; None for random weights and two layers.
        checkpoint: the same, by ``toolmem convert``.
        steps: of each side that count.
        rows: of a batch.
        precisions: of those above.

    Returns:
        figures, ``train_speedup_over_transformers`` (dialogues, the slower precision) among them.
    """
    count = 4  # batches, over and over
    if gguf is None:
        made = {"dialogues": random_rows(count * rows, 0.4), "text": random_rows(count * rows, 1.0)}
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        made = {
            "dialogues": dialogue_rows(tokenizer, count * rows),
            "text": text_rows(tokenizer, count * rows),
        }
    found: dict[str, Any] = {"rows": rows, "seq_len": SEQ, "steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        for kind, (tokens, mask) in made.items():
            file = str(Path(folder) / f"{kind}.pt")
            torch.save(
                {"tokens": tokens.view(count, rows, -1), "mask": mask.view(count, rows, -1)}, file
            )
            found[f"{kind}_share_with_loss"] = round(mask.float().mean().item(), 3)
            for precision in precisions:
                names = ["toolmem", "transformers"]
                names += ["toolmem_checkpointed"] if kind == "dialogues" else []
                paths = (
                    None if gguf is None else str(gguf),
                    None if gguf is None else str(checkpoint),
                )
                cases = {name: Case(name, precision, file, *paths) for name in names}
                seconds, peaks = compare(cases, steps)
                found[f"{kind}_{precision}"] = _figures(seconds, peaks, rows)
    keys = [f"dialogues_{precision}" for precision in precisions]
    texts = [f"text_{precision}" for precision in precisions]
    found["train_speedup_over_transformers"] = min(found[key]["speedup"] for key in keys)
    found["train_text_speedup_over_transformers"] = min(found[key]["speedup"] for key in texts)
    found["train_memory_over_transformers"] = max(
        found[key]["memory_ratio"] for key in keys + texts
    )
    found["train_memory_checkpointed"] = max(found[key]["memory_checkpointed"] for key in keys)
    return found


def _figures(
    steps: dict[str, list[tuple[float, float]]], peaks: dict[str, int], rows: int
) -> dict[str, Any]:
    seconds, worked = (
        {name: [one[part] for one in every] for name, every in steps.items()} for part in (0, 1)
    )
    ours, theirs = seconds["toolmem"], seconds["transformers"]
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    figures: dict[str, Any] = {
        "speedup": round(sum(theirs) / sum(ours), 3),
        "speedup_processor": round(sum(worked["transformers"]) / sum(worked["toolmem"]), 3),
        "speedup_median_turn": round(statistics.median(ratios), 3),
        "memory_ratio": round(peaks["toolmem"] / peaks["transformers"], 3),
        "tokens_per_s": {n: round(rows * SEQ * len(s) / sum(s), 1) for n, s in seconds.items()},
        "peak_gb": {name: round(peak / 1e9, 3) for name, peak in peaks.items()},
        "seconds": {name: [round(one, 2) for one in every] for name, every in seconds.items()},
        "processor_seconds": {n: [round(one, 2) for one in every] for n, every in worked.items()},
    }
    if "toolmem_checkpointed" in peaks:
        figures["memory_checkpointed"] = round(peaks["toolmem_checkpointed"] / peaks["toolmem"], 3)
    return figures
