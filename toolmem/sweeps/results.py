"""One DuckDB file of results, a row a run, written by the sweep's own process alone.

Workers hand over files, ``runs/NAME/result.json``, each written in one step: they are what a sweep goes
on from, and the database can be made of them again. It is opened only while rows are written, so that
anybody can query it in the meantime.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.sweeps.recipe import COLUMNS, MORE_COLUMNS

if TYPE_CHECKING:
    import duckdb

TABLE = "runs"
SEARCH_COLUMNS = {
    "name": "VARCHAR PRIMARY KEY",
    "status": "VARCHAR",
    "seed": "BIGINT",
    "settings": "JSON",
    "metric": "VARCHAR",
    "reach": "DOUBLE",
    "member": "VARCHAR",
    "value": "DOUBLE",
    "run": "VARCHAR",
    "params_total": "BIGINT",
    "params_non_embedding": "BIGINT",
    "steps": "BIGINT",
    "tokens": "BIGINT",
    "flops": "DOUBLE",
    "seconds": "DOUBLE",
    "monotone": "BOOLEAN",
    "runs_trained": "BIGINT",
    "runs_failed": "BIGINT",
    "seconds_of_all": "DOUBLE",
}
TABLES = {TABLE: COLUMNS, "searches": SEARCH_COLUMNS}
BLOCK = "16384"  # bytes: a new file is a tenth of what it is with DuckDB's own 262,144
PATIENCE = 10.0  # seconds that a reader may keep the file from us


class Results:
    """The tables ``runs`` and ``searches`` of a DuckDB file.

    Args:
        path: the file; made when the first row is written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def write(self, rows: Sequence[Mapping[str, Any]], table: str = TABLE) -> None:
        """Write rows, each in place of one of the same name; new columns are added.

        Args:
            rows: value by column; those of the table, and one for each axis and metric.
            table: ``runs`` or ``searches``.

        Raises:
            ToolmemError: when the file is something else, or others keep it open.
        """
        if not rows:
            return
        connection = self._open()
        try:
            connection.begin()
            types = self._columns(connection, table)
            for row in rows:
                for name, value in row.items():
                    self._fit_column(connection, table, types, name, value)
                names = ", ".join(quoted(name) for name in row)
                places = ", ".join("?" for _ in row)
                values = [_plain(value, types[name]) for name, value in row.items()]
                connection.execute(
                    f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({places})", values
                )
            connection.commit()
        finally:
            connection.close()

    def rows(self, names: Sequence[str] | None = None, table: str = TABLE) -> list[dict[str, Any]]:
        """Rows as they were written, ``settings`` and ``recipe`` as mappings.

        Args:
            names: of the runs or searches; all when None.
            table: ``runs`` or ``searches``.
        """
        if not self.path.exists():
            return []
        connection = self._open(read_only=True)
        try:
            found = connection.execute(f"SELECT * FROM {table}")
            columns = [column[0] for column in found.description or []]
            rows = [dict(zip(columns, values, strict=True)) for values in found.fetchall()]
        finally:
            connection.close()
        for row in rows:
            for name in {"settings", "recipe", "judged"} & row.keys():
                row[name] = json.loads(row[name]) if row[name] else {}
        if names is None:
            return rows
        by_name = {row["name"]: row for row in rows}
        return [by_name[name] for name in names if name in by_name]

    def status(self) -> dict[str, str]:
        """``done`` or ``failed`` by run; nothing of others."""
        return {row["name"]: row["status"] for row in self.rows()}

    def _open(self, read_only: bool = False) -> duckdb.DuckDBPyConnection:
        import duckdb

        until = time.monotonic() + PATIENCE
        while True:
            try:
                connection = duckdb.connect(
                    str(self.path), read_only=read_only, config={"default_block_size": BLOCK}
                )
                break
            except duckdb.IOException as error:
                if "lock" not in str(error).lower():
                    raise ToolmemError(f"{self.path}: {_first_line(error)}") from error
                if time.monotonic() > until:
                    raise ToolmemError(
                        f"{self.path} is open in another program: close it there; no result is lost"
                    ) from error
                time.sleep(0.1)
            except duckdb.Error as error:
                raise ToolmemError(f"{self.path}: {_first_line(error)}") from error
        tables = [name for (name,) in connection.execute("SHOW TABLES").fetchall()]
        if TABLE not in tables and (tables or read_only):
            connection.close()
            raise ToolmemError(f"{self.path} holds no results of a sweep: name another --out")
        if TABLE in tables:
            there = self._columns(connection, TABLE)
            if missing := [name for name in COLUMNS if name not in there]:
                connection.close()
                raise ToolmemError(
                    f"{self.path}: its table {TABLE} has no column {missing[0]}: it is not of a sweep, "
                    "or of another version; name another --out"
                )
        if not read_only:
            for table, columns in TABLES.items():
                if table not in tables:
                    kinds = ", ".join(f"{quoted(name)} {kind}" for name, kind in columns.items())
                    connection.execute(f"CREATE TABLE {table} ({kinds})")
        return connection

    @staticmethod
    def _columns(connection: duckdb.DuckDBPyConnection, table: str) -> dict[str, str]:
        found = connection.execute(f"PRAGMA table_info('{table}')").fetchall()
        return {name: kind for _, name, kind, *_ in found}

    @staticmethod
    def _fit_column(
        connection: duckdb.DuckDBPyConnection,
        table: str,
        types: dict[str, str],
        name: str,
        value: Any,
    ) -> None:
        """Make sure that a column is there and takes the value."""
        kind = MORE_COLUMNS.get(name) or column_type(value)
        if name not in types:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN {quoted(name)} {kind}")
            types[name] = kind
        elif (
            name not in TABLES[table] and value is not None and (wider := _wider(types[name], kind))
        ):
            connection.execute(f"ALTER TABLE {table} ALTER {quoted(name)} TYPE {wider}")
            types[name] = wider


def quoted(name: str) -> str:
    """A column's name as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def column_type(value: Any) -> str:
    """The column type that keeps a value."""
    if isinstance(value, bool):
        return "BOOLEAN"
    if isinstance(value, int):
        return "BIGINT"
    return "DOUBLE" if isinstance(value, float) else "VARCHAR"


def _wider(had: str, needs: str) -> str | None:
    """The type that a column must become to keep another kind of value; None when it keeps it."""
    if had in (needs, "VARCHAR") or (had, needs) == ("DOUBLE", "BIGINT"):
        return None
    return "DOUBLE" if (had, needs) == ("BIGINT", "DOUBLE") else "VARCHAR"


def _plain(value: Any, kind: str) -> Any:
    if isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False)
    return str(value) if kind == "VARCHAR" and value is not None else value


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
