"""Questions about a population: who is asked about, what each field says, the dialogue of each.

`toolmem.data.dialogues` tells how it is used.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from toolmem.data import queries
from toolmem.data.hashing import shuffled, uniform
from toolmem.data.people import Population
from toolmem.data.queries import QueryLanguage
from toolmem.data.template_fields import (
    Field,
    TurnSegments,
    UnknownField,
    check_fields,
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


class Cast(NamedTuple):
    """Whom the questions of a template are about.

    Args:
        rows: the name a template has for a person ("" for the one asked about) -> (questions,)
            int64 rows of the population.
        difference: (questions,) int64 years between the two births, for ``people: older``.
    """

    rows: dict[str, np.ndarray]
    difference: np.ndarray | None = None


class Facts:
    """A population as templates see it: fields by name, people by the part they play.

    Args:
        population: the people.
    """

    def __init__(self, population: Population) -> None:
        self.population = population
        self.lists: dict[str, list[str]] = {"name": population.names, **population.attributes}
        if "birth_date" in self.lists and "birth_year" not in self.lists:
            years = [text.rpartition(" ")[2] for text in self.lists["birth_date"]]
            if all(year.isascii() and year.isdigit() for year in years):
                self.lists["birth_year"] = years
        self.fields = frozenset(self.lists)
        self._quoted: dict[str, str] = {}
        self._casts: dict[str, Cast] = {}

    def people(self, template: Template) -> dict[str, set[str]]:
        """The other people in a template -> their fields."""
        kind = template.people
        if kind == "each" or kind.startswith("unique "):
            return {}
        return {"other" if kind == "older" else kind: set(self.fields)}

    def own_fields(self, template: Template) -> set[str]:
        """The fields of a template that need no person's name before them."""
        return set(self.fields) | ({"difference"} if template.people == "older" else set())

    def check(self, template: Template) -> None:
        """Refuse a template that names a field that there is not.

        Raises:
            UnknownField: naming file, line and field.
        """
        for key in self._people_columns(template):
            if key not in self.fields:
                hint = " (relations: true gives people friends)" if key == "friend" else ""
                raise UnknownField(
                    f"templates: {template.where()}: `people: {template.people}` needs a column "
                    f"'{key}'{hint}; there are {', '.join(sorted(self.fields))}"
                )
        helpers = set(helper_functions("short"))
        check_fields(template, self.own_fields(template), self.people(template), helpers)

    @staticmethod
    def _people_columns(template: Template) -> list[str]:
        """The columns that the directive ``people`` needs."""
        kind = template.people
        if kind == "each":
            return []
        if kind == "older":
            return ["birth_year"]
        return [key.strip() for key in kind.removeprefix("unique ").split(",")]

    def cast(self, template: Template) -> Cast:
        """Whom a template is asked about.

        Raises:
            ToolmemError: when its ``people:`` names no column of names.
        """
        if template.people not in self._casts:
            self._casts[template.people] = self._make_cast(template)
        return self._casts[template.people]

    def _make_cast(self, template: Template) -> Cast:
        kind, where = template.people, template.where()
        everyone = np.arange(len(self.population))
        if kind == "each":
            return Cast({"": everyone})
        if kind == "older":
            return self._older()
        if kind.startswith("unique "):
            keys = self._people_columns(template)
            values = list(zip(*(self.lists[key] for key in keys), strict=True))
            counts = Counter(values)
            alone = [row for row, value in enumerate(values) if counts[value] == 1]
            return Cast({"": np.array(alone, np.int64)})
        index = self.population.index
        named = [index.get(name, -1) for name in self.lists[kind]]
        if -1 in named:
            row = named.index(-1)
            raise ToolmemError(
                f"templates: {where}: `people: {kind}` needs names in column '{kind}', but row "
                f"{row + 1} says {self.lists[kind][row]!r}, who is not in the population"
            )
        return Cast({"": everyone, kind: np.array(named, np.int64)})

    def _older(self) -> Cast:
        """Each person with the next one, in a fixed random order, who was born in another year."""
        years = np.array(self.lists["birth_year"], np.int64)
        order = shuffled(0, "pairs", np.arange(len(years)))
        other = np.roll(order, -1)
        for step in range(2, min(len(order), 64)):
            same = years[order] == years[other]
            if not same.any():
                break
            other[same] = np.roll(order, -step)[same]
        differ = years[order] != years[other]
        first, second = order[differ], other[differ]
        swap = years[first] > years[second]
        older, younger = np.where(swap, second, first), np.where(swap, first, second)
        pairs = np.unique(np.stack([older, younger], 1), axis=0)  # two people meet only once
        older, younger = np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
        return Cast({"": older, "other": younger}, years[younger] - years[older])

    def column(self, key: str, cast: Cast) -> Column:
        """What a field says for each question of a cast."""
        field, _, quoted = key.partition("|")
        if field == "difference" and cast.difference is not None:
            span = int(cast.difference.max(initial=0)) + 1
            return Column("difference", [str(years) for years in range(span)], cast.difference)
        if field in self.lists:  # a column's own name may hold a full stop
            who, name = "", field
        else:
            who, _, name = field.partition(".")
        source = self._quote(name) if quoted else name
        return Column(source, self.lists[source], cast.rows[who])

    def _quote(self, name: str) -> str:
        """The column whose texts are fit to stand between SQL's quotes (mostly the same one)."""
        if name not in self._quoted:
            self._quoted[name] = name
            if any("'" in text for text in self.lists[name]):
                self._quoted[name] = f"{name}|sql"
                self.lists[f"{name}|sql"] = [queries.escape(text) for text in self.lists[name]]
        return self._quoted[name]

    def context(self, template: Template, cast: Cast, q: int) -> dict[str, Any]:
        """The fields that Jinja fills in for question ``q``."""
        context: dict[str, Any] = {}
        for who, rows in cast.rows.items():
            row = rows[q]
            person = {field: self.lists[field][row] for field in self.fields}
            if who:
                context[who] = SimpleNamespace(**person)
            else:
                context = {**person, **context}
        if cast.difference is not None:
            context["difference"] = str(cast.difference[q])
        constants = dict(template.constants)
        if "value" in constants:
            constants["value"] = context[constants["value"]]
        return {**context, **constants}


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
            texts = [self._render(q, number) for q in range(len(self))]
            self.columns[key] = Column(key, texts, np.arange(len(texts)))
            return TurnSegments(source.role, (Field(key),))
        for segment in turn.segments:
            if isinstance(segment, Field):
                self.columns[segment.key] = self._facts.column(segment.key, self._cast)
        return turn

    def _find_answer(self) -> str:
        """The key of the field that is the answer, once it is sure that the last turn ends with it."""
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
                f"templates: {template.where(template.turns[-1])}: the last turn does not plainly end "
                "with a field; say which is the answer at the top: `answer: FIELD`"
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
                    f"templates: {template.where(template.turns[-1])}: the last turn must end with the "
                    f"answer ({key}), then at most a full stop, but says {said!r}"
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

    def _render(self, q: int, turn: int) -> str:
        context = self._facts.context(self.template, self._cast, q)
        return render_turn(self.template, self.template.turns[turn], {**context, **self._helpers})

    def _dialogue(self, q: int, texts: Iterable[str]) -> Dialogue:
        column = self.columns[self._answer]
        return Dialogue(
            tuple(Turn(turn.role, text) for turn, text in zip(self.turns, texts, strict=True)),
            answer=column.values[column.index[q]],
            attribute=self.attribute,
            person=self._facts.population.names[self.rows[q]],
        )

    def dialogue(self, q: int) -> Dialogue:
        """Question ``q`` of this block, rendered by Jinja."""
        return self._dialogue(q, [self._render(q, turn) for turn in range(len(self.turns))])

    def assembled(self, q: int) -> Dialogue:
        """Question ``q`` of this block, put together from segments."""
        return self._dialogue(q, [self.text(q, turn) for turn in range(len(self.turns))])


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
        """Numbers of ``n`` distinct questions in random order (of all, if there are fewer), int64."""
        return shuffled(seed, "sample of questions", np.arange(len(self)))[:n]


def choose_variants(
    people: np.ndarray, variant: int, n_variants: int, keep: int, seed: int, name: str
) -> np.ndarray:
    """Which questions of a variant to keep so that each person is asked in ``keep`` of them.

    Args:
        people: (questions,) rows of the people asked about.
        variant: this variant's number.
        n_variants: variants of the question.
        keep: how many of them a person gets.
        seed: of the choice.
        name: the question; each makes its own choice.

    Returns:
        Numbers of the questions kept, int64.
    """
    draws = [uniform(seed, f"variant {other} of {name}", people) for other in range(n_variants)]
    rank = np.sum([draw < draws[variant] for draw in draws], axis=0)
    return np.flatnonzero(rank < keep)
