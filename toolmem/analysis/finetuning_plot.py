"""Fine-tuning: recall of the facts, and what was forgotten of before, by setting, method and people.

Of a sweep over ``setting``, ``method`` and ``people`` whose runs were evaluated into their folders
(``runs/NAME/evaluation.json``, by ``toolmem evaluate --base BASE --out``: tasks ``arc_easy``, ``lambada`` and
``divergence``), and whose base was into the sweep's (``base.json``). A cell is empty where a run was not
evaluated so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.analysis.report import Panel
from toolmem.analysis.sources import Row, Source, SweepSource
from toolmem.data.people import ATTRIBUTES
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.analysis.page import Request

AXES = ("setting", "method", "people")
RECALL = "recall/exact_match"
COLUMNS = (
    "setting", "method", "people", "facts", "recall", "arc_easy_relative", "lambada_relative", "tv", "kl",
    "seconds",
)  # fmt: skip
BASE, EVALUATION = "base.json", "evaluation.json"


def applies(source: Source) -> bool:
    """To sweeps over the three axes."""
    return isinstance(source, SweepSource) and set(AXES) <= {a.name for a in source.recipe.axes}


def panels(source: Source, request: Request) -> list[Panel]:
    """The table of a sweep, with the numbers as they are in its CSV.

    Raises:
        ToolmemError: for what is no such sweep, or an evaluation that cannot be read.
    """
    if not isinstance(source, SweepSource) or not applies(source):
        raise ToolmemError(f"{source.path} is no sweep over {', '.join(AXES)}")
    base = _measured(source.path / BASE)
    records = [record(row, source.path, base) for row in source.done]
    shown = [[_shown(value) for value in one] for one in records]
    caption = (
        "Recall of fine-tuned models, and what they kept: accuracy at ARC-easy and LAMBADA in per cent of "
        "before, total variation and KL divergence of next-token distributions from before."
    )
    return [
        Panel(
            f"{source.recipe.name}_finetuning",
            caption,
            table=(list(COLUMNS), shown),
            records=(list(COLUMNS), records),
            heading="Fine-tuning",
            made=source.made(source.done),
        )
    ]


def record(row: Row, folder: Path, base: dict[str, float]) -> list[Any]:
    """What `COLUMNS` hold of a run; "" where there is nothing.

    Args:
        row: the run's result.
        folder: the sweep's.
        base: the base's measures by name.

    Raises:
        ToolmemError: for an evaluation that cannot be read.
    """
    settings = row["settings"]
    own = _measured(folder / "runs" / row["name"] / EVALUATION)
    people = int(settings["people"])

    def relative(measure: str) -> float | str:
        if measure not in own or not base.get(measure):
            return ""
        return 100 * own[measure] / base[measure]

    return [
        settings["setting"],
        settings["method"],
        people,
        people * len(ATTRIBUTES),
        row.get(RECALL, ""),
        relative("arc_easy/accuracy"),
        relative("lambada/accuracy"),
        own.get("divergence/tv", ""),
        own.get("divergence/kl", ""),
        row.get("seconds", ""),
    ]


def _measured(path: Path) -> dict[str, float]:
    """The numbers of a file of results, ``TASK/MEASURE``; none where there is no file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("tasks", {})
        return {
            f"{task}/{name}": float(one["value"])
            for task, result in found.items()
            for name, one in result["metrics"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolmemError(
            f"{path} is no file of `toolmem evaluate --out` ({error!r}): evaluate again, or remove it"
        ) from error


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
