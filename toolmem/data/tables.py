"""The user's own people: CSV, TSV, JSONL, Parquet and DuckDB tables, checked row by row."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.data.people import Population
from toolmem.data.queries import escape, identifier
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import duckdb

READABLE = ".csv, .tsv, .jsonl, .parquet, .duckdb or .db"
# C0 and C1 controls (NUL, tab and line ends among them) and the Unicode line separators: one would
# end a line of a template or of a query.
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")

Columns = dict[str, list[str]]


def load_population(path: str | Path) -> Population:
    """A population from the user's own table: CSV, Parquet, JSONL, DuckDB or a factbase.

    Args:
        path: the file. A column ``name`` holds unique names; every other column is an attribute.

    Raises:
        ToolmemError: unreadable file, no column ``name``, or (naming the row) an empty or duplicate
            name, an empty value, a NUL or control character.
    """
    columns, meta = read_table(path)
    population = Population(
        columns["name"],
        {key: values for key, values in columns.items() if key != "name"},
        kind=meta.get("kind", "table"),
        seed=int(meta["seed"]) if meta.get("seed") else None,
        alpha=float(meta["alpha"]) if meta.get("alpha") else None,
        source=str(path),
    )
    if meta.get("known"):  # people whom training does not know come after the others
        population = population.head(int(meta["known"]))
    if meta and meta["fingerprint"] != population.fingerprint():
        raise ToolmemError(
            f"people: {path} is a factbase whose people were changed after it was built (the "
            "fingerprint differs); build it again with `toolmem facts build`"
        )
    return population


def read_table(path: str | Path) -> tuple[Columns, dict[str, str]]:
    """Read and check a table.

    Args:
        path: a file whose ending says its format.

    Returns:
        Column name -> texts (``name`` among them), and a factbase's own notes (empty otherwise).

    Raises:
        ToolmemError: naming the file, and the row and column where there is one.
    """
    file = Path(path)
    if not file.is_file():
        kind = "is a folder" if file.is_dir() else "does not exist"
        raise ToolmemError(
            f"people: {path} {kind}; give a number of people, or a table ({READABLE})"
        )
    ending = file.suffix.lower()
    readers = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".parquet": _read_parquet,
        ".duckdb": _read_duckdb,
        ".db": _read_duckdb,
    }
    if ending not in readers:
        raise ToolmemError(f"people: {path}: cannot read '{ending}' files; use {READABLE}")
    try:
        columns, meta = readers[ending](file)
    except UnicodeDecodeError as error:
        raise ToolmemError(
            f"people: {path} is not UTF-8 text: {error.reason}; convert it"
        ) from error
    except OSError as error:
        raise ToolmemError(f"people: {path} cannot be read: {error.strerror}") from error
    return _checked(columns, path), meta


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).strip()


def _check_unique(names: list[str], path: Path) -> None:
    """Column names must differ in more than case: a query's do."""
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise ToolmemError(
                f"people: {path}: two columns are named '{name}' (upper and lower case are "
                "the same in a query); rename one"
            )
        seen.add(name.casefold())


def _checked(columns: Columns, path: str | Path) -> Columns:
    if "name" not in columns:
        there = ", ".join(columns) or "none"
        raise ToolmemError(
            f"people: {path} has no column 'name' (columns: {there}); add or rename one"
        )
    if len(columns) < 2:
        raise ToolmemError(f"people: {path} has only names; add at least one column of facts")
    for key in columns:
        if " FOR " in key:
            raise ToolmemError(
                f"people: {path}: column name {key!r} holds ' FOR ', which a query reads as the "
                "end of the column's name; rename it"
            )
    if not columns["name"]:
        raise ToolmemError(f"people: {path} has no rows; at least one person is needed")
    for key in columns:
        if not key or CONTROL.search(key) or key != key.strip():
            raise ToolmemError(
                f"people: {path}: column name {key!r} is empty or has control characters or "
                "spaces around it; rename it"
            )
    first_row: dict[str, int] = {}
    for row, name in enumerate(columns["name"], start=1):
        if not name:
            raise ToolmemError(f"people: {path}, row {row}: the name is empty; fill it in")
        if name in first_row:
            raise ToolmemError(
                f"people: {path}, row {row}: the name {name!r} is in row {first_row[name]} "
                "already; names must be unique"
            )
        first_row[name] = row
    for key, values in columns.items():
        for row, value in enumerate(values, start=1):
            if not value:
                raise ToolmemError(
                    f"people: {path}, row {row}, column '{key}': no value; fill it in, or drop the "
                    "row"
                )
            if CONTROL.search(value):
                raise ToolmemError(
                    f"people: {path}, row {row}, column '{key}': {value!r} holds a NUL or control "
                    "character; remove it"
                )
    return columns


def _read_csv(path: Path) -> tuple[Columns, dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            header = [key.strip() for key in next(rows, [])]
            _check_unique(header, path)
            columns: Columns = {key: [] for key in header}
            number = 0
            for row in rows:
                if not row:
                    continue
                number += 1
                if len(row) != len(header):
                    raise ToolmemError(
                        f"people: {path}, row {number} (line {rows.line_num}): {len(row)} values "
                        f"for {len(header)} columns; quote values that hold a comma"
                    )
                for key, value in zip(header, row, strict=True):
                    columns[key].append(value.strip())
        except csv.Error as error:
            raise ToolmemError(f"people: {path}, line {rows.line_num}: {error}") from error
    return columns, {}


def _read_jsonl(path: Path) -> tuple[Columns, dict[str, str]]:
    columns: Columns = {}
    number = 0
    with open(path, encoding="utf-8-sig") as stream:
        for line_number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            number += 1
            where = f"people: {path}, row {number} (line {line_number})"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ToolmemError(f"{where}: not JSON ({error}); one object a line") from error
            if not isinstance(row, dict):
                raise ToolmemError(f"{where}: not an object; write {{'name': …, 'attribute': …}}")
            if not columns:
                _check_unique(list(row), path)
                columns = {key: [] for key in row}
            if row.keys() != columns.keys():
                odd = sorted(row.keys() ^ columns.keys())
                raise ToolmemError(
                    f"{where}: its keys differ from the first row's in {', '.join(odd)}; give "
                    "every row the same keys"
                )
            for key, value in row.items():
                if isinstance(value, dict | list):
                    raise ToolmemError(f"{where}, column '{key}': a list or object, not one value")
                columns[key].append(_text(value))
    return columns, {}


def _read_parquet(path: Path) -> tuple[Columns, dict[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ToolmemError(f"people: {path} is not a whole Parquet file: {error}") from error
    _check_unique(table.column_names, path)
    return {
        key: [_text(value) for value in table.column(key).to_pylist()] for key in table.column_names
    }, {}


def attach_duckdb(path: Path) -> duckdb.DuckDBPyConnection:
    """A connection of its own with a DuckDB file attached read-only as ``facts``, and used.

    Attached instead of opened: DuckDB shares an opened file within a process, so that one replaced
    meanwhile would be read as it was, and one opened otherwise refused.
    """
    import duckdb

    connection = duckdb.connect(":memory:")
    try:
        connection.execute(f"ATTACH '{escape(str(path.resolve()))}' AS facts (READ_ONLY)")
        connection.execute("USE facts")
    except duckdb.Error:
        connection.close()
        raise
    return connection


def _read_duckdb(path: Path) -> tuple[Columns, dict[str, str]]:
    import duckdb

    try:
        with attach_duckdb(path) as connection:
            return _read_people(connection, path)
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
        raise ToolmemError(
            f"people: {path} is not a whole DuckDB file, or another process writes it: {reason}"
        ) from error


def _read_people(
    connection: duckdb.DuckDBPyConnection, path: Path
) -> tuple[Columns, dict[str, str]]:
    found = connection.execute(
        "SELECT table_name, list(column_name) FROM duckdb_columns() "
        "WHERE database_name = 'facts' AND schema_name = 'main' GROUP BY table_name"
    ).fetchall()
    tables = {str(name): columns for name, columns in found}
    candidates = [table for table in tables if table != "meta"]
    if "people" not in tables and len(candidates) != 1:
        raise ToolmemError(
            f"people: {path} has no table 'people' (tables: {', '.join(sorted(tables)) or 'none'}); "
            "name one so"
        )
    table = "people" if "people" in tables else candidates[0]
    result = connection.execute(f"SELECT * FROM {identifier(table)}")
    names = [str(column[0]) for column in result.description or []]
    rows = result.fetchall()
    columns = {key: [_text(row[i]) for row in rows] for i, key in enumerate(names)}
    meta: dict[str, str] = {}
    if set(tables.get("meta", ())) == {"key", "value"}:
        meta = dict(connection.execute("SELECT key, value FROM meta").fetchall())
    return columns, meta if "fingerprint" in meta and table == "people" else {}
