"""What an evaluation is made of, as the command line and recipes name it: ``recall,arc_easy=FILE.jsonl``."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.evaluation.examples import ask_in_parts
from toolmem.evaluation.measures import Estimate, Measure, Row, estimates

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.evaluation.answers import Answers
    from toolmem.evaluation.divergence import Base
    from toolmem.evaluation.examples import Examples
    from toolmem.evaluation.perplexity import Text
    from toolmem.models import LanguageModel

RECALL = "recall"
TEXTS = ("perplexity", "divergence")  # of running text: name=TEXT


@dataclass(frozen=True)
class TaskSpec:
    """One part of an evaluation.

    Args:
        name: as in results.
        recipe: a recipe's name or file, or ``recall``, ``perplexity``, ``divergence``.
        path: what is asked: JSONL, or text; None for recall.
    """

    name: str
    recipe: str
    path: str | None = None

    @property
    def kind(self) -> str:
        """``recall``, ``perplexity``, ``divergence``, or ``task``."""
        return self.recipe if self.recipe in (RECALL, *TEXTS) else "task"


@dataclass(frozen=True)
class Asking:
    """How an evaluation asks.

    Args:
        batch_size: questions asked at once.
        invariant: numbers do not hang on it, bit for bit.
        limit: the first so many questions of a task, or windows of a text; all when None.
        n_shots: examples before each question; what the task's recipe says when None.
        chat: ask in the model's chat format; what the recipe says when None.
        window: tokens that a model looks at of a text; what it can, and 1024 at most, when None.
        stride: tokens of a text by which the window moves; the window when None.
    """

    batch_size: int = 32
    invariant: bool = False
    limit: int | None = None
    n_shots: int | None = None
    chat: bool | None = None
    window: int | None = None
    stride: int | None = None


def parse_tasks(text: str | Sequence[str]) -> list[TaskSpec]:
    """The parts of an evaluation.

    Args:
        text: names separated by commas, all but ``recall`` with ``=FILE``; or a list of such.

    Raises:
        ToolmemError: for a part without its file, or two of one name.
    """
    words = text.split(",") if isinstance(text, str) else list(text)
    found: list[TaskSpec] = []
    for word in filter(None, map(str.strip, words)):
        name, equals, path = word.partition("=")
        if name == RECALL and not equals:
            found.append(TaskSpec(RECALL, RECALL))
            continue
        if not path or name == RECALL:
            raise ToolmemError(
                f"tasks: unknown task {word!r}: write recall, or NAME=FILE, as arc_easy=FILE.jsonl, "
                f"perplexity=FILE.txt, or my.yaml=FILE.jsonl"
            )
        short = Path(name).stem if name.endswith((".yaml", ".yml")) else name
        if not re.fullmatch(r"[\w.-]+", short):
            raise ToolmemError(f"tasks: {short!r} is no name: use letters, digits and _")
        found.append(TaskSpec(short, name, path))
    if not found:
        raise ToolmemError("tasks: there is none: write recall, or NAME=FILE")
    names = [spec.name for spec in found]
    for name in names:
        if names.count(name) > 1:
            raise ToolmemError(
                f"tasks: {name} is there twice: results are by name, so give a copy of the recipe another"
            )
    return found


def make_examples(
    spec: TaskSpec,
    model: LanguageModel,
    tokenizer: Tokenizer,
    asking: Asking,
    base: Base | None = None,
) -> Examples:
    """What a part asks of a model.

    Args:
        spec: any part but recall.
        model: in evaluation mode.
        tokenizer: the model's.
        asking: how.
        base: what divergence is from.

    Raises:
        ToolmemError: for files that are empty or malformed, naming row and field.
    """
    assert spec.path is not None
    if spec.kind == "task":
        from toolmem.evaluation.tasks import Asked, Task, find_recipe

        recipe = find_recipe(spec.recipe, spec.path)
        recipe = recipe.asking(n_shots=asking.n_shots, chat=asking.chat)
        task = Task.read(spec.name, recipe, spec.path, limit=asking.limit)
        return Asked(
            task, model, tokenizer, batch_size=asking.batch_size, invariant=asking.invariant
        )
    text = text_of(spec, model, tokenizer, asking)
    if spec.kind == "perplexity":
        from toolmem.evaluation.perplexity import Perplexity

        return Perplexity(text, model, invariant=asking.invariant)
    from toolmem.evaluation.divergence import Divergence

    if base is None:
        raise ToolmemError("divergence: from what? Name the base's checkpoint by --base")
    return Divergence(text, model, base, invariant=asking.invariant)


def text_of(spec: TaskSpec, model: LanguageModel, tokenizer: Tokenizer, asking: Asking) -> Text:
    """The text of a part, cut for a model; arguments as ``make_examples``."""
    from toolmem.evaluation.perplexity import read_text

    assert spec.path is not None
    return read_text(
        spec.path,
        tokenizer,
        longest=min(model.max_seq_len, asking.window or 1024),
        stride=asking.stride,
        limit=asking.limit,
    )


@dataclass(frozen=True)
class PartResult:
    """What came of one part.

    Args:
        name: as in results.
        kind: which says by what it is measured (``measures_of``).
        estimates: by measure, the one to look at first in front.
        rows: example by example.
        asked: digest of what was asked.
        seconds: that it took.
        more: what else there is to tell, plain data.
    """

    name: str
    kind: str
    estimates: dict[str, Estimate]
    rows: list[dict[str, Any]]
    asked: str
    seconds: float
    more: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, without the rows."""
        return {
            "kind": self.kind,
            "examples": len(self.rows),
            "asked": self.asked,
            "metrics": {name: one.as_dict() for name, one in self.estimates.items()},
            "seconds": round(self.seconds, 3),
            **self.more,
        }

    def metrics(self) -> dict[str, float]:
        """Numbers by ``NAME/MEASURE``, and the ends of their intervals."""
        found: dict[str, float] = {}
        for name, one in self.estimates.items():
            key = f"{self.name}/{name}"
            found |= {key: one.value, f"{key}/low": one.low, f"{key}/high": one.high}
        return found


def measure_part(
    spec: TaskSpec,
    examples: Examples,
    asking: Asking,
    *,
    answers: Answers | None = None,
    advance: Callable[[int], None] | None = None,
) -> PartResult:
    """Ask one part, and reckon its measures.

    Args:
        spec: any part but recall.
        examples: what it asks (``make_examples``).
        asking: how.
        answers: where to write each example down as it comes; what is there is not asked again.
        advance: is told of how many more examples there are numbers.
    """
    began = time.perf_counter()
    rows = ask_in_parts(
        examples,
        part=asking.batch_size,
        answers=answers,
        invariant=asking.invariant,
        advance=advance,
    )
    seconds = time.perf_counter() - began
    kind = spec.kind
    more: dict[str, Any] = {}
    if kind == "task":
        from toolmem.evaluation.tasks import Asked

        assert isinstance(examples, Asked)
        kind = examples.task.recipe.kind
    elif kind == "divergence":
        from toolmem.evaluation.divergence import by_position

        more = {"by_position": by_position(rows)}
    found = estimates(examples.measures, units(rows))
    return PartResult(spec.name, kind, found, rows, examples.digest(), seconds, more)


def measures_of(kind: str) -> tuple[Measure, ...]:
    """The measures of what a file of results calls ``kind``."""
    from toolmem.evaluation.divergence import MEASURES as OF_DIVERGENCE
    from toolmem.evaluation.measures import share
    from toolmem.evaluation.perplexity import MEASURES as OF_TEXT
    from toolmem.evaluation.tasks.asking import MEASURES

    others = {
        RECALL: (share("exact_match"),),
        "perplexity": OF_TEXT,
        "divergence": OF_DIVERGENCE,
    }
    found: dict[str, tuple[Measure, ...]] = {**MEASURES, **others}
    if kind not in found:
        raise ToolmemError(f"results of kind {kind!r} are of another version of toolmem")
    return found[kind]


def units(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows that are drawn anew for intervals: of several texts each text, else the rows themselves."""
    if not rows or "document" not in rows[0]:
        return [dict(row) for row in rows]
    if len({row["document"] for row in rows}) < 2:
        return [dict(row) for row in rows]
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        unit = found.setdefault(row["document"], {"document": row["document"]})
        for key, value in row.items():
            if value is None or unit.get(key, 0) is None:  # not known of all
                unit[key] = None
            elif isinstance(value, int | float) and key not in ("document", "start"):
                unit[key] = unit.get(key, 0) + value
    return list(found.values())
