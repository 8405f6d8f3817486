"""Synthetic people: unique names and four attributes each, made by hashing: prefixes never change.

    people(64)  ==  people(4096)[:64]             the same seed and alpha
    a person's facts depend on seed, alpha and the person's name alone

Every random choice is a hash of (seed, purpose, index) rather than a draw from a stream: any prefix
of a population is itself a population, nothing depends on a library's random numbers, and the whole
is a few array operations. Word lists are frozen in ``words/`` (NOTICE there names their source).

The seed sets aside 44 first and 39 last names. Up to `MAX_PEOPLE_WITH_UNSEEN` people use none of
them, and `unseen_population` builds its people from them alone: the out-of-distribution split, the
same one for every training size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np

from toolmem.data.hashing import choice, shuffled, uniform
from toolmem.errors import ToolmemError

ATTRIBUTES: tuple[str, ...] = ("birth_date", "birth_place", "current_address", "occupation")
RELATION = "friend"
FRIEND_WINDOW = 64  # a person's friend is one of this many people before

N_FIRST, N_LAST = 437, 388
RESERVED_FIRST, RESERVED_LAST = 44, 39
MAX_PEOPLE = N_FIRST * N_LAST  # 169,556
MAX_PEOPLE_WITH_UNSEEN = (N_FIRST - RESERVED_FIRST) * (N_LAST - RESERVED_LAST)  # 137,157
MAX_UNSEEN = RESERVED_FIRST * RESERVED_LAST  # 1,716

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
FIRST_YEAR, LAST_YEAR = 1950, 2000


@dataclass(frozen=True)
class Population:
    """People and their facts, column by column.

    Args:
        names: unique full names.
        attributes: column name -> one text a person, in the order of ``names``.
        kind: ``synthetic`` (made here), ``unseen`` (made here, names set aside) or ``table``.
        seed: what it was made from (None for a table).
        alpha: independence of the attributes it was made with (None for a table).
        source: the file it was read from, if any.
    """

    names: list[str]
    attributes: dict[str, list[str]]
    kind: str = "table"
    seed: int | None = None
    alpha: float | None = None
    source: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for attribute, values in self.attributes.items():
            if len(values) != len(self.names):
                raise ValueError(f"{attribute}: {len(values)} values for {len(self.names)} names")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_facts(self) -> int:
        """(person, attribute) pairs."""
        return len(self.names) * len(self.attributes)

    @property
    def relations(self) -> bool:
        """True when people have friends."""
        return RELATION in self.attributes

    @cached_property
    def index(self) -> dict[str, int]:
        """Name -> row."""
        return {name: row for row, name in enumerate(self.names)}

    def column(self, name: str) -> list[str]:
        """The texts of one column, ``name`` or an attribute."""
        return self.names if name == "name" else self.attributes[name]

    def head(self, n: int) -> Population:
        """The first ``n`` people (all of them when there are fewer)."""
        return replace(
            self,
            names=self.names[:n],
            attributes={key: values[:n] for key, values in self.attributes.items()},
        )

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the columns and all texts in order: equal for equal contents."""
        digest = hashlib.sha256()
        for key in ("name", *self.attributes):
            # Texts hold no control characters, so the separators cannot be imitated.
            digest.update("\x1f".join([key, *self.column(key)]).encode())
            digest.update(b"\x1e")
        return digest.hexdigest()


@cache
def words(name: str) -> tuple[str, ...]:
    """A frozen word list: first_names, last_names, countries, cities or occupations."""
    path = Path(__file__).parent / "words" / f"{name}.txt"
    return tuple(path.read_text(encoding="utf-8").splitlines())


@cache
def birth_dates() -> tuple[str, ...]:
    """Every birth date as text (``12 March 1987``): day 1-28, month 1-12, year 1950-2000."""
    return tuple(
        f"{day} {month} {year}"
        for year in range(FIRST_YEAR, LAST_YEAR + 1)
        for month in MONTHS
        for day in range(1, 29)
    )


@cache
def schema() -> dict[str, tuple[str, ...]]:
    """Attribute -> every value that a synthetic person can have."""
    return {
        "birth_date": birth_dates(),
        "birth_place": words("countries"),
        "current_address": words("cities"),
        "occupation": words("occupations"),
    }


def _pairs(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Numbers of all combinations of first and last names, int64 (len(first) * len(last),)."""
    return (first[:, None] * N_LAST + last[None, :]).ravel()


def _name_pools(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """First and last names for training, then first and last names set aside."""
    first = shuffled(seed, "first names", np.arange(N_FIRST))
    last = shuffled(seed, "last names", np.arange(N_LAST))
    n_first, n_last = N_FIRST - RESERVED_FIRST, N_LAST - RESERVED_LAST
    return first[:n_first], last[:n_last], first[n_first:], last[n_last:]


def _training_pairs(n: int, seed: int) -> np.ndarray:
    """The first ``n`` people's name pairs; names set aside come last of all."""
    first, last, *_ = _name_pools(seed)
    pairs = shuffled(seed, "people", _pairs(first, last))
    if n > len(pairs):
        every = np.arange(MAX_PEOPLE)
        rest = shuffled(seed, "people", np.setdiff1d(every, pairs, assume_unique=True))
        pairs = np.concatenate([pairs, rest])
    return pairs[:n]


def _facts(pairs: np.ndarray, seed: int, alpha: float) -> dict[str, list[str]]:
    attributes = {}
    last = pairs % N_LAST
    for attribute, values in schema().items():
        own = choice(seed, f"{attribute} of the person", pairs, len(values))
        family = choice(seed, f"{attribute} of the last name", last, len(values))
        independent = uniform(seed, f"{attribute} is independent", pairs) < alpha
        codes = np.where(independent, own, family)
        attributes[attribute] = [values[code] for code in codes.tolist()]
    return attributes


def _friends(names: list[str], seed: int) -> list[str]:
    """Each person's friend: one of the 64 people before; the first person's is the second.

    So a prefix of the population is closed under friendship.
    """
    if len(names) < 2:
        raise ToolmemError("relations: one person alone has no friend; ask for 2 people or more")
    row = np.arange(len(names))
    window = np.minimum(row, FRIEND_WINDOW)
    back = 1 + (uniform(seed, "friend", row) * window).astype(np.int64)
    friend = row - back
    friend[0] = 1
    return [names[index] for index in friend.tolist()]


def _build(pairs: np.ndarray, seed: int, alpha: float, relations: bool, kind: str) -> Population:
    first, last = words("first_names"), words("last_names")
    names = [f"{first[pair // N_LAST]} {last[pair % N_LAST]}" for pair in pairs.tolist()]
    attributes = _facts(pairs, seed, alpha)
    if relations:
        attributes[RELATION] = _friends(names, seed)
    return Population(names, attributes, kind=kind, seed=seed, alpha=alpha)


def _check(alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ToolmemError(
            f"alpha: {alpha} is not between 0 (all of a last name are alike) and 1 (independent)"
        )


def make_population(
    n: int, *, seed: int = 0, alpha: float = 1.0, relations: bool = False
) -> Population:
    """A population of ``n`` unique people, a prefix of every larger one of the same seed and alpha.

    With probability ``alpha`` an attribute is uniform over its values, else it is the one fixed for
    the person's last name (arXiv 2508.20755): 1 is independent, 0 most compressible.

    Args:
        n: people, 1 to 169,556 (437 first x 388 last names).
        seed: any integer.
        alpha: in [0, 1].
        relations: give each person a ``friend``, another person of the population.

    Raises:
        ToolmemError: more people than names, or alpha outside its range.
    """
    if n < 1:
        raise ToolmemError(f"people: {n} people cannot be made; ask for 1 or more")
    if n > MAX_PEOPLE:
        raise ToolmemError(
            f"people: {n:,} is more than the {MAX_PEOPLE:,} that {N_FIRST} first and {N_LAST} last "
            "names give; ask for fewer, or bring your own table (people: PATH)"
        )
    _check(alpha)
    return _build(_training_pairs(n, seed), seed, alpha, relations, "synthetic")


def unseen_population(
    n: int,
    *,
    training: Population | int,
    seed: int = 0,
    alpha: float = 1.0,
    relations: bool = False,
) -> Population:
    """People whose first and last names no person in training has (out of distribution).

    Args:
        n: people, at most 1,716 beside a synthetic population.
        training: the training population, or the number of people in a synthetic one. A synthetic
            population's own seed, alpha and relations are taken over. Beside a table the names are
            those of the word lists that occur in no name of it, and each column's values are drawn
            from the table's.
        seed: used when ``training`` is a number or a table.
        alpha: used when ``training`` is a number.
        relations: used when ``training`` is a number.

    Raises:
        ToolmemError: no, or too few, names are left that nobody in training has.
    """
    if n < 1:
        raise ToolmemError(f"unseen_people: {n} people cannot be made; ask for 1 or more")
    if isinstance(training, Population):
        if training.kind != "synthetic" or training.seed is None or training.alpha is None:
            return _unseen_of_table(n, training, seed)
        seed, alpha, relations = training.seed, training.alpha, training.relations
        training = len(training)
    _check(alpha)
    if training > MAX_PEOPLE_WITH_UNSEEN:
        raise ToolmemError(
            f"unseen_people: {training:,} people in training use every first and last name; up to "
            f"{MAX_PEOPLE_WITH_UNSEEN:,} people leave names aside for unseen ones"
        )
    if n > MAX_UNSEEN:
        raise ToolmemError(
            f"unseen_people: {n:,} is more than the {MAX_UNSEEN:,} people that the names set aside "
            f"give ({RESERVED_FIRST} first x {RESERVED_LAST} last names); ask for fewer"
        )
    *_, first, last = _name_pools(seed)
    pairs = shuffled(seed, "unseen people", _pairs(first, last))[:n]
    return _build(pairs, seed, alpha, relations, "unseen")


def _unseen_of_table(n: int, training: Population, seed: int) -> Population:
    used = {word.casefold() for name in training.names for word in name.split()}
    first, last = (
        np.array(
            [row for row, word in enumerate(words(key)) if word.casefold() not in used],
            dtype=np.int64,
        )
        for key in ("first_names", "last_names")
    )
    if n > len(first) * len(last):
        raise ToolmemError(
            f"unseen_people: {n:,} people cannot be named: the word lists have {len(first)} first "
            f"and {len(last)} last names that occur in no name of the table; ask for fewer"
        )
    pairs = shuffled(seed, "unseen people", _pairs(first, last))[:n]
    names = _build(pairs, seed, 1.0, False, "unseen").names
    attributes = {}
    for key, values in training.attributes.items():
        if training.index.keys() >= set(values):  # a relation: it must point to a person here
            attributes[key] = _friends(names, seed)
        else:
            rows = choice(seed, f"unseen {key}", pairs, len(values))
            attributes[key] = [values[row] for row in rows.tolist()]
    return Population(names, attributes, kind="unseen", seed=seed)
