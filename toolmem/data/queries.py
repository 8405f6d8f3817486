"""The two query languages that an assistant can write, as text and as segments.

| language | one fact of one person |
|---|---|
| ``short`` | ``FIND birth_date FOR Ann Smith`` |
| ``sql`` | ``SELECT birth_date FROM people WHERE name = 'Ann Smith'`` |

A search the other way round (who was born then and lives there?) has no short form: SQL in both.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

QueryLanguage = Literal["short", "sql"]
LANGUAGES: tuple[str, ...] = get_args(QueryLanguage)

# What cannot stand as a bare column name: duckdb_keywords(), categories reserved and type_function.
_RESERVED = frozenset(
    """
    all analyse analyze and anti any array as asc asof asymmetric at authorization binary
    both by case cast check collate collation column columns concurrently constraint create
    cross default deferrable desc describe distinct do else end except false fetch for
    foreign freeze from full generated glob group having ilike in initially inner intersect
    into is isnull join lambda lateral leading left like limit map natural not notnull null
    offset on only or order outer overlaps pivot pivot_longer pivot_wider placing positional
    primary qualify references returning right select semi show similar some struct
    summarize symmetric table tablesample then to trailing true try_cast tuple union unique
    unpack unpivot using variadic verbose when where window with
    """.split()  # noqa: SIM905 (one word a line would be a page)
)


def identifier(name: str) -> str:
    """A column's name as SQL writes it: bare when it can be, else in double quotes."""
    if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) and name.lower() not in _RESERVED:
        return name
    return '"' + name.replace('"', '""') + '"'


def escape(text: str) -> str:
    """A text as it stands between SQL's single quotes."""
    return text.replace("'", "''")


def find(language: QueryLanguage, attribute: str, name: str) -> str:
    """The query for one attribute of one person."""
    if language == "short":
        return f"FIND {attribute} FOR {name}"
    return f"SELECT {identifier(attribute)} FROM people WHERE name = '{escape(name)}'"


def find_name(values: dict[str, str]) -> str:
    """The query for the name of the person who has these values."""
    where = " AND ".join(f"{identifier(key)} = '{escape(text)}'" for key, text in values.items())
    return f"SELECT name FROM people WHERE {where}"
