"""What recall is made of: other words, a tool that is off or wrong, a fact that was edited.

``asked``       the questions as they are
``rephrased``   in words that training never had
``tool_off``    every call is answered by an error: does the model know by itself?
``tool_wrong``  the tool gives another person's value: does the model trust it, or its weights?
``edited``      the facts have changed since training, and the tool knows: a model that asks must tell the new
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from toolmem.evaluation.recall import Sample, Score, measure_recall
from toolmem.tools.base import Answer, Toolbox, error_answer

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel

OFF = "the database cannot be reached"


@dataclass(frozen=True)
class Probed:
    """What came of one way of asking.

    Args:
        exact: the last turn ends with the answer that is right here (``toolmem.evaluation.is_recalled``).
        contains: it has that answer anywhere.
        other: it has the other value anywhere: the true one where the tool was wrong, the old one where it
            was edited; None where there is none.
    """

    exact: Score
    contains: Score
    other: Score | None = None

    def as_dict(self) -> dict[str, Any]:
        """Counts and intervals as plain data."""
        scores = {"exact": self.exact, "contains": self.contains, "other": self.other}
        return {name: score.as_dict() for name, score in scores.items() if score is not None}


class OffTool:
    """Answers every query by an error."""

    name = "off"

    def accepts(self, query: str) -> bool:
        """Whatever it is."""
        return True

    async def call(self, query: str) -> Answer:
        """The error."""
        return error_answer(OFF)

    def close(self) -> None:
        """Nothing is held."""


class WrongTool:
    """Asks another toolbox, and answers something else.

    Args:
        toolbox: that knows; the caller closes it.
        instead: its answer -> what is told in its place; an answer that is not in it is told as it is.
    """

    name = "wrong"

    def __init__(self, toolbox: Toolbox, instead: Mapping[str, str]) -> None:
        self.toolbox = toolbox
        self.instead = instead

    def accepts(self, query: str) -> bool:
        """Whatever it is."""
        return True

    async def call(self, query: str) -> Answer:
        """Another's value."""
        answer = await self.toolbox.call(query)
        return replace(answer, text=self.instead.get(answer.text, answer.text))

    def close(self) -> None:
        """Nothing is held."""


def rephrased(questions: Sequence[Dialogue], others: Iterable[Dialogue]) -> list[Dialogue]:
    """Questions in other words, with what is expected after them as it was.

    Args:
        questions: as they were trained on.
        others: dialogues of another template set (``biographies`` has five of each) about the same people;
            what has the same words is left out, as is what none of ``questions`` asks.
    """
    asked = {(one.attribute, one.person): one for one in questions}
    known = {one.question for one in questions}
    found = []
    for other in others:
        own = asked.get((other.attribute, other.person))
        if own is not None and other.question not in known:
            turn = replace(own.turns[0], text=other.question, fields=())
            found.append(replace(own, turns=(turn, *own.turns[1:])))
    return found


def values_instead(questions: Sequence[Dialogue]) -> dict[str, str]:
    """Answer -> another answer to a question of its kind; none where all of a kind have one answer."""
    kinds: dict[str, dict[str, None]] = {}
    for question in questions:
        kinds.setdefault(question.attribute, {})[question.answer] = None
    instead: dict[str, str] = {}
    for values in kinds.values():
        distinct = list(values)
        if len(distinct) < 2:
            continue
        for value, other in zip(distinct, [*distinct[1:], distinct[0]], strict=True):
            instead.setdefault(value, other)
    return instead


def with_answer(question: Dialogue, answer: str) -> Dialogue:
    """A question of which another answer is expected."""
    turns = tuple(
        replace(turn, text=turn.text.replace(question.answer, answer), fields=())
        if turn.role != "user"
        else turn
        for turn in question.turns
    )
    return replace(question, turns=turns, answer=answer)


def probe_recall(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: Sequence[Dialogue],
    *,
    toolbox: Toolbox | None = None,
    other_words: Iterable[Dialogue] = (),
    edited: tuple[Sequence[Dialogue], Toolbox] | None = None,
    **options: Any,
) -> dict[str, Probed]:
    """Recall asked in several ways; those that there is no tool or nothing to ask for are left out (a wrong
    value is another's: it takes two questions of a kind with two answers).

    Args:
        model: on any device.
        tokenizer: the one that it was trained with.
        questions: expected dialogues.
        toolbox: answers its queries; None for a model that asks nothing.
        other_words: dialogues about the same facts in words that training never had.
        edited: the same questions in the same order, with the answers after the edit, and a toolbox that
            knows them.
        options: as of ``measure_recall``.

    Raises:
        ToolmemError: as ``measure_recall``.
    """

    def ask(
        asked: Sequence[Dialogue], tools: Toolbox | None, others: Sequence[str] | None = None
    ) -> Probed:
        samples = measure_recall(model, tokenizer, asked, toolbox=tools, **options).samples
        found = [_said(sample) for sample in samples]
        exact = Score(sum(sample.correct for sample in samples), len(samples))
        return Probed(
            exact,
            _count(found, [question.answer for question in asked]),
            None if others is None else _count(found, others),
        )

    results = {"asked": ask(questions, toolbox)}
    words = rephrased(questions, other_words)
    if words:
        results["rephrased"] = ask(words, toolbox)
    own = [question.answer for question in questions]
    if toolbox is not None:
        results["tool_off"] = ask(questions, Toolbox([OffTool()]))
        instead = values_instead(questions)
        able = [question for question in questions if question.answer in instead]
        if able:
            wrong = [with_answer(question, instead[question.answer]) for question in able]
            true = [question.answer for question in able]
            results["tool_wrong"] = ask(wrong, Toolbox([WrongTool(toolbox, instead)]), true)
    if edited is not None:
        results["edited"] = ask(edited[0], edited[1], own)
    return results


def _said(sample: Sample) -> str:
    """The assistant's last turn; nothing where another spoke last."""
    role, text = sample.turns[-1] if sample.turns else ("", "")
    return text if role == "assistant" else ""


def _count(said: Sequence[str], wanted: Sequence[str]) -> Score:
    hits = sum(value.strip(" .") in text for text, value in zip(said, wanted, strict=True))
    return Score(hits, len(wanted))
