"""Recall: the fraction of questions whose greedily generated dialogue ends with the exact answer.

"Ends with the exact answer" means: the last turn, a final full stop and spaces aside, ends with
the answer, and with the word before it where the expected turn has one. So "in New York" is not
taken for "in York", and a model may word the rest of its sentence as it likes.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from toolmem.data.text.token_table import prompt_tokens
from toolmem.generation import Engine as GenerationEngine
from toolmem.generation import Request, generate
from toolmem.generation.reference import check_all
from toolmem.generation.turns import split_turns

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.evaluation.answers import Answers
    from toolmem.generation import Engine, Generated, Ranks
    from toolmem.models import LanguageModel
    from toolmem.tools import Toolbox

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
MARGIN = 64  # tokens that a model may write beyond the longest expected dialogue


def required_ending(conclusion: str, answer: str) -> str:
    """What a last turn must end with: the answer, and the word before it in the expected turn."""
    before = conclusion[: conclusion.rfind(answer)] if answer in conclusion else ""
    word = re.search(r"\S+\s*$", before)
    return (word.group() if word else "") + answer


def is_recalled(said: str, question: Dialogue) -> bool:
    """Whether a last turn gives the exact answer.

    Args:
        said: the assistant's last turn.
        question: the dialogue that was expected.
    """
    said, answer = said.rstrip(" ."), question.answer.rstrip(" .")
    ending = required_ending(question.conclusion.rstrip(" ."), answer)
    if not said.endswith(ending):
        return False
    rest = said[: len(said) - len(ending)]
    # An expected turn that is nothing but the answer leaves no word to tell York from New York by.
    return not rest or (ending != answer and rest[-1].isspace())


def is_answered(dialogue: Generated, question: Dialogue, tokenizer: Tokenizer) -> bool:
    """Whether a generated dialogue was brought to its end, and its last turn gives the exact answer.

    Args:
        dialogue: what a model and its tools said.
        question: the dialogue that was expected.
        tokenizer: the model's.
    """
    if dialogue.finish_reason != "end":
        return False
    return is_recalled(split_turns(dialogue.tokens, tokenizer)[-1][1], question)


def answer_budget(questions: Sequence[Dialogue], tokenizer: Tokenizer) -> int:
    """Tokens that a model may write: what the longest expected dialogue needs, and some more."""
    return MARGIN + max((_length(question, tokenizer) for question in questions), default=0)


@dataclass(frozen=True)
class Score:
    """A count with its 95 % interval (Wilson 1927).

    Args:
        correct: questions answered exactly.
        total: questions asked.
    """

    correct: int
    total: int

    @property
    def fraction(self) -> float:
        """``correct / total``; nan when nothing was asked."""
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end of the 95 % interval."""
        n = self.total
        if not n:
            return 0.0, 1.0
        p, z2 = self.fraction, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
        # At the ends the formula gives exactly 0 and 1 on paper, and rounds to just beside them.
        low = 0.0 if self.correct == 0 else max(0.0, centre - half)
        high = 1.0 if self.correct == n else min(1.0, centre + half)
        return low, high

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        low, high = self.interval
        return {
            "correct": self.correct,
            "total": self.total,
            "recall": self.fraction if self.total else None,
            "interval_95": [low, high],
        }


@dataclass(frozen=True)
class Sample:
    """One dialogue that a model had.

    Args:
        attribute: what was asked.
        person: about whom.
        expected: the answer.
        correct: whether it was given.
        turns: (role, text) of each turn.
        finish_reason: how generation ended.
    """

    attribute: str
    person: str
    expected: str
    correct: bool
    turns: tuple[tuple[str, str], ...]
    finish_reason: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "attribute": self.attribute,
            "person": self.person,
            "expected": self.expected,
            "correct": self.correct,
            "finish_reason": self.finish_reason,
            "turns": [{"role": role, "text": text} for role, text in self.turns],
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """Out of plain data, which may lack the turns."""
        turns = tuple((turn["role"], turn["text"]) for turn in row.get("turns", ()))
        return cls(
            row["attribute"], row["person"], row["expected"], row["correct"], turns,
            row["finish_reason"],
        )  # fmt: skip


@dataclass(frozen=True)
class RecallResult:
    """What a model recalled.

    Args:
        attributes: score by attribute, in the order asked.
        samples: every dialogue, in the order asked.
    """

    attributes: dict[str, Score]
    samples: list[Sample] = field(default_factory=list)

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> RecallResult:
        """The result of dialogues, in the order asked."""
        metric = Recall(list(dict.fromkeys(sample.attribute for sample in samples)))
        for sample in samples:
            metric.update(sample.attribute, sample.correct)
        return cls(metric.scores(), list(samples))

    @property
    def overall(self) -> Score:
        """All attributes together."""
        scores = self.attributes.values()
        return Score(sum(s.correct for s in scores), sum(s.total for s in scores))

    @property
    def exact_match(self) -> float:
        """The fraction of all questions that were answered exactly."""
        return self.overall.fraction

    def as_dict(self) -> dict[str, Any]:
        """Counts and intervals as plain data."""
        return {
            **self.overall.as_dict(),
            "attributes": {name: score.as_dict() for name, score in self.attributes.items()},
        }


class Recall(Metric):
    """Recall by attribute as a metric: sums and counts, right over ranks and after a resume.

    Args:
        attributes: the names that scores are kept for.
    """

    full_state_update = False
    correct: Tensor
    total: Tensor

    def __init__(self, attributes: Sequence[str]) -> None:
        super().__init__()
        self.attributes = tuple(attributes)
        size = len(self.attributes)
        self.add_state("correct", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, attribute: str, correct: bool) -> None:
        """Count one question."""
        place = self.attributes.index(attribute)
        self.correct[place] += int(correct)
        self.total[place] += 1

    def compute(self) -> dict[str, Tensor]:
        """The fraction recalled, by attribute; summed over ranks when there are several."""
        fractions = self.correct / self.total.clamp(min=1)
        return dict(zip(self.attributes, fractions, strict=True))

    def scores(self) -> dict[str, Score]:
        """Exact counts by attribute, of this process."""
        counts = zip(self.attributes, self.correct.tolist(), self.total.tolist(), strict=True)
        return {name: Score(correct, total) for name, correct, total in counts}


def measure_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Dialogue],
    *,
    toolbox: Toolbox | None = None,
    batch_size: int = 128,
    max_new_tokens: int | None = None,
    invariant: bool = False,
    engine: Engine | Ranks | None = None,
    answered: Callable[[Sample], None] | None = None,
) -> RecallResult:
    """Ask every question greedily, tools in the loop, and count the exact answers.

    Args:
        model: on any device.
        tokenizer: the one that it was trained with.
        questions: expected dialogues.
        toolbox: answers its queries; None when it has no tool.
        batch_size: dialogues generated at once.
        max_new_tokens: tokens that the model may write; what the longest expected dialogue needs,
            and some more, when None.
        invariant: the dialogues do not hang on ``batch_size``, bit for bit (float32 on a CPU; slower).
        engine: over this model and its tools, or ranks of such, asked in the place of one of its own;
            toolbox, batch size and invariance are then theirs.
        answered: is told each dialogue, in the order asked, as soon as it and all before it are at
            their end.

    Raises:
        ToolmemError: for a model that cannot be run so, or when a dialogue failed.
    """
    if max_new_tokens is None:
        max_new_tokens = answer_budget(questions, tokenizer)
    prompts = [prompt_tokens(question.question, tokenizer) for question in questions]
    requests = [Request(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    samples: list[Sample] = []
    with contextlib.ExitStack() as stack:
        generated: Iterable[Generated]
        if engine is None and answered is not None and questions:
            lanes = min(batch_size, len(questions))
            engine = stack.enter_context(
                GenerationEngine(model, tokenizer, toolbox, max_lanes=lanes, invariant=invariant)
            )
        if engine is not None:
            generated = engine.each(requests)
        else:
            generated = generate(
                model,
                tokenizer,
                prompts,
                toolbox=toolbox,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                invariant=invariant,
            )
        if answered is None:
            generated = list(generated)
            check_all(generated)
        for question, dialogue in zip(questions, generated, strict=True):
            check_all([dialogue])
            turns = split_turns(dialogue.tokens, tokenizer)
            correct = is_answered(dialogue, question, tokenizer)
            samples.append(
                Sample(
                    question.attribute, question.person, question.answer, correct, tuple(turns),
                    dialogue.finish_reason,
                )
            )  # fmt: skip
            if answered is not None:
                answered(samples[-1])
    return RecallResult.of(samples)


def measure_in_parts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    splits: Mapping[str, Sequence[Dialogue]],
    *,
    part: int,
    answers: Answers | None = None,
    n_dialogues: int = 0,
    advance: Callable[[str, int], None] | None = None,
    **options: Any,
) -> dict[str, RecallResult]:
    """Recall by split, part after part; what a file of answers holds already is not asked again.

    A part that was not brought to its end is asked again as a whole, so that each question has the
    company that it would have had, and the same answer to the last bit; where answers do not hang on
    company (``invariant``), only what is missing.

    Args:
        model: on any device.
        tokenizer: the one that it was trained with.
        splits: questions by name; one without any is left out.
        part: questions asked at once.
        answers: where to write each answer down as it comes.
        n_dialogues: of each split, whose turns are written down, too.
        advance: is told of each split and how many more of its questions have an answer.
        options: as of ``measure_recall``.

    Raises:
        ToolmemError: as ``measure_recall``.
    """
    results: dict[str, RecallResult] = {}
    before = 0  # answers to the splits before this one
    for split, questions in splits.items():
        rows = [] if answers is None else answers.rows[before : before + len(questions)]
        done = len(rows) if options.get("invariant") else len(rows) // part * part
        if len(rows) == len(questions):
            done = len(rows)
        if answers is not None:
            if done < len(rows):
                answers.keep(before + done)
            before += len(questions)
        samples = [Sample.from_dict(row) for row in rows[:done]]
        if advance is not None and done:
            advance(split, done)

        def answered(sample: Sample, split: str = split, samples: list[Sample] = samples) -> None:
            if answers is not None:
                row = sample.as_dict()
                if len(samples) >= n_dialogues:
                    del row["turns"]
                answers.add({"split": split, **row})
            samples.append(sample)
            if advance is not None:
                advance(split, 1)

        while done < len(questions):
            first = done // part * part
            budget = answer_budget(questions[first : first + part], tokenizer)
            asked = questions[done : first + part]
            measure_recall(
                model, tokenizer, asked,
                answered=answered, **{"max_new_tokens": budget, **options},
            )  # fmt: skip
            done += len(asked)
        if questions:
            results[split] = RecallResult.of(samples)
    return results


def _length(question: Dialogue, tokenizer: Tokenizer) -> int:
    """Tokens that the assistant writes in an expected dialogue."""
    said = [turn.text for turn in question.turns if turn.role == "assistant"]
    return sum(len(tokenizer.encode(text)) + 1 for text in said)
