"""``toolmem demo``: the library's point in one screen.

Three models of the same size: one stores 64 people in its weights, one fails to store 4,096, one
learns to ask a database about the same 4,096. Each is trained by ``toolmem fit`` in a process of its
own, so that two cores train two models at a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.console import dialogue_text, stderr, stdout
from toolmem.errors import ToolmemError
from toolmem.files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW, MANY = 64, 4096
UNSEEN = 256
DIM, HIDDEN = 24, 72


@dataclass(frozen=True)
class Part:
    """One of the three models.

    Args:
        name: its run's name, under ``demo/``.
        title: what it is, in words.
        setting: ``in_weight`` or ``in_tool``.
        people: how many it is taught.
        steps: optimizer steps.
    """

    name: str
    title: str
    setting: str
    people: int
    steps: int


def parts(steps: int | None) -> tuple[Part, ...]:
    """The three models, on a full or a cut-down budget."""
    few, many = (steps, steps) if steps else (1500, 4000)
    return (
        Part("in_tool", "in-tool, 4,096 people", "in_tool", MANY, many),
        Part("in_weight_few", "in-weight, 64 people", "in_weight", FEW, few),
        Part("in_weight_many", "in-weight, 4,096 people", "in_weight", MANY, many),
    )


def config(part: Part, runs: str, seed: int) -> dict[str, Any]:
    """The part's whole config, as ``toolmem fit`` takes it."""
    return {
        "name": f"demo/{part.name}",
        "runs": runs,
        "seed_everything": seed,
        "model": {
            "model": {
                "class_path": "toolmem.models.Transformer",
                "init_args": {
                    "dim": DIM,
                    "n_layers": 2,
                    "n_heads": 2,
                    "hidden_dim": HIDDEN,
                    "max_seq_len": 256,
                    "feed_forward": "silu",
                    "tie_embeddings": True,
                    "embedding_scale": True,
                    "conv_width": 4,
                },
            },
            "optimizer": {"class_path": "toolmem.training.Muon", "init_args": {"lr": 1e-2}},
            "schedule": {
                "class_path": "toolmem.training.WSD",
                "init_args": {"warmup_steps": 50, "decay_fraction": 0.5},
            },
        },
        "data": {
            "class_path": "toolmem.data.FactsDataModule",
            "init_args": {
                "people": part.people,
                "setting": part.setting,
                "unseen_people": UNSEEN,
                "batch_size": 32,
                "seed": seed,
            },
        },
        "trainer": {
            "max_steps": part.steps,
            "gradient_clip_val": 1.0,
            "val_check_interval": part.steps,
            "accelerator": "cpu",
            "devices": 1,
        },
        "recall": {"every_n_steps": 0},
    }


def demo(
    runs: str = "runs",
    seed: int = 0,
    steps: int | None = None,
    questions: int = 512,
    parallel: int | None = None,
) -> None:
    """Train three models of the same size and show what each remembers; about six minutes on two cores.

    Args:
        runs: the folder of all runs; the demo writes RUNS/demo.
        seed: of everything random.
        steps: cut every training down to this many steps (the point is then not made).
        questions: asked of each model, on known and on unseen people each.
        parallel: models trained at the same time (default: the number of cores, at most 3).
    """
    if steps is not None and steps < 1:
        raise ToolmemError(f"--steps {steps}: it must be at least 1")
    if questions < 1:
        raise ToolmemError(f"--questions {questions}: it must be at least 1")
    began = time.perf_counter()
    todo = parts(steps)
    workers = parallel or min(len(todo), os.cpu_count() or 1)
    folder = Path(runs) / "demo"
    seconds = train_all(todo, runs, seed, max(1, workers))
    results = [examine(part, folder, questions, seconds[part.name]) for part in todo]
    results.sort(key=lambda result: (result["setting"] == "in_tool", result["people"]))
    show(results)
    report = folder / "report.html"
    write(results, report, seed, workers)
    total = time.perf_counter() - began
    stdout().print(f"\n[bold]{report}[/bold] has the same with a plot. {total:.0f} seconds in all.")


def train_all(todo: Sequence[Part], runs: str, seed: int, workers: int) -> dict[str, float]:
    """Train every part, ``workers`` at a time; seconds by name."""
    import yaml
    from rich import progress

    columns = (
        progress.TextColumn("{task.description:<24}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[note]}"),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "NO_COLOR": "1"}
    waiting = list(todo)
    running: dict[str, tuple[Part, subprocess.Popen[bytes], float]] = {}
    seconds: dict[str, float] = {}
    with progress.Progress(*columns, console=stderr()) as bar:
        tasks = {
            part.name: bar.add_task(part.title, total=part.steps, note="", start=False)
            for part in todo
        }
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    part = waiting.pop(0)
                    folder = Path(runs) / "demo" / part.name
                    _forget(folder)
                    recipe = folder / "recipe.yaml"
                    write_text(recipe, yaml.safe_dump(config(part, runs, seed), sort_keys=False))
                    with open(folder / "training.log", "wb") as log:
                        process = subprocess.Popen(
                            [sys.executable, "-m", "toolmem", "fit", "--config", str(recipe)],
                            stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment,
                        )  # fmt: skip
                    running[part.name] = (part, process, time.perf_counter())
                    bar.start_task(tasks[part.name])
                time.sleep(0.2)
                for name, (part, process, started) in list(running.items()):
                    step, note = latest(Path(runs) / "demo" / name / "metrics.csv")
                    bar.update(tasks[name], completed=step, note=note)
                    if process.poll() is None:
                        continue
                    del running[name]
                    seconds[name] = time.perf_counter() - started
                    if process.returncode:
                        log_file = Path(runs) / "demo" / name / "training.log"
                        tail = log_file.read_text(encoding="utf-8", errors="replace")[-2000:]
                        raise ToolmemError(f"training {part.title} failed:\n{tail.strip()}")
                    bar.update(tasks[name], completed=part.steps, note="")
                    bar.stop_task(tasks[name])
        finally:
            for _, process, _ in running.values():
                process.terminate()
            for _, process, _ in running.values():
                process.wait()
    return seconds


def _forget(folder: Path) -> None:
    """The demo always begins anew: what an earlier one left in its own folder goes."""
    for name in ("checkpoints/last.ckpt", "checkpoints/best.ckpt", "metrics.csv", "facts.duckdb"):
        (folder / name).unlink(missing_ok=True)


def latest(metrics: Path) -> tuple[int, str]:
    """The last step that a run has logged, and its loss in words."""
    from toolmem.training.loggers import read_rows

    rows = read_rows(metrics)
    if not rows:
        return 0, ""
    loss = next((row["train/loss"] for row in reversed(rows) if row.get("train/loss")), None)
    return int(rows[-1]["step"]), f"loss {float(loss):.3f}" if loss else ""


def examine(part: Part, folder: Path, questions: int, seconds: float) -> dict[str, Any]:
    """Ask a trained model about people it knows and people it does not, and keep what it said."""
    from toolmem.evaluation.recall import measure_recall
    from toolmem.run import load
    from toolmem.training.loggers import read_rows

    stderr().print(
        f"asking {part.title}: {questions} questions on known people, {questions} on unseen"
    )
    run = load(folder / part.name)
    recall: dict[str, Any] = {}
    dialogues: dict[str, Any] = {}
    for split in ("known", "unseen"):
        result = measure_recall(
            run.model,
            run.tokenizer,
            run.questions(split, questions),
            toolbox=run.toolbox,
        )
        recall[split] = result.overall
        dialogues[split] = result.samples[0]
    rows = read_rows(folder / part.name / "metrics.csv")
    tokens = next((row["train/tokens"] for row in reversed(rows) if row.get("train/tokens")), "0")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    return {
        "title": part.title,
        "setting": part.setting,
        "people": part.people,
        "facts": part.people * 4,
        "parameters": parameters,
        "recall": recall,
        "dialogues": dialogues,
        "tokens": int(float(tokens)),
        "seconds": seconds,
        "steps": part.steps,
    }


HEADS = ("model", "facts", "params", "known", "unseen", "tokens", "seconds")
ENOUGH, FAILED = 0.9, 0.5  # recall from which the demo says "learned", and up to which "did not"


def cells(result: dict[str, Any]) -> list[str]:
    """A result as the table's cells."""
    return [
        result["title"],
        f"{result['facts']:,}",
        f"{result['parameters']:,}",
        f"{result['recall']['known'].fraction:.3f}",
        f"{result['recall']['unseen'].fraction:.3f}",
        f"{result['tokens']:,}",
        f"{result['seconds']:.0f}",
    ]


def verdict(sample: Any, split: str) -> str:
    """Whether a dialogue ended well, in words."""
    who = "known person" if split == "known" else "person never seen"
    return f"{who}; " + ("right" if sample.correct else f"wrong, it is {sample.expected}")


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print a dialogue of each model, and the table."""
    from rich.table import Table

    console = stdout()
    for result in results:
        for split in ("known", "unseen") if result["setting"] == "in_tool" else ("known",):
            sample = result["dialogues"][split]
            console.rule(f"[bold]{result['title']}[/bold] ({verdict(sample, split)})", align="left")
            console.print(dialogue_text(sample.turns))
    table = Table(title="\nrecall: generated answers that are exactly right, the tool in the loop")
    for head in HEADS:
        table.add_column(head, justify="left" if head == "model" else "right")
    for result in results:
        table.add_row(*cells(result))
    console.print(table)
    console.print(lesson(results))


def lesson(results: Sequence[dict[str, Any]]) -> str:
    """What the three models show, in words, if they do."""
    few, many, tool = (result["recall"] for result in results)
    learned = (few["known"], tool["known"], tool["unseen"])
    if min(s.fraction for s in learned) < ENOUGH or many["known"].fraction > FAILED:
        return (
            "These three do not show the point: they were trained for too few steps, or the seed was "
            "an unlucky one. `toolmem demo` without --steps, or with another --seed, should."
        )
    return (
        f"Stored in the weights, {FEW} people fit (recall {few['known'].fraction:.2f}) and {MANY:,} do "
        f"not ({many['known'].fraction:.2f}). A model of the same size that learned to ask a database "
        f"answers for all {MANY:,} ({tool['known'].fraction:.2f}), and for people whose names it never "
        f"saw ({tool['unseen'].fraction:.2f}): it learned the rule."
    )


def figure(results: Sequence[dict[str, Any]]) -> Figure:
    """Recall of each model on known and unseen people, with 95 % intervals."""
    from toolmem.analysis.pictures import new_figure

    drawing = new_figure(3.2)
    axes = drawing.subplots()
    for offset, split, colour in ((-0.19, "known", "#2b6cb0"), (0.19, "unseen", "#dd6b20")):
        scores = [result["recall"][split] for result in results]
        heights = [score.fraction for score in scores]
        low, high = zip(*(score.interval for score in scores), strict=True)
        errors = [
            [max(0.0, h - end) for h, end in zip(heights, low, strict=True)],
            [max(0.0, end - h) for h, end in zip(heights, high, strict=True)],
        ]
        places = [place + offset for place in range(len(results))]
        bars = axes.bar(places, heights, 0.36, yerr=errors, capsize=3, color=colour)
        bars.set_label("people it was trained on" if split == "known" else "people it never saw")
        for place, height, end in zip(places, heights, high, strict=True):
            axes.text(place, end + 0.02, f"{height:.2f}", ha="center", va="bottom", fontsize=9)
    labels = [
        f"{result['title'].replace(', ', chr(10))}\n{result['parameters']:,} parameters"
        for result in results
    ]
    axes.set_xticks(range(len(results)), labels)
    axes.set_ylim(0, 1.18)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axes.set_ylabel("recall (exact match)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return drawing


def write(results: Sequence[dict[str, Any]], path: Path, seed: int, workers: int) -> None:
    """Write the report, and the same as JSON beside it."""
    from toolmem.analysis.report import Panel, write_report
    from toolmem.training.folders import environment

    machine = environment()
    dialogues = []
    for result in results:
        for split in ("known", "unseen"):
            sample = result["dialogues"][split]
            dialogues.append((result["title"], sample.turns, verdict(sample, split)))
    tool = results[-1]["recall"]
    write_report(
        path,
        title="Store it, or learn to ask?",
        lead=f"Three models of {results[0]['parameters']:,} parameters. {lesson(results)}",
        panels=[
            Panel(
                "demo",
                "Recall of generated answers; bars are 95 % intervals.",
                figure(results),
                (HEADS, [cells(result) for result in results]),
            )
        ],
        dialogues=dialogues,
        circumstances=[
            ("command", f"toolmem demo --seed {seed}"),
            ("training", f"{workers} models at a time, steps: "
             + ", ".join(f"{r['title']}: {r['steps']:,}" for r in results)),
            ("questions", f"{tool['known'].total} on known and {tool['unseen'].total} on unseen people"),
            ("processor", f"{machine['processor']}, {machine['cpu_count']} cores"),
            ("versions", f"Python {machine['python']}, torch {machine['packages']['torch']}, "
             f"lightning {machine['packages']['lightning']}"),
        ],
    )  # fmt: skip
    plain = [
        {
            **{key: result[key] for key in ("title", "setting", "people", "facts", "parameters")},
            **{key: result[key] for key in ("tokens", "steps", "seconds")},
            "recall": {split: score.as_dict() for split, score in result["recall"].items()},
        }
        for result in results
    ]
    write_json(path.with_name("results.json"), {"seed": seed, "models": plain})


def main(command: str, argv: list[str]) -> int:
    """Entry."""
    call(demo, argv, prog=f"toolmem {command}", example="toolmem demo")
    return 0
