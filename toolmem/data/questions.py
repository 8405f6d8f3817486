"""Questions about a population: who is asked about, what each field says, the dialogue of each.

`toolmem.data.dialogues` tells how it is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from toolmem.data.cast import Cast, Column, Facts
from toolmem.data.hashing import shuffled
from toolmem.data.people import Population
from toolmem.data.queries import QueryLanguage
from toolmem.data.template_fields import (
    Field,
    TurnSegments,
    helper_functions,
    render_turn,
    turn_segments,
)
from toolmem.data.template_files import Template
from toolmem.errors import ToolmemError


@dataclass(frozen=True)
class Turn:
    """One message of a dialogue.

    Args:
        role: ``user``, ``assistant`` or ``database``.
        text: what is said, without role tokens.
        fields: (start, stop, key) of each place of ``text`` that a field fills; none where it is not known.
    """

    role: str
    text: str
    fields: tuple[tuple[int, int, str], ...] = field(default=(), compare=False, repr=False)


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


class Block:
    """All questions of one template.

    Args:
        template: the template.
        facts: the population.
        language: what queries are written in.
        chosen: (questions,) the cast's questions to keep, or None for all.

    Attributes:
        start: number of the first question in the table.
        turns: the turns as segments.
        columns: field key -> what it says for each question.
        rows: (questions,) int64, the person asked about.
        attribute: what is asked.
    """

    def __init__(
        self,
        template: Template,
        facts: Facts,
        language: QueryLanguage,
        chosen: np.ndarray | None = None,
    ) -> None:
        self.template = template
        self.start = 0
        self._facts = facts
        self._helpers = helper_functions(language)
        facts.check(template)
        cast = facts.cast(template)
        if chosen is not None:
            cast = Cast(
                {who: rows[chosen] for who, rows in cast.rows.items()},
                None if cast.difference is None else cast.difference[chosen],
            )
        self._cast = cast
        self.rows = cast.rows[""]
        self.columns: dict[str, Column] = {}
        self._rendered: set[str] = set()  # keys of turns that are more than fields
        self.turns = tuple(self._turn(number, language) for number in range(len(template.turns)))
        self._answer = self._find_answer()
        self.attribute = self._answer.rpartition(".")[2] if template.permuted else template.name

    def __len__(self) -> int:
        return len(self.rows)

    def _turn(self, number: int, language: QueryLanguage) -> TurnSegments:
        source = self.template.turns[number]
        turn = turn_segments(self.template, source, language)
        if turn is None:
            key = f"{self.template.path}/{self.template.name}/{self.template.variant}/{number}"
            self._rendered.add(key)
            texts = [self._render(q, number) for q in range(len(self))]
            self.columns[key] = Column(key, texts, np.arange(len(texts)))
            return TurnSegments(source.role, (Field(key),))
        for segment in turn.segments:
            if isinstance(segment, Field):
                self.columns[segment.key] = self._facts.column(segment.key, self._cast)
        return turn

    def _find_answer(self) -> str:
        """The key of the field that is the answer, once it is sure that the last turn ends so."""
        template, last = self.template, self.turns[-1]
        fields = [segment for segment in last.segments if isinstance(segment, Field)]
        plain = bool(fields) and fields[-1].key.partition("/")[0] != str(template.path)
        key = template.answer
        if not key and turn_segments(template, template.turns[-1], "short") and fields:
            key = fields[-1].key
        if not key and template.name in self._facts.fields:
            key = template.name
        if not key:
            raise ToolmemError(
                f"templates: {template.where(template.turns[-1])}: the last turn does not plainly "
                "end with a field; say which is the answer at the top: `answer: FIELD`"
            )
        if key not in self.columns:
            who, _, name = key.rpartition(".")
            if who not in self._cast.rows or name not in self._facts.own_fields(template):
                raise ToolmemError(
                    f"templates: {template.where()}: `answer: {key}` is no field; there are "
                    f"{', '.join(sorted(self._facts.own_fields(template)))}"
                )
            self.columns[key] = self._facts.column(key, self._cast)
        column = self.columns[key]
        ends_plainly = plain and key == fields[-1].key and self._after(last) in ("", ".")
        for q in range(0 if ends_plainly else len(self)):
            answer = column.values[column.index[q]]
            said = self.text(q, -1)
            if not said.removesuffix(".").endswith(answer.removesuffix(".")):
                raise ToolmemError(
                    f"templates: {template.where(template.turns[-1])}: the last turn must end with "
                    f"the answer ({key}), then at most a full stop, but says {said!r}"
                )
        return key

    @staticmethod
    def _after(turn: TurnSegments) -> str:
        """The literal text after a turn's last field."""
        last = turn.segments[-1]
        return last if isinstance(last, str) else ""

    def text(self, q: int, turn: int) -> str:
        """One turn's text for question ``q``, from the segments."""
        parts = []
        for segment in self.turns[turn].segments:
            if isinstance(segment, Field):
                column = self.columns[segment.key]
                parts.append(column.values[column.index[q]])
            else:
                parts.append(segment)
        return "".join(parts)

    def fields(self, q: int, turn: int) -> tuple[tuple[int, int, str], ...]:
        """(start, stop, key) of each field of one turn's text for question ``q``.

        In a turn that Jinja renders whole, the name and the answer are looked for by what they say.
        """
        found: list[tuple[int, int, str]] = []
        at = 0
        for segment in self.turns[turn].segments:
            if isinstance(segment, str):
                at += len(segment)
                continue
            column = self.columns[segment.key]
            said = column.values[column.index[q]]
            if segment.key in self._rendered:
                found += self._looked_for(q, said)
            else:
                found.append((at, at + len(said), segment.key))
            at += len(said)
        return tuple(found)

    def _looked_for(self, q: int, said: str) -> list[tuple[int, int, str]]:
        column = self.columns[self._answer]
        texts = {"name": self._facts.population.names[self.rows[q]]}
        texts[self._answer] = column.values[column.index[q]].removesuffix(".")
        places = [(said.rfind(text), text, key) for key, text in texts.items() if text]
        return sorted((at, at + len(text), key) for at, text, key in places if at >= 0)

    def _render(self, q: int, turn: int) -> str:
        context = self._facts.context(self.template, self._cast, q)
        return render_turn(self.template, self.template.turns[turn], {**context, **self._helpers})

    def _dialogue(self, q: int, turns: Iterable[Turn]) -> Dialogue:
        column = self.columns[self._answer]
        return Dialogue(
            tuple(turns),
            answer=column.values[column.index[q]],
            attribute=self.attribute,
            person=self._facts.population.names[self.rows[q]],
        )

    def dialogue(self, q: int) -> Dialogue:
        """Question ``q`` of this block, rendered by Jinja."""
        return self._dialogue(
            q, [Turn(turn.role, self._render(q, n)) for n, turn in enumerate(self.turns)]
        )

    def assembled(self, q: int) -> Dialogue:
        """Question ``q`` of this block, put together from segments, which tell where its fields are."""
        return self._dialogue(
            q,
            [
                Turn(turn.role, self.text(q, n), self.fields(q, n))
                for n, turn in enumerate(self.turns)
            ],
        )


class QuestionTable:
    """Every dialogue that a template set tells about a population, addressed by number.

    Args:
        population: the people.
        blocks: the questions, template by template.
    """

    def __init__(self, population: Population, blocks: Iterable[Block]) -> None:
        self.population = population
        self.blocks = tuple(block for block in blocks if len(block))
        self._starts = [0]
        for block in self.blocks:
            block.start = self._starts[-1]
            self._starts.append(block.start + len(block))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def attributes(self) -> tuple[str, ...]:
        """What is asked, in the order of the blocks."""
        return tuple(dict.fromkeys(block.attribute for block in self.blocks))

    @cached_property
    def template_index(self) -> np.ndarray:
        """(questions,) int32, the number of each question's block."""
        sizes = [len(block) for block in self.blocks]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    @cached_property
    def person_index(self) -> np.ndarray:
        """(questions,) int64, the row of the person that each question asks about."""
        return np.concatenate([block.rows for block in self.blocks])

    def locate(self, index: int) -> tuple[Block, int]:
        """A question's block, and its number within the block."""
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        block = self.blocks[bisect_right(self._starts, index) - 1]
        return block, index - block.start

    def dialogue(self, index: int) -> Dialogue:
        """One dialogue, rendered by Jinja: the reference."""
        block, q = self.locate(index)
        return block.dialogue(q)

    def assembled(self, index: int) -> Dialogue:
        """The same dialogue from segments: no Jinja, much faster."""
        block, q = self.locate(index)
        return block.assembled(q)

    def dialogues(self, indices: Iterable[int] | None = None) -> Iterator[Dialogue]:
        """Dialogues by number (all of them by default), from segments."""
        for index in range(len(self)) if indices is None else indices:
            yield self.assembled(int(index))

    def sample(self, n: int, seed: int = 0) -> np.ndarray:
        """(n,) int64 numbers of distinct questions in random order (all, if there are fewer)."""
        return shuffled(seed, "sample of questions", np.arange(len(self)))[:n]
