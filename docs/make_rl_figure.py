"""Draws what a GRPO run did, from its metrics, and prints its row for docs/benchmarks.md.

    python docs/make_rl_figure.py runs/half runs/rl [runs/half1 runs/rl1 ...]

Writes docs/assets/rl.svg: recall over steps, from where the run before left it, and seconds of generation
and of training. Further pairs (other seeds) are drawn thin.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from toolmem.files import write_text
from toolmem.training.loggers import read_rows

PICTURE = Path(__file__).parent / "assets" / "rl.svg"
RECALL = {
    "recall/exact_match": ("people that training knows", "#2b6cb0"),
    "recall/unseen/exact_match": ("people that it does not", "#dd6b20"),
}
TIMES = {"time/generation_s": ("generation", "#2b6cb0"), "time/training_s": ("training", "#a0aec0")}


def series(run: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of a metric."""
    return [
        (int(row["step"]), float(row[metric]))
        for row in read_rows(run / "metrics.csv")
        if row.get(metric)
    ]


def picture(starts: list[Path], runs: list[Path]) -> Figure:
    """Both panels."""
    drawing = Figure(figsize=(9.0, 3.3), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for metric, (label, colour) in RECALL.items():
        for number, (start, run) in enumerate(zip(starts, runs, strict=True)):
            before = series(start, metric)[-1][1]
            steps, values = zip((0, before), *series(run, metric), strict=True)
            width, name = (2.0, label) if number == 0 else (0.8, None)
            left.plot(steps, values, color=colour, linewidth=width, label=name, marker=".")
    left.axhline(0.9, color="#718096", linewidth=0.8, linestyle=":")
    left.set(xlabel="step", ylabel="recall (exact match)", ylim=(0, 1.02))
    left.legend(frameon=False, loc="lower right")
    parts = {metric: series(runs[0], metric) for metric in TIMES}
    steps = [step for step, _ in parts["time/generation_s"]]
    right.stackplot(
        steps,
        *([seconds for _, seconds in parts[metric]] for metric in TIMES),
        labels=[label for label, _ in TIMES.values()],
        colors=[colour for _, colour in TIMES.values()],
    )
    right.set(xlabel="step", ylabel="seconds so far")
    right.legend(frameon=False, loc="upper left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return drawing


def main(starts: list[Path], runs: list[Path]) -> None:
    """Write the picture, print the rows."""
    text = io.StringIO()
    with rc_context({"svg.hashsalt": "rl", "svg.fonttype": "path"}):
        picture(starts, runs).savefig(
            text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None}
        )
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    write_text(PICTURE, "\n".join(lines) + "\n")
    for run in runs:
        last = [series(run, metric)[-1][1] for metric in (*RECALL, *TIMES)]
        print(f"| {run.name} | {last[0]:.3f} | {last[1]:.3f} | {last[2]:.0f} | {last[3]:.0f} |")


if __name__ == "__main__":
    names = [Path(name) for name in sys.argv[1:]]
    main(names[::2], names[1::2])
