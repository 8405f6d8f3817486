"""Facts told as dialogues: a template set and a population make questions; questions make dialogues.

A template set is a folder of Jinja files (``template_files.py`` says how one is written). Told about
a population it gives a `QuestionTable`: every dialogue that the set can tell, addressed by number,
whatever its shape (one person and one attribute, two hops, two calls). Everything downstream
(tokenising all of them, sampling some) treats all sets alike:

    templates = TemplateSet.load("in_tool", query="short")     # a built-in set, or your own folder
    questions = templates.questions(population)
    len(questions)                      # number of dialogues
    questions.dialogue(17)              # slow and obvious: Jinja renders the template's turns
    questions.sample(100, seed=0)       # (100,) int64 numbers of distinct questions

The fast path never renders. The table is a sequence of blocks, one per template; question ``i`` is
question ``q = i - block.start`` of its block:

    for block in questions.blocks:
        for turn in block.turns:                    # tuple[TurnSegments, ...]
            for segment in turn.segments:           # each a str or a Field
                if isinstance(segment, str):        # the same text for every question of the block
                    ...
                else:                               # a text of its own for every question
                    column = block.columns[segment.key]     # Column(key, values, index)
                    column.values[column.index[q]]          # what question q says here

Within one table equal ``Column.key`` means the same ``values`` list, so it is encoded once and then
gathered by ``index``. Concatenating a turn's segments gives exactly the text that Jinja renders (a
test holds this for every built-in set). A template that uses more of Jinja than plain fields and
``query(...)`` is rendered when the table is built, and appears as turns of one `Field` each: nothing
downstream needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue.

    Args:
        role: ``user``, ``assistant`` or ``database``.
        text: what is said, without role tokens.
    """

    role: str
    text: str


@dataclass(frozen=True)
class Dialogue:
    """One question with its whole expected dialogue.

    Args:
        turns: the messages in order, the user's first.
        answer: the value asked for; the last turn ends with it (then at most a full stop).
        attribute: what is asked (the template's name), the group that recall is reported by.
        person: name of the person asked about.
    """

    turns: tuple[Turn, ...]
    answer: str
    attribute: str
    person: str

    @property
    def question(self) -> str:
        """The first turn's text."""
        return self.turns[0].text

    @property
    def conclusion(self) -> str:
        """The last turn's text."""
        return self.turns[-1].text


@dataclass(frozen=True)
class Field:
    """A place in a turn that says something else for every question.

    Args:
        key: which of the block's columns is said here.
    """

    key: str


@dataclass(frozen=True)
class TurnSegments:
    """One turn of a template, as what stays and what changes.

    Args:
        role: ``user``, ``assistant`` or ``database``.
        segments: literal text and fields in order.
    """

    role: str
    segments: tuple[str | Field, ...]


class Column(NamedTuple):
    """The texts that a field takes over a block's questions.

    Args:
        key: names ``values`` within one `QuestionTable`: equal keys, same list.
        values: distinct places to copy from (a population's column, mostly), not distinct texts.
        index: (questions,) int64; question q of the block says ``values[index[q]]``.
    """

    key: str
    values: list[str]
    index: np.ndarray
