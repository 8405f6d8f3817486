"""``toolmem facts``: build a factbase, or show one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.data.people import Population


def build(
    people: int | str, out: str, seed: int = 0, alpha: float = 1.0, relations: bool = False
) -> None:
    """Write people and their facts as one DuckDB file.

    Args:
        people: how many to make up, or the path of your own table (CSV, Parquet, JSONL, DuckDB).
        out: the file to write.
        seed: which people are made up.
        alpha: how independent attributes are, from 0 (fixed by the last name) to 1.
        relations: give each person a friend.
    """
    from toolmem.data.factbase import build_factbase

    population = _population(people, seed, alpha, relations)
    fingerprint = build_factbase(population, out)
    stderr().print(
        f"{out}: {len(population):,} people, {population.n_facts:,} facts, "
        f"fingerprint {fingerprint[:12]}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _population(people: int | str, seed: int, alpha: float, relations: bool) -> Population:
    from toolmem.data.people import make_population
    from toolmem.data.tables import load_population

    if isinstance(people, str) and not people.lstrip("+-").isdigit():
        if alpha != 1.0 or relations:
            raise ToolmemError(
                f"alpha, relations: they are for people that are made up, and {people} is a table; "
                "leave them out"
            )
        return load_population(people)
    return make_population(int(people), seed=seed, alpha=alpha, relations=relations)


def show(path: str, rows: int = 5) -> None:
    """Show what a factbase holds: its first people, how it was made, and its bits of information.

    Args:
        path: the DuckDB file.
        rows: how many people to show.
    """
    from rich.table import Table
    from rich.text import Text

    from toolmem.data.factbase import Factbase
    from toolmem.data.information import information_bits

    with Factbase.open(path) as factbase:
        meta = factbase.meta
        first = factbase.head(max(0, rows))
        attributes = factbase.attributes
        population = factbase.population()
    information = information_bits(population)
    table = Table(title=Text(f"{path}: {len(population):,} people"))
    for column in ("name", *attributes):
        table.add_column(Text(column))
    for row in first:
        table.add_row(*map(Text, row))  # a value is shown as it is, never read as markup
    stdout().print(table)
    made = ", ".join(f"{key} {meta[key]}" for key in ("kind", "seed", "alpha") if key in meta)
    bits = ", ".join(f"{key} {value:,.0f}" for key, value in information.attributes.items())
    for line in (
        f"{population.n_facts:,} facts ({made})",
        f"{information.facts:,.0f} bits of facts given the names: {bits}",
        f"{information.names:,.0f} bits of which names there are",
        f"fingerprint {factbase.fingerprint}",
    ):
        stdout().print(line, highlight=False, markup=False, soft_wrap=True)


COMMANDS: dict[str, tuple[Callable[..., Any], tuple[str, ...], str]] = {
    "build": (build, (), "toolmem facts build --people 1000 --out facts.duckdb"),
    "show": (show, ("path",), "toolmem facts show facts.duckdb"),
}
USAGE = """\
usage: toolmem facts build --people N|PATH --out FILE [--seed S] [--alpha A] [--relations true]
       toolmem facts show FILE [--rows N]

  build  write people and their facts as one DuckDB file
  show   show what a factbase holds, and its bits of information
"""


def main(command: str, argv: list[str]) -> int:
    """Run ``toolmem facts``.

    Args:
        command: ``facts``.
        argv: the words after it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if argv[0] not in COMMANDS:
        raise ToolmemError(f"unknown `facts` command {argv[0]!r}: use build or show")
    function, positional, example = COMMANDS[argv[0]]
    call(
        function,
        argv[1:],
        prog=f"toolmem {command} {argv[0]}",
        positional=positional,
        example=example,
    )
    return 0
