"""Whom a template's questions are about, and what its fields say for each of them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from toolmem.data import queries
from toolmem.data.hashing import shuffled, uniform
from toolmem.data.people import Population
from toolmem.data.template_fields import UnknownFieldError, check_fields, helper_functions
from toolmem.data.template_files import Template
from toolmem.errors import ToolmemError


class Column(NamedTuple):
    """The texts that a field takes over a block's questions.

    Args:
        key: names ``values`` within one `QuestionTable`: equal keys, same list.
        values: distinct places to copy from (a population's column, mostly), not distinct texts.
        index: (questions,) int64; question q of the block says ``values[index[q]]``.
    """

    key: str
    values: list[str]
    index: np.ndarray  # type: ignore[assignment]  # hides tuple.index, which nobody needs


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
            UnknownFieldError: naming file, line and field.
        """
        for key in self._people_columns(template):
            if key not in self.fields:
                hint = " (relations: true gives people friends)" if key == "friend" else ""
                raise UnknownFieldError(
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
