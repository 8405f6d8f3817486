"""``toolmem plot circuits``: what each part of a run's model does, checkpoint by checkpoint."""

from __future__ import annotations

import platform
import time
from typing import TYPE_CHECKING, Literal

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from toolmem.checkpoints import LoadedCheckpoint
    from toolmem.data.dialogues import Dialogue

PROBED = 256  # people that a linear probe is fitted on and tested on, at most


def circuits(
    run: str,
    dialogues: int = 64,
    split: Literal["known", "unseen"] = "known",
    out: str | None = None,
    factbase: str | None = None,
) -> None:
    """Draw what each head and feed-forward of a run does, at every checkpoint that it kept.

    A page with curves, and a slider through the checkpoints: attention by head, scores, activation
    patching, ablation, logit lens, probes.

    Args:
        run: the run's folder; checkpointing.keep_every_n_steps says which checkpoints training keeps.
        dialogues: how many it is measured on.
        split: about people known from training, or unseen ones.
        out: the page, .html; circuits.html in the run's folder when left out. Its figures are written
            beside, as PNG and CSV.
        factbase: where the people are; facts.duckdb in the run's folder when left out.
    """
    if dialogues < 1:
        raise ToolmemError(f"dialogues is {dialogues}: ask for 1 or more")
    if out is not None and not out.endswith(".html"):
        raise ToolmemError(f"out: {out} must end in .html")
    from toolmem import checkpoints
    from toolmem.analysis.circuits.evolution import evolution, one_attribute, removed
    from toolmem.analysis.circuits.page import write_page
    from toolmem.analysis.circuits.points import attention_layers
    from toolmem.console import stderr, stdout, track
    from toolmem.run import load

    started = time.monotonic()
    files = checkpoints.kept(run)
    loaded = load(files[-1], factbase=factbase)
    attention_layers(loaded.model)
    asked = loaded.questions(split, dialogues)
    if not asked:
        raise ToolmemError(f"split: the factbase of {run} holds no {split} people")
    probed = one_attribute(loaded.questions(split, 4 * PROBED))[:PROBED]
    given, found = evolution(_loaded(track(files, "checkpoints", len(files))), asked, probed)
    without = removed(loaded.model, loaded.tokenizer, given, loaded.toolbox)
    folder = checkpoints.run_folder(files[-1])
    steps = [one.step for one in found]
    if len(steps) == 1:
        stderr().print(
            f"{run} has a checkpoint of step {steps[0]} alone: train with "
            "--checkpointing.keep_every_n_steps 250 to see circuits come about"
        )
    written = write_page(
        folder / "circuits.html" if out is None else out,
        given,
        found,
        loaded.tokenizer,
        title=f"Circuits of {folder.resolve().name}",
        removed=without,
        circumstances=[
            ("command", f"toolmem plot circuits {run} --dialogues {dialogues} --split {split}"),
            ("model", _model(loaded.checkpoint)),
            ("trained on", _data(loaded.checkpoint)),
            ("checkpoints", f"{len(steps)}, steps {steps[0]} to {steps[-1]}"),
            ("dialogues", f"{len(asked)} about {_people(asked)} people ({split})"),
            ("took", f"{time.monotonic() - started:.0f} s on {platform.machine()}"),
        ],
    )
    for path in written:
        stdout().print(path, highlight=False, markup=False, soft_wrap=True)


def _loaded(files: Iterator[Path]) -> Iterator[LoadedCheckpoint]:
    from toolmem import checkpoints

    return (checkpoints.load(file) for file in files)


def _model(checkpoint: LoadedCheckpoint) -> str:
    model = checkpoint.model
    n = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__}, {len(model.blocks)} blocks, dim {model.dim}, {n:,} parameters"


def _data(checkpoint: LoadedCheckpoint) -> str:
    data = checkpoint.data
    names = ", ".join(str(spec.get("name")) for spec in data.get("templates") or [])
    return f"facts {data.get('setting')}, templates {names}"


def _people(asked: Sequence[Dialogue]) -> int:
    return len({dialogue.person for dialogue in asked})
