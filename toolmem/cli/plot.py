"""``toolmem plot``: pictures of a run, or of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from toolmem.cli.functions import choose


def norms(run: str, measure: str | None = None, out: str | None = None) -> None:
    """Draw what the norms probe measured: heat-maps of layers over steps.

    Args:
        run: the run's folder.
        measure: one measure alone (weight, gradient, update_ratio, activation_rms, activation_max,
            dead_units, attention_entropy, attention_logit_max); all that there are when left out.
        out: the picture's file, .png, .svg or .pdf; norms.png in the run's folder when left out.
    """
    from toolmem.analysis.norms import draw
    from toolmem.console import stdout

    stdout().print(draw(run, out, measure), highlight=False, markup=False, soft_wrap=True)


def searches(sweep: str, published: str | None = None, out: str | None = None) -> None:
    """Draw what a sweep searched for: report.html, report.png, report.svg and searches.csv.

    Args:
        sweep: the sweep's folder.
        published: a CSV of published means to draw beside: a column for each axis that is drawn,
            recall_threshold, mean_min_params.
        out: the folder that they are written to; the sweep's when left out.
    """
    from toolmem.analysis.search_plot import plot_folder
    from toolmem.console import stdout

    for path in plot_folder(sweep, sweep if out is None else out, published):
        stdout().print(path, highlight=False, markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "searches": (searches, ("sweep",), "toolmem plot searches sweeps/figure1_quick"),
    "norms": (norms, ("run",), "toolmem plot norms runs/first --measure gradient"),
}


def main(command: str, argv: list[str]) -> int:
    """Run ``toolmem plot``.

    Args:
        command: ``plot``.
        argv: the words after it.
    """
    choose(COMMANDS, argv, prog=f"toolmem {command}")
    return 0
