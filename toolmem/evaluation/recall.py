"""Recall: the fraction of questions whose greedily generated dialogue ends with the exact answer.

"Ends with the exact answer" means: the last turn, a final full stop and spaces aside, ends with
the answer, and with the word before it where the expected turn has one. So "in New York" is not
taken for "in York", and a model may word the rest of its sentence as it likes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from toolmem.data.text.token_table import prompt_tokens
from toolmem.generation import Request, generate
from toolmem.generation.reference import check_all
from toolmem.generation.turns import split_turns

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer
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


@dataclass(frozen=True)
class RecallResult:
    """What a model recalled.

    Args:
        attributes: score by attribute, in the order asked.
        samples: every dialogue, in the order asked.
    """

    attributes: dict[str, Score]
    samples: list[Sample] = field(default_factory=list)

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

    Raises:
        ToolmemError: for a model that cannot be run so, or when a dialogue failed.
    """
    metric = Recall(list(dict.fromkeys(question.attribute for question in questions)))
    if max_new_tokens is None:
        max_new_tokens = answer_budget(questions, tokenizer)
    prompts = [prompt_tokens(question.question, tokenizer) for question in questions]
    if engine is not None:
        requests = [Request(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
        generated = list(engine.each(requests))
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
    check_all(generated)
    samples = []
    for question, dialogue in zip(questions, generated, strict=True):
        turns = split_turns(dialogue.tokens, tokenizer)
        correct = is_answered(dialogue, question, tokenizer)
        metric.update(question.attribute, correct)
        samples.append(
            Sample(
                question.attribute, question.person, question.answer, correct, tuple(turns),
                dialogue.finish_reason,
            )
        )  # fmt: skip
    return RecallResult(metric.scores(), samples)


def _length(question: Dialogue, tokenizer: Tokenizer) -> int:
    """Tokens that the assistant writes in an expected dialogue."""
    said = [turn.text for turn in question.turns if turn.role == "assistant"]
    return sum(len(tokenizer.encode(text)) + 1 for text in said)
