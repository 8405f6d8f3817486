"""``toolmem evaluate``: what a model recalls, how it does at tasks, and how far it has gone from its base."""

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

CHUNK = 512


def evaluate(
    checkpoint: str,
    tasks: str = "recall",
    out: str | None = None,
    base: str | None = None,
    limit: int | None = None,
    n_shots: int | None = None,
    chat: bool | None = None,
    window: int | None = None,
    stride: int | None = None,
    store_base: str | None = None,
    top_k: int = 64,
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
    """Measure what a model recalls, how it does at tasks, and how far it has gone from its base.

    With --compare A.json B.json two files of results are compared; with --watch RUN a run's checkpoints are
    evaluated as they come.

    Args:
        checkpoint: a run's folder, or a .ckpt file.
        tasks: what to measure, separated by commas: recall (per attribute, on known and on unseen people),
            TASK=FILE.jsonl (a task by the recipe of that name in recipes/evaluation/, or my.yaml=FILE.jsonl,
            or any name for files of query/choices/gold, context/continuation or context/answer/aliases),
            perplexity=TEXT, divergence=TEXT (from --base). A text is a .txt, .jsonl or .parquet file.
        out: a JSON file for the results, with counts and 95 % intervals. Beside it NAME.answers.jsonl and, of
            each task, NAME.TASK.answers.jsonl take each answer as it comes; a call that was killed goes on
            from there.
        base: of divergence: the checkpoint to compare with, or what --store_base wrote of it.
        limit: the first so many questions of each task, and windows of each text.
        n_shots: examples before each question; as the task's recipe says by default.
        chat: ask in the model's own chat format; as the task's recipe says by default.
        window: tokens of a text that are read at once; 1024, if the model can, by default.
        stride: tokens by which the window moves; as long as the window by default.
        store_base: a safetensors file for this checkpoint's likeliest tokens at every position of the text
            of divergence, to be another call's --base.
        top_k: tokens kept by it at each position.
        n_questions: of recall: asked of known people, and of unseen people, at most.
        factbase: the DuckDB file with the facts (default: facts.duckdb in the run's folder).
        allow_other_factbase: accept a factbase whose facts are not those of training.
        batch_size: questions asked at once.
        invariant: the same results, bit for bit, whatever the batch size (float32 on a CPU; slower).
        ranks: of recall: processes that share the questions, and this one's threads; the results are the
            same.
        compile: of recall: decode by torch.compile, which takes a while first; its seconds are told apart.
        attention: what runs attention: sdpa (torch's own, and C of ours), flex (FlexAttention), flash
            (the package flash-attn, on CUDA), plain (the reference), or the one for the device (auto).
        device: where the model runs.
    """
    from toolmem.evaluation.suite import Asking, parse_tasks

    specs = parse_tasks(tasks)
    numbers = {"n_questions": n_questions, "batch_size": batch_size, "ranks": ranks}
    numbers |= {"limit": 1 if limit is None else limit, "top_k": top_k}
    for key, number in numbers.items():
        if number < 1:
            raise ToolmemError(f"--{key} is {number}: it must be 1 or more")
    if compile and ranks > 1:
        raise ToolmemError("--compile: each of the --ranks would compile for itself: leave one out")
    from toolmem.cli.evaluate_parts import Parts
    from toolmem.run import load

    began = time.perf_counter()
    run = load(
        checkpoint,
        factbase=factbase,
        allow_other_factbase=allow_other_factbase,
        attention=attention,
        device=device,
    )
    asking = Asking(
        batch_size=batch_size,
        invariant=invariant,
        limit=limit,
        n_shots=n_shots,
        chat=chat,
        window=window,
        stride=stride,
    )
    others = [spec for spec in specs if spec.kind != "recall"]
    parts = Parts(run.model, run.tokenizer, run.checkpoint.step, others, asking, base=base)
    if store_base is not None:
        parts.store_base(store_base, top_k)
        others = [spec for spec in others if spec.kind != "divergence"]
    told: dict[str, Any] = {}
    found: dict[str, Any] = {}
    recalls = len(others) < len(specs) and any(spec.kind == "recall" for spec in specs)
    if recalls:
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
        found["recall"] = {split: result.as_dict() for split, result in results.items()}
    how_parts = {"attention": attention, "device": device}
    measured = parts.measure(others, None if out is None else Path(out), how_parts)
    if measured:
        found["tasks"] = measured
    seconds = time.perf_counter() - began - sum(told.values())
    if out is not None:
        write_json(
            out,
            {
                "checkpoint": str(run.checkpoint.path),
                "step": run.checkpoint.step,
                **found,
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
    path = out.with_name(f"{out.stem}.answers.jsonl")
    if out.exists():  # a call that came to its end wrote it: this is another
        path.unlink(missing_ok=True)
    return recall_answers(path, run, asked, how)


def recall_answers(
    path: Path, run: Run, asked: dict[str, list[Dialogue]], how: dict[str, Any]
) -> Answers:
    """A file of answers, taken up where it is about the same; arguments as ``answers_beside``."""
    import toolmem
    from toolmem.evaluation.answers import Answers, questions_digest, weights_digest

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
    prog = f"toolmem {command}"
    flags = [word.partition("=")[0] for word in argv]
    if "--compare" in flags:
        from toolmem.cli.evaluate_compare import compare_results

        rest = [word for word in argv if word != "--compare"]
        call(
            compare_results,
            rest,
            prog=f"{prog} --compare",
            positional=("first", "second"),
            example="toolmem evaluate --compare before.json after.json",
        )
    elif "--watch" in flags:
        from toolmem.cli.evaluate_watch import watch_run

        call(
            watch_run,
            ["--help"] if {"-h", "--help"} & set(flags) else argv,
            prog=prog,
            example="toolmem evaluate --watch runs/first --tasks recall,arc_easy=arc_easy.jsonl",
        )
    else:
        call(
            evaluate,
            argv,
            prog=prog,
            example="toolmem evaluate --checkpoint runs/first --tasks recall --out results.json; toolmem "
            "evaluate --compare before.json after.json; toolmem evaluate --watch runs/first",
        )
    return 0
