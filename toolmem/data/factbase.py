"""A population as one DuckDB file: what the database tool answers from.

Table ``people`` has a column ``name`` and one for each attribute, all text, indexed by name.
Table ``meta`` (key, value) says what it is: schema version, fingerprint, kind, seed, alpha.
People whom training does not know may lie in the same table after the others, so that a model can
ask about them; ``known`` then counts the rows before. The fingerprint is of the known people.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.data.people import Population
from toolmem.data.queries import identifier
from toolmem.data.tables import attach_duckdb, load_population
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    import duckdb

SCHEMA_VERSION = "1"


def build_factbase(
    population: Population, path: str | Path, *, unseen: Population | None = None
) -> str:
    """Write a population as a DuckDB file, in one step: whole or not at all.

    Args:
        population: the people.
        path: the file; one that is there is replaced.
        unseen: people whom training does not know, with the same columns.

    Returns:
        The population's fingerprint.

    Raises:
        ToolmemError: when the file cannot be written.
    """
    import duckdb
    import pyarrow as pa

    fingerprint = population.fingerprint()
    meta = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint, "kind": population.kind}
    for key, value in (("seed", population.seed), ("alpha", population.alpha)):
        if value is not None:
            meta[key] = str(value)
    columns = {"name": population.names, **population.attributes}
    if unseen is not None:
        meta["known"] = str(len(population))
        columns = {key: values + unseen.column(key) for key, values in columns.items()}
    table = pa.table(columns)
    with atomic_path(path) as temporary:
        try:
            with duckdb.connect(str(temporary)) as connection:
                connection.register("rows", table)
                connection.execute("CREATE TABLE people AS SELECT * FROM rows")
                connection.execute("CREATE UNIQUE INDEX people_name ON people (name)")
                connection.execute("CREATE TABLE meta (key VARCHAR, value VARCHAR)")
                connection.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        except duckdb.Error as error:
            Path(f"{temporary}.wal").unlink(missing_ok=True)
            raise ToolmemError(f"factbase: cannot write {path}: {error}") from error
    return fingerprint


class Factbase:
    """A factbase opened read-only; several processes can have it open at once.

    Args:
        path: the file.
        connection: an open, read-only connection to it.
    """

    def __init__(self, path: Path, connection: duckdb.DuckDBPyConnection) -> None:
        self.path = path
        self._connection = connection
        self.meta = self._read_meta()

    @classmethod
    def open(cls, path: str | Path) -> Factbase:
        """Open a factbase.

        Raises:
            ToolmemError: no such file, or not a whole factbase.
        """
        import duckdb

        file = Path(path)
        if not file.is_file():
            raise ToolmemError(
                f"factbase: {path} does not exist; build one with "
                f"`toolmem facts build --people N --out {path}`"
            )
        try:
            return cls(file, attach_duckdb(file))
        except duckdb.Error as error:
            raise ToolmemError(
                f"factbase: {path} cannot be opened, it is no whole DuckDB file or another process "
                f"writes it: {str(error).splitlines()[0]}"
            ) from error

    def _read_meta(self) -> dict[str, str]:
        tables = {
            str(row[0])
            for row in self._rows(
                "SELECT table_name FROM duckdb_tables() WHERE database_name = 'facts'"
            )
        }
        meta = {}
        if tables >= {"people", "meta"}:
            meta = {
                str(key): str(value) for key, value in self._rows("SELECT key, value FROM meta")
            }
        if "fingerprint" not in meta:
            self.close()
            raise ToolmemError(
                f"factbase: {self.path} is a DuckDB file but no factbase (no fingerprint in it); "
                "build one from its table with "
                f"`toolmem facts build --people {self.path} --out OTHER`"
            )
        if meta.get("schema_version") != SCHEMA_VERSION:
            self.close()
            raise ToolmemError(
                f"factbase: {self.path} has schema version {meta.get('schema_version')}, and this "
                f"toolmem reads {SCHEMA_VERSION}; build it again"
            )
        return meta

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(query).fetchall()

    @property
    def fingerprint(self) -> str:
        """The fingerprint that was written when it was built."""
        return self.meta["fingerprint"]

    @property
    def attributes(self) -> tuple[str, ...]:
        """The columns beside ``name``."""
        columns = self._connection.execute("SELECT * FROM people LIMIT 0").description or []
        return tuple(str(column[0]) for column in columns if column[0] != "name")

    def __len__(self) -> int:
        return int(self.meta.get("known") or self._rows("SELECT count(*) FROM people")[0][0])

    def population(self) -> Population:
        """The known people, in the order in which they were written.

        Raises:
            ToolmemError: when the contents no longer have the fingerprint.
        """
        return load_population(self.path)

    def unseen_population(self) -> Population | None:
        """The people whom training does not know; None when there are none."""
        if "known" not in self.meta:
            return None
        columns = ", ".join(identifier(key) for key in ("name", *self.attributes))
        rows = self._rows(f"SELECT {columns} FROM people OFFSET {len(self)}")
        names, *values = ([str(row[i]) for row in rows] for i in range(len(self.attributes) + 1))
        return Population(names, dict(zip(self.attributes, values, strict=True)), kind="unseen")

    def head(self, n: int) -> list[tuple[str, ...]]:
        """The first ``n`` rows: name, then the attributes."""
        columns = ", ".join(identifier(key) for key in ("name", *self.attributes))
        return self._rows(f"SELECT {columns} FROM people LIMIT {int(n)}")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __enter__(self) -> Factbase:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
