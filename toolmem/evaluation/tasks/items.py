"""What a task asks, as text: the three kinds of questions."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("multiple_choice", "cloze", "generation")


@dataclass(frozen=True)
class Option:
    """One of several continuations.

    Args:
        prompt: what stands before it.
        text: what is scored, as it would be said.
    """

    prompt: str
    text: str


@dataclass(frozen=True)
class Choice:
    """A question with several answers to choose from.

    Args:
        line: of its file, from 1.
        options: two at least.
        gold: numbers of those that are right, from 0.
        preamble: what stands before everything, examples included.
    """

    line: int
    options: tuple[Option, ...]
    gold: tuple[int, ...]
    preamble: str = ""


@dataclass(frozen=True)
class Cloze:
    """A text to be gone on with as it does.

    Args:
        line: of its file, from 1.
        prompt: the context.
        text: what is scored.
        preamble: what stands before everything, examples included.
    """

    line: int
    prompt: str
    text: str
    preamble: str = ""


@dataclass(frozen=True)
class Question:
    """A question to be answered in words.

    Args:
        line: of its file, from 1.
        prompt: the question.
        answers: any of which is right, one at least; the first is shown as an example.
        preamble: what stands before everything, examples included.
    """

    line: int
    prompt: str
    answers: tuple[str, ...]
    preamble: str = ""


Item = Choice | Cloze | Question


def shown(item: Item) -> tuple[str, str]:
    """A question and its answer, to be shown as an example."""
    if isinstance(item, Choice):
        option = item.options[item.gold[0]]
        return option.prompt, option.text
    return item.prompt, item.text if isinstance(item, Cloze) else item.answers[0]
