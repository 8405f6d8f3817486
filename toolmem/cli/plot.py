"""``toolmem plot``: pictures of a run."""

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


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
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
