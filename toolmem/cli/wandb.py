"""``toolmem wandb``: a run's metrics and evaluations, sent to Weights & Biases after the fact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def sync(run: str, after: int | None = None, project: str | None = None) -> None:
    """Send to a run's wandb run what its metrics.csv and evaluations/ have and it lacks.

    Repeat it as often as you like: what is there is not sent again. A run that was trained without wandb gets
    a wandb run. A run that is being trained with --logger wandb sends by itself.

    Args:
        run: the run's folder.
        after: of evaluations, only those of checkpoints after this step.
        project: for a run that is not at wandb yet (toolmem by default).
    """
    from toolmem.console import stdout
    from toolmem.training.wandb_runs import sync as send

    done = send(run, after, project)
    counts = f"rows of metrics.csv sent: {done.rows}, metrics of evaluations: {done.metrics}"
    text = f"{done.project}/{done.id}: {counts}"
    stdout().print(text, highlight=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "sync": (sync, ("run",), "toolmem wandb sync runs/first"),
}


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem wandb``."""
    from toolmem.cli.functions import choose

    choose(COMMANDS, argv, prog=f"toolmem {command}")
    return 0
