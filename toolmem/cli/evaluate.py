"""``toolmem evaluate``: what a trained model recalls, with exact counts and intervals."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.compiling import compiled_engine
from toolmem.cli.functions import call
from toolmem.console import progress, stdout
from toolmem.errors import ToolmemError
from toolmem.files import write_json
from toolmem.models.kernel_choice import KernelChoice

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.evaluation import RecallResult
    from toolmem.evaluation.answers import Answers
    from toolmem.generation import Engine, Ranks
    from toolmem.run import Run

TASKS = ("recall",)
CHUNK = 512


def evaluate(
    checkpoint: str,
    tasks: str = "recall",
    out: str | None = None,
    n_questions: int = 1024,
    factbase: str | None = None,
    allow_other_factbase: bool = False,
    batch_size: int = 128,
    invariant: bool = False,
    ranks: int = 1,
    compile: bool = False,
    attention: KernelChoice = "auto",
    device: str = "cpu",
) -> None:
    """Measure what a trained model recalls, per attribute, on known and on unseen people.

    Args:
        checkpoint: a run's folder, or a .ckpt file.
        tasks: what to measure, separated by commas: recall.
        out: a JSON file for the results, with exact counts and 95 % intervals. Beside it NAME.answers.jsonl
            takes each answer as it comes; a call that was killed goes on from there.
        n_questions: asked of known people, and of unseen people, at most.
        factbase: the DuckDB file with the facts (default: facts.duckdb in the run's folder).
        allow_other_factbase: accept a factbase whose facts are not those of training.
        batch_size: dialogues generated at once.
        invariant: the same results, bit for bit, whatever the batch size (float32 on a CPU; slower).
        ranks: processes that share the questions, and this one's threads; the results are the same.
        compile: decode by torch.compile, which takes a while first; its seconds are told apart.
        attention: what runs attention: sdpa (torch's own, and C of ours), flex (FlexAttention), flash
            (the package flash-attn, on CUDA), plain (the reference), or the one for the device (auto).
        device: where the model runs.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    for name in names:
        if name not in TASKS:
            raise ToolmemError(f"--tasks: unknown task {name!r}: choose from {', '.join(TASKS)}")
    if not names or min(n_questions, batch_size, ranks) < 1:
        raise ToolmemError(
            "--tasks names no task, or --n_questions, --batch_size or --ranks is below 1"
        )
    if compile and ranks > 1:
        raise ToolmemError("--compile: each of the --ranks would compile for itself: leave one out")
    from toolmem.run import load

    began = time.perf_counter()
    run = load(
        checkpoint,
        factbase=factbase,
        allow_other_factbase=allow_other_factbase,
        attention=attention,
        device=device,
    )
    told = {}
    options = {"max_lanes": batch_size, "invariant": invariant}
    asked = questions_of(run, n_questions)
    many = run.ranks(ranks, **options) if ranks > 1 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        answers = None
        if out is not None:
            how: dict[str, Any] = {
                "batch_size": batch_size,
                "invariant": invariant,
                "ranks": ranks,
                "compile": compile,
            }
            how |= {"attention": attention, "device": device}
            answers = stack.enter_context(answers_beside(Path(out), run, asked, how))
        pool = stack.enter_context(many)
        engine = stack.enter_context(compiled_engine(run, compile, **options))
        results = measure(run, asked, batch_size, invariant, pool or engine, answers)
        if engine is not None:
            told["compile_seconds"] = round(engine.stats().compile_seconds, 3)
    show(results)
    seconds = time.perf_counter() - began - sum(told.values())
    if out is not None:
        write_json(
            out,
            {
                "checkpoint": str(run.checkpoint.path),
                "step": run.checkpoint.step,
                "recall": {split: result.as_dict() for split, result in results.items()},
                "seconds": round(seconds, 3),
                **told,
            },
        )


def questions_of(run: Run, n_questions: int) -> dict[str, list[Dialogue]]:
    """Questions about known and about unseen people, at most so many of each."""
    return {split: run.questions(split, n_questions) for split in ("known", "unseen")}


def answers_beside(
    out: Path, run: Run, asked: dict[str, list[Dialogue]], how: dict[str, Any]
) -> Answers:
    """The file of answers beside a file of results, taken up where there are no results yet.

    Args:
        out: the file of results.
        run: is asked.
        asked: questions by split.
        how: options that decide the answers.

    Raises:
        ToolmemError: when it cannot be written.
    """
    import toolmem
    from toolmem.evaluation.answers import Answers, questions_digest, weights_digest

    path = out.with_name(f"{out.stem}.answers.jsonl")
    if out.exists():  # a call that came to its end wrote it: this is another
        path.unlink(missing_ok=True)
    about = {
        "step": run.checkpoint.step,
        "weights": weights_digest(run.model),
        "questions": questions_digest(asked),
        "toolmem": toolmem.__version__,
    }
    return Answers(path, about | how)


def measure(
    run: Run,
    asked: dict[str, list[Dialogue]],
    batch_size: int,
    invariant: bool = False,
    engine: Engine | Ranks | None = None,
    answers: Answers | None = None,
) -> dict[str, RecallResult]:
    """Recall by split; a split without people is left out."""
    from toolmem.evaluation.recall import measure_in_parts

    with progress() as bar:
        tasks = {
            split: bar.add_task(f"asking about {split} people", total=len(questions))
            for split, questions in asked.items()
        }
        return measure_in_parts(
            run.model,
            run.tokenizer,
            asked,
            part=CHUNK,
            answers=answers,
            n_dialogues=CHUNK,
            advance=lambda split, n: bar.advance(tasks[split], n),
            toolbox=run.toolbox,
            batch_size=batch_size,
            invariant=invariant,
            engine=engine,
        )


def show(results: dict[str, RecallResult]) -> None:
    """Print the table."""
    from rich.table import Table

    table = Table(title="recall (exact match, 95 % interval)")
    table.add_column("attribute")
    for split in results:
        table.add_column(f"{split} people", justify="right")
    attributes = list(
        dict.fromkeys(name for result in results.values() for name in result.attributes)
    )
    for name in attributes:
        table.add_row(name, *(cell(result.attributes.get(name)) for result in results.values()))
    table.add_section()
    table.add_row("all", *(cell(result.overall) for result in results.values()), style="bold")
    stdout().print(table)


def cell(score: Any) -> str:
    """A score in words."""
    if score is None or not score.total:
        return "–"
    low, high = score.interval
    return f"{score.fraction:.3f}  ({score.correct}/{score.total}, {low:.3f}–{high:.3f})"


def main(command: str, argv: list[str]) -> int:
    """Entry."""
    call(
        evaluate,
        argv,
        prog=f"toolmem {command}",
        example="toolmem evaluate --checkpoint runs/first --tasks recall --out results.json",
    )
    return 0
