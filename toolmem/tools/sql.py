"""The database tool: DuckDB, opened read-only and locked up, answering one short query at a time.

Two languages are understood:

- ``FIND birth_date FOR Ann Smith``, as in the study (arXiv 2508.20755);
- one ``SELECT`` over the table ``people``, checked node by node (`toolmem.tools.sql_check`).

Lookups of one person by name, in either language, are read without DuckDB's parser, answered from
the index and remembered; many at once are answered by one join. Everything else is parsed by
DuckDB, checked, and run under a limit of time, memory, rows and bytes.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolmem.errors import ToolmemError
from toolmem.tools.base import Answer, cut, error_answer, plain_line
from toolmem.tools.sql_check import RefusedError, check_select
from toolmem.tools.threads import in_thread

if TYPE_CHECKING:
    import duckdb

FIND = re.compile(r"FIND\s")
# The SELECT that dialogues are written with: it means the same as FIND, so it goes the short way.
LOOKUP = re.compile(
    r"""SELECT\s+(?:(?P<bare>[a-z_][a-z0-9_]*)|"(?P<quoted>(?:[^"]|"")+)")\s+FROM\s+people\s+"""
    r"""WHERE\s+name\s*=\s*'(?P<name>(?:[^']|'')*)'\s*;?""",
    re.IGNORECASE,
)
ADDRESSED = re.compile(r"\s*(?:FIND|SELECT|WITH|FROM|VALUES)\b", re.IGNORECASE)
FORBIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
NO_MATCH = "no match"
BULK = 3  # from this many names on, one join over the table beats a look into the index each
CACHED_ROWS = 16_384
CACHED_ANSWERS = 4_096
ADVICE = "build one with `toolmem facts build --people N --out FILE`"


class Lookup(NamedTuple):
    """One person's attribute, asked by name."""

    column: int
    name: str


class SqlTool:
    """Answers queries over a factbase's table ``people``. Safe to use from several threads.

    Args:
        path: a factbase: a DuckDB file with a table ``people`` that has a text column ``name``.
        timeout_s: seconds after which a SELECT is interrupted.
        max_rows: rows of an answer; more are an error answer.
        max_answer_bytes: UTF-8 bytes of an answer; more are an error answer.
        max_query_bytes: UTF-8 bytes of a query.
        memory_mb: MiB that DuckDB may use; it never spills to disk.

    Raises:
        ToolmemError: the file is absent, damaged, locked by a writer, or not a factbase.
    """

    name = "sql"

    def __init__(
        self,
        path: str | Path,
        *,
        timeout_s: float = 1.0,
        max_rows: int = 16,
        max_answer_bytes: int = 256,
        max_query_bytes: int = 1024,
        memory_mb: int = 256,
    ) -> None:
        self.path = Path(path)
        self.timeout_s = timeout_s
        self.max_rows = max_rows
        self.max_answer_bytes = max_answer_bytes
        self.max_query_bytes = max_query_bytes
        self._connection = _open(self.path, memory_mb)
        try:
            self.columns, self.fingerprint, self.people = _inspect(self._connection, self.path)
        except BaseException:
            self._connection.close()
            raise
        self._places = {column.lower(): place for place, column in enumerate(self.columns)}
        quoted = ", ".join(f"people.{_quote(column)}" for column in self.columns)
        self._one = f"SELECT {quoted} FROM people WHERE name = ? LIMIT {max_rows + 1}"
        asked = "SELECT unnest(?::VARCHAR[]) AS name"
        self._many = f"SELECT {quoted} FROM ({asked}) AS asked JOIN people USING (name)"
        self._lock = threading.Lock()  # guards the lookup cursor and both memories
        self._lookups = self._cursor()
        self._rows: dict[str, list[tuple[Any, ...]]] = {}
        self._answers: dict[str, Answer] = {}
        self._closed = False

    @property
    def attributes(self) -> tuple[str, ...]:
        """What can be asked about a person, in the table's order."""
        return tuple(column for column in self.columns if column != "name")

    def accepts(self, query: str) -> bool:
        """Whether the query begins like one of the two languages."""
        return ADDRESSED.match(query) is not None

    def answer(self, query: str) -> Answer:
        """Answer one query at once; whatever is wrong with it is said in an error answer.

        Args:
            query: the bare query, without fences.
        """
        quick = self.answer_now([query])[0]
        return self._select(query.strip()) if quick is None else quick

    def answer_now(self, queries: list[str]) -> list[Answer | None]:
        """Answers to lookups by name and to what needs no database; None for every other SELECT."""
        start = time.perf_counter()
        read = [self._read(query) for query in queries]
        try:
            rows = self._find({each.name for each in read if isinstance(each, Lookup)})
            failed = None
        except Exception as error:
            rows, failed = {}, self._refused(_reason(error, self.timeout_s), 0.0)
        seconds = (time.perf_counter() - start) / max(1, len(queries))
        answers: list[Answer | None] = []
        for each in read:
            if isinstance(each, Lookup):
                found = [(row[each.column],) for row in rows.get(each.name, ())]
                answers.append(failed or self._told(found, seconds))
            else:
                answers.append(each)
        return answers

    async def call(self, query: str) -> Answer:
        """Answer one query; a SELECT that takes its time runs in a thread."""
        quick = self.answer_now([query])[0]
        return await in_thread(self._select, query.strip()) if quick is None else quick

    def close(self) -> None:
        """Close the database; later queries get an error answer."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._lookups.close()
                self._connection.close()

    def __enter__(self) -> SqlTool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, query: str) -> Lookup | Answer | None:
        """A lookup, or an answer that needs no database, or None for a SELECT that must be run."""
        if FORBIDDEN.search(query):
            return error_answer("the query has control characters")
        if len(query.encode("utf-8")) > self.max_query_bytes:
            return error_answer(f"the query is longer than {self.max_query_bytes} bytes")
        query = query.strip()
        if FIND.match(query):
            column, _, person = map(str.strip, query[4:].partition(" FOR "))
            place = self._places.get(column.lower())
            if not person:
                return error_answer("write FIND attribute FOR name")
            if place is None:
                known = ", ".join(self.attributes)
                return self._refused(f"unknown attribute {column[:64]} (known: {known})", 0.0)
            return Lookup(place, person)
        if found := LOOKUP.fullmatch(query):
            column = found["bare"] or found["quoted"].replace('""', '"')
            place = self._places.get(column.lower())
            if place is not None:
                return Lookup(place, found["name"].replace("''", "'"))
        with self._lock:
            return self._answers.get(query)

    def _find(self, names: Iterable[str]) -> dict[str, list[tuple[Any, ...]]]:
        """The rows of these people, by name."""
        with self._lock:
            found: dict[str, list[tuple[Any, ...]]] = {}
            missing: list[str] = []
            for name in names:
                rows = self._rows.get(name)
                if rows is None:
                    missing.append(name)
                else:
                    found[name] = rows
            if not missing:
                return found
            fresh: dict[str, list[tuple[Any, ...]]] = {name: [] for name in missing}
            if len(missing) < BULK:
                for name in missing:
                    fresh[name] = self._lookups.execute(self._one, [name]).fetchall()
            else:
                place = self._places["name"]
                for row in self._lookups.execute(self._many, [missing]).fetchall():
                    if len(fresh[row[place]]) <= self.max_rows:
                        fresh[row[place]].append(row)
            self._rows.update(fresh)
            while len(self._rows) > CACHED_ROWS:
                del self._rows[next(iter(self._rows))]
            return found | fresh

    def _select(self, query: str) -> Answer:
        """Parse, check and run one SELECT in a cursor of its own."""
        start = time.perf_counter()
        keep = True
        try:
            cursor = self._cursor()
            timer = threading.Timer(self.timeout_s, cursor.interrupt)
            timer.daemon = True
            timer.start()
            try:
                parse = "SELECT json_serialize_sql(?::VARCHAR)"
                parsed = cursor.execute(parse, [query]).fetchone()
                check_select(json.loads(parsed[0]) if parsed else {}, self._places)
                rows = cursor.execute(query).fetchmany(self.max_rows + 1)
            finally:
                timer.cancel()
                timer.join()  # an interrupt on its way must not reach a cursor that is gone
                cursor.close()
            answer = self._told(rows, 0.0)
        except Exception as error:
            keep = isinstance(error, RefusedError)  # time and memory may suffice another time
            answer = self._refused(_reason(error, self.timeout_s), 0.0)
        answer = Answer(answer.text, answer.error, time.perf_counter() - start)
        if keep:
            with self._lock:
                self._answers[query] = answer
                while len(self._answers) > CACHED_ANSWERS:
                    del self._answers[next(iter(self._answers))]
        return answer

    def _refused(self, reason: str, seconds: float) -> Answer:
        answer = error_answer(reason, seconds)
        return Answer(cut(answer.text, self.max_answer_bytes), True, seconds)

    def _told(self, rows: list[tuple[Any, ...]], seconds: float) -> Answer:
        """Rows as one line: cells joined by commas, rows by semicolons."""
        if not rows:
            return error_answer(NO_MATCH, seconds)
        if len(rows) > self.max_rows:
            return error_answer(f"more than {self.max_rows} rows", seconds)
        text = "; ".join(", ".join(map(_cell, row)) for row in rows)
        size = len(text.encode("utf-8", "replace"))
        if size > self.max_answer_bytes:
            reason = f"answer too long ({size} bytes, at most {self.max_answer_bytes})"
            return error_answer(reason, seconds)
        return Answer(text, False, seconds)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self._connection.cursor()
        cursor.execute("USE facts")
        return cursor


def _open(path: Path, memory_mb: int) -> duckdb.DuckDBPyConnection:
    """An empty database in memory with the file attached read-only, then locked up.

    Attached instead of opened: DuckDB refuses to open one file twice in a process under different
    settings, and the data room may have it open under none.
    """
    import duckdb

    if path.is_dir():
        raise ToolmemError(f"factbase {path} is a folder, not a file; {ADVICE}")
    try:
        with path.open("rb") as stream:
            head = stream.read(12)
    except FileNotFoundError as error:
        raise ToolmemError(f"factbase {path} does not exist; {ADVICE}") from error
    except (OSError, ValueError) as error:
        raise ToolmemError(
            f"factbase {path} cannot be read: {error}; check its permissions"
        ) from error
    if head[8:] != b"DUCK":
        raise ToolmemError(f"factbase {path} is not a DuckDB file; {ADVICE}")
    connection = duckdb.connect(
        ":memory:",
        config={
            "threads": 1,
            "memory_limit": f"{memory_mb}MiB",
            "temp_directory": "",
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            "python_enable_replacements": "false",
        },
    )
    quoted = str(path.resolve()).replace("'", "''")
    try:
        connection.execute(f"ATTACH '{quoted}' AS facts (READ_ONLY)")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        connection.execute("USE facts")
    except duckdb.Error as error:
        connection.close()
        raise _unusable(path, error) from error
    return connection


def _inspect(
    connection: duckdb.DuckDBPyConnection, path: Path
) -> tuple[tuple[str, ...], str | None, int]:
    """Columns, fingerprint, number of people; reads every value once, so that damage shows now."""
    import duckdb

    try:
        columns = connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() JOIN duckdb_tables() "
            "USING (database_name, schema_name, table_name) WHERE database_name = 'facts' "
            "AND schema_name = 'main' AND table_name = 'people' ORDER BY column_index"
        ).fetchall()
        if ("name", "VARCHAR") not in columns or len(columns) < 2:
            raise ToolmemError(
                f"factbase {path} has no table people with a text column name and attributes; "
                f"{ADVICE}"
            )
        names = tuple(column for column, _ in columns)
        lengths = ", ".join(f"max(length(CAST({_quote(column)} AS VARCHAR)))" for column in names)
        people = connection.execute(f"SELECT count(*), {lengths} FROM people").fetchall()[0][0]
        fingerprint = None
        if connection.execute(
            "SELECT count(*) FROM duckdb_columns() WHERE database_name = 'facts' AND "
            "schema_name = 'main' AND table_name = 'meta' AND column_name IN ('key', 'value')"
        ).fetchall() == [(2,)]:
            query = "SELECT value FROM meta WHERE key = 'fingerprint'"
            fingerprint = next((str(row[0]) for row in connection.execute(query).fetchall()), None)
    except duckdb.Error as error:
        raise _unusable(path, error) from error
    return names, fingerprint, people


def _unusable(path: Path, error: Exception) -> ToolmemError:
    text = str(error).splitlines()[0]
    if "set lock" in text or "different configuration" in text:
        return ToolmemError(
            f"factbase {path} is being written by another process; wait for it to end"
        )
    if "newer" in text.lower() or "version" in text.lower():
        return ToolmemError(f"factbase {path} cannot be opened by this DuckDB: {text}; {ADVICE}")
    return ToolmemError(f"factbase {path} is damaged or not a factbase: {text}; {ADVICE}")


def _quote(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    return plain_line(str(value).lower() if isinstance(value, bool) else str(value))


def _reason(error: Exception, timeout_s: float) -> str:
    """An exception as words for the model; never a path or anything else of this machine."""
    import duckdb

    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, duckdb.InterruptException):
        return f"the query took longer than {timeout_s:g} seconds"
    if isinstance(error, duckdb.OutOfMemoryException):
        return "the query needs too much memory"
    about_the_query = (
        duckdb.BinderException,
        duckdb.ConversionException,
        duckdb.OutOfRangeException,
    )
    if isinstance(error, about_the_query):
        return (
            str(error).splitlines()[0].partition("Error: ")[2] or "the query does not fit the table"
        )
    if isinstance(error, RecursionError):
        return "the query is nested too deeply"
    return "the query failed"
