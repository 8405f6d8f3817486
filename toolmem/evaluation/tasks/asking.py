"""A task asked of a model, example by example, in the order of length.

Rows are plain data: ``line`` of the task's file, ``scores`` of the example (what measures average), and what
came of it: log-likelihoods in nats, or what the model said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from toolmem.errors import ToolmemError
from toolmem.evaluation.answers import digest_of
from toolmem.evaluation.measures import (
    Measure,
    Row,
    calibration_error,
    mean,
    ratio,
    share,
)
from toolmem.evaluation.scoring import Likelihood, Pair, Scorer
from toolmem.evaluation.tasks.items import Choice, Cloze, Item, Question
from toolmem.evaluation.tasks.matching import cut, matches
from toolmem.evaluation.tasks.prompts import Prompter, drawn_shots
from toolmem.generation.engine import Engine
from toolmem.generation.reference import check_all
from toolmem.generation.requests import Request

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.evaluation.tasks.recipes import TaskRecipe
    from toolmem.models import LanguageModel

MULTIPLE_CHOICE = (
    share("accuracy"),
    share("accuracy_norm"),
    share("accuracy_bytes"),
    share("accuracy_tokens"),
    mean("gold_probability"),
    calibration_error(),
)
GENERATION = (share("exact_match"), share("contains"), mean("f1"))


def _loss(row: Row) -> float:
    return -float(row["log_prob"])


CLOZE = (
    share("accuracy"),
    ratio("perplexity", _loss, lambda row: 1.0, np.exp),
    ratio("token_perplexity", _loss, lambda row: row["tokens"], np.exp),
    ratio("bits_per_byte", lambda row: _loss(row) / math.log(2), lambda row: row["bytes"]),
)
MEASURES: dict[str, tuple[Measure, ...]] = {
    "multiple_choice": MULTIPLE_CHOICE,
    "cloze": CLOZE,
    "generation": GENERATION,
}
METRIC = {"multiple_choice": "accuracy", "cloze": "accuracy", "generation": "exact_match"}


@dataclass(frozen=True)
class Task:
    """A task with its questions.

    Args:
        name: as in results.
        recipe: how it asks.
        items: its questions.
        shots: examples that stand before each.
    """

    name: str
    recipe: TaskRecipe
    items: tuple[Item, ...]
    shots: tuple[Item, ...] = ()

    @classmethod
    def read(cls, name: str, recipe: TaskRecipe, path: str, *, limit: int | None = None) -> Task:
        """A task of a file.

        Args:
            name: as in results.
            recipe: how it asks.
            path: its JSONL file.
            limit: the first so many questions alone; all when None.

        Raises:
            ToolmemError: for a file that is empty or malformed, naming row and field.
        """
        shots, items = drawn_shots(recipe, recipe.items(path))
        return cls(name, recipe, tuple(items[:limit]), tuple(shots))

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The numbers that come of it, the one to look at first in front."""
        found = MEASURES[self.recipe.kind]
        first = self.recipe.metric or METRIC[self.recipe.kind]
        if first not in (measure.name for measure in found):
            names = ", ".join(measure.name for measure in found)
            raise ToolmemError(f"{self.recipe.source}: metric is {first!r}: choose from {names}")
        return tuple(sorted(found, key=lambda measure: measure.name != first))

    def digest(self) -> str:
        """Of all that is asked."""
        return digest_of([repr(self.recipe), *map(repr, self.shots), *map(repr, self.items)])


class Asked:
    """A task for one model: an ``Examples``.

    Args:
        task: what is asked.
        model: of any architecture, on any device.
        tokenizer: the one that it was trained with.
        batch_size: questions asked at once.
        invariant: numbers do not hang on ``batch_size``, bit for bit (float32 on a CPU; slower).

    Raises:
        ToolmemError: for a question that the model cannot take, naming its line.
    """

    def __init__(
        self,
        task: Task,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 32,
        invariant: bool = False,
    ) -> None:
        self.task = task
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.measures = task.measures
        self._prompter = Prompter(task.recipe, tokenizer, task.shots)
        self._invariant = invariant

    def __len__(self) -> int:
        return len(self.task.items)

    def digest(self) -> str:
        """Of all that is asked."""
        return self.task.digest()

    @cached_property
    def _scorer(self) -> Scorer:
        scorer = Scorer(self.model, invariant=self._invariant)
        scorer.share([pair for pairs in self._pairs for pair in pairs])
        return scorer

    @cached_property
    def _pairs(self) -> list[list[Pair]]:
        """What is scored, item by item."""
        found = []
        for item in self.task.items:
            texts: list[tuple[str, str]] = []
            if isinstance(item, Choice):
                texts = [(option.prompt, option.text) for option in item.options]
            elif isinstance(item, Cloze):
                texts = [(item.prompt, item.text)]
            found.append([self._told(item, self._pair, item, *both) for both in texts])
        return found

    @cached_property
    def _prompts(self) -> list[list[int]]:
        """What is gone on with, item by item."""
        longest = self.model.max_seq_len - self.task.recipe.max_new_tokens
        if longest < 1:
            raise ToolmemError(
                f"{self.task.recipe.source}: max_new_tokens {self.task.recipe.max_new_tokens} leaves no room "
                f"for a question in the model's max_seq_len {self.model.max_seq_len}"
            )
        return [
            self._prompter.prompt(item.preamble, item.prompt, longest) for item in self._questions
        ]

    @property
    def _questions(self) -> list[Question]:
        return [item for item in self.task.items if isinstance(item, Question)]

    def _pair(self, item: Item, prompt: str, text: str) -> Pair:
        return self._prompter.pair(item.preamble, prompt, text, self.model.max_seq_len)

    def _told(self, item: Item, make: Callable[..., Any], *given: Any) -> Any:
        try:
            return make(*given)
        except ToolmemError as error:
            raise ToolmemError(f"{self.task.name}, line {item.line}: {error}") from error

    @cached_property
    def _order(self) -> list[int]:
        """Numbers of items, the longest first: memory is short at the beginning, if at all."""
        if self.task.recipe.kind == "generation":
            lengths = [len(prompt) for prompt in self._prompts]
        else:
            lengths = [max(len(pair.context) for pair in pairs) for pairs in self._pairs]
        return sorted(range(len(lengths)), key=lambda number: -lengths[number])

    def ask(self, start: int, stop: int) -> Iterable[dict[str, Any]]:
        """Rows of the items from ``start`` to ``stop`` in the order of length."""
        numbers = self._order[start:stop]
        if self.task.recipe.kind == "generation":
            return self._generated(numbers)
        pairs = [self._pairs[number] for number in numbers]
        scored = iter(self._scorer.score([pair for own in pairs for pair in own]))
        return [
            self._scored(self.task.items[number], [next(scored) for _ in own])
            for number, own in zip(numbers, pairs, strict=True)
        ]

    def _scored(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Any]:
        totals = [one.total for one in found]
        if isinstance(item, Cloze):
            [one] = found
            return {
                "line": item.line,
                "scores": {"accuracy": int(one.greedy)},
                "log_prob": totals[0],
                "tokens": len(one.log_probs),
                "bytes": len(
                    (self.task.recipe.delimiter + item.text).encode("utf-8", "surrogatepass")
                ),
            }
        assert isinstance(item, Choice)
        texts = [option.text for option in item.options]
        chosen = {
            "accuracy": totals,
            "accuracy_norm": _each(totals, [len(text) for text in texts]),
            "accuracy_bytes": _each(
                totals, [len(text.encode("utf-8", "surrogatepass")) for text in texts]
            ),
            "accuracy_tokens": _each(totals, [len(one.log_probs) for one in found]),
        }
        scores: dict[str, float] = {
            name: int(int(np.argmax(values)) in item.gold) for name, values in chosen.items()
        }
        chances = np.exp(np.array(totals) - np.logaddexp.reduce(totals))
        scores["gold_probability"] = float(chances[list(item.gold)].sum())
        return {
            "line": item.line,
            "scores": scores,
            "gold": list(item.gold),
            "log_probs": totals,
            "confidence": float(chances.max()),
        }

    def _generated(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        recipe, questions = self.task.recipe, self._questions
        requests = [
            Request(
                self._prompts[number],
                max_new_tokens=recipe.max_new_tokens,
                stop_strings=recipe.stop,
                use_tools=False,
            )
            for number in numbers
        ]
        lanes = min(self.batch_size, len(requests))
        with Engine(
            self.model, self.tokenizer, max_lanes=lanes, invariant=self._invariant
        ) as engine:
            for number, dialogue in zip(numbers, engine.each(requests), strict=True):
                check_all([dialogue])
                written = dialogue.tokens[dialogue.prompt_length :]
                if dialogue.finish_reason in ("end", "tool_calls"):
                    written = written[:-1]
                said = cut(self.tokenizer.decode(written).lstrip(), recipe.stop).strip()
                item = questions[number]
                yield {"line": item.line, "scores": matches(said, item.answers), "said": said}


def _each(totals: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [total / max(1, size) for total, size in zip(totals, sizes, strict=True)]
