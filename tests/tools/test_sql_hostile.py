"""Nothing that a model can write reads beyond the table, writes anything, raises, or takes long."""

import os
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from people_file import COLUMNS, PEOPLE, write_people

from toolmem.tools import SqlTool

SECRET = "hunter2-the-secret"
TIMEOUT_S = 0.4

STATEMENTS = [
    "DROP TABLE people",
    "DELETE FROM people",
    "UPDATE people SET birth_date = 'x'",
    "INSERT INTO people VALUES ('a', 'b', 'c', 'd', 'e')",
    "CREATE TABLE x (a INTEGER)",
    "CREATE TEMP TABLE x AS SELECT * FROM people",
    "CREATE MACRO lower(x) AS 'owned'",
    "CREATE VIEW v AS SELECT 1",
    "ALTER TABLE people ADD COLUMN x INTEGER",
    "TRUNCATE people",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN TRANSACTION",
    "ATTACH '{folder}/new.duckdb' AS x",
    "DETACH facts",
    "USE memory",
    "COPY people TO '{folder}/out.csv'",
    "COPY (SELECT * FROM people) TO '{folder}/out.parquet'",
    "COPY people FROM '{secret}'",
    "EXPORT DATABASE '{folder}/out'",
    "IMPORT DATABASE '{folder}'",
    "PRAGMA database_list",
    "PRAGMA import_database('{folder}')",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "INSTALL httpfs",
    "LOAD httpfs",
    "LOAD '{secret}'",
    "SET threads = 64",
    "SET enable_external_access = true",
    "RESET lock_configuration",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE SELECT * FROM people",
    "DESCRIBE people",
    "SUMMARIZE people",
    "SHOW TABLES",
    "SHOW ALL TABLES",
    "VALUES (1)",
    "PIVOT people ON occupation",
]
SELECTS = [
    "SELECT content FROM read_text('{secret}')",
    "SELECT * FROM read_csv('{secret}')",
    "SELECT * FROM read_blob('{secret}')",
    "SELECT * FROM read_json('{secret}')",
    "SELECT * FROM '{secret}'",
    'SELECT * FROM "{secret}"',
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM people, read_text('{secret}')",
    "SELECT (SELECT content FROM read_text('{secret}')) FROM people LIMIT 1",
    "SELECT name FROM people WHERE name IN (SELECT content FROM read_text('{secret}'))",
    "SELECT name FROM people ORDER BY (SELECT content FROM read_text('{secret}')) LIMIT 1",
    "SELECT name FROM people LIMIT (SELECT length(content) FROM read_text('{secret}'))",
    "SELECT * FROM (FROM read_text('{secret}')) people",
    "WITH people AS (FROM read_text('{secret}')) SELECT * FROM people",
    "SELECT getenv('TOOLMEM_SECRET') FROM people LIMIT 1",
    "SELECT current_setting('memory_limit') FROM people LIMIT 1",
    "SELECT version() FROM people LIMIT 1",
    "SELECT current_database() FROM people LIMIT 1",
    "SELECT random() FROM people LIMIT 1",
    "SELECT main.lower(name) FROM people LIMIT 1",
    "SELECT value FROM meta",
    "SELECT value FROM facts.main.meta",
    "SELECT name FROM memory.main.people",
    "SELECT name FROM main.people LIMIT 1",
    "SELECT table_name FROM information_schema.tables",
    "SELECT sql FROM duckdb_tables()",
    "SELECT sql FROM sqlite_master",
    "SELECT * FROM pg_catalog.pg_tables",
    "SELECT * FROM duckdb_settings()",
    "SELECT * FROM duckdb_tables, people",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM query('DROP TABLE people')",
    "SELECT * FROM query_table('meta')",
    "SELECT * FROM range(10)",
    "SELECT unnest(range(1000000000)) FROM people",
    "SELECT 1",
    "SELECT 1; DROP TABLE people",
    "SELECT name FROM people LIMIT 1; SELECT value FROM meta",
    "SELECT name FROM people LIMIT 1;;;DELETE FROM people;--",
    "SELECT name FROM people -- \n; DROP TABLE people",
    "SELECT name FROM people /* ; */ ; /* x */ DROP TABLE people",
    "SELECT name FROM people WHERE name = '' OR 1=1; --'",
    "SELECT birth_date FROM people WHERE name = 'Ann'' UNION SELECT value FROM meta --'",
    "SELECT birth_date FROM people WHERE name = 'Ann' UNION SELECT value FROM meta --'",
    "SELECT birth_date FROM people WHERE name = $$Ann$$ UNION ALL FROM meta",
    "SELECT birth_date FROM people WHERE name = E'\\'; DROP TABLE people; --'",
    "SELECT birth_date FROM people WHERE name = ?",
    "SELECT birth_date FROM people WHERE name = $1",
    "SELECT name FROM pеople",  # a Cyrillic letter
    "SELECT name FROM ｐｅｏｐｌｅ",
    "SELECT name FROM people WHERE name = ’Ann Smith’ ; DROP TABLE people",
    "SELECT\u00a0value\u2003FROM\u3000meta",
    "SELECT value FROM\tmeta\r\n",
    "SELECT name\x00 FROM people",
    "SELECT name FROM people WHERE name = '\ud800'",
    "\ufeffDROP TABLE people",
    "SELECT list(name) FROM people",
    "SELECT string_agg(name, '') FROM people a",
    "SELECT repeat('a', 1000000000) FROM people",
    "SELECT lpad('a', 1000000000, 'b') FROM people",
    "SELECT replace(name, 'a', 'aaaaaaaaaaaaaaaaaa') FROM people",
    "SELECT format('{{:>1000000000}}', 1) FROM people",
    "SELECT regexp_matches(name, '(a*)*b') FROM people",
    "SELECT list_transform([1], x -> x) FROM people",
    "SELECT name, row_number() OVER () FROM people",
    "SELECT COLUMNS('.*') FROM people",
    "SELECT name::JSON FROM people",
    "SELECT CAST(name AS STRUCT(a INTEGER)) FROM people LIMIT 1",
    "SELECT name FROM people TABLESAMPLE 1%",
    "SELECT name FROM people USING SAMPLE 1",
    "SELECT name FROM people UNION ALL SELECT name FROM people",
    "SELECT '" + "a" * 400 + "' LIKE '" + "%a" * 40 + "%b' FROM people",
    "SELECT name LIKE ('%' || name || '%a%') FROM people",
    "SELECT 'a' SIMILAR TO '(a*)*b' FROM people LIMIT 1",
]
HEAVY = [
    "WITH RECURSIVE r AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM r) SELECT count(*) FROM r",
    "SELECT count(*) FROM people a, people b, people c",
    "SELECT count(*) FROM people a, people b, people c, people d, people e",
    "SELECT a.name FROM people a, people b, people c ORDER BY a.name || b.name || c.name",
    "SELECT count(DISTINCT a.name || b.name || c.name) FROM people a, people b, people c",
    "SELECT max(a.name || b.name) FROM people a CROSS JOIN people b CROSS JOIN people c",
    "SELECT max(length(a)) FROM (SELECT a||a||a||a AS a FROM (SELECT a||a||a||a AS a FROM "
    "(SELECT name||name||name AS a FROM people))) ORDER BY (SELECT count(*) FROM people p, people)",
    "SELECT " + "(" * 400 + "1" + ")" * 400 + " FROM people",
    "SELECT " + "- " * 450 + "1 FROM people",
    "SELECT " + "NOT " * 230 + "true FROM people",
    "SELECT " + "(SELECT " * 100 + "1" + ")" * 100 + " FROM people",
    "SELECT " + "1," * 450 + "1 FROM people",
    "SELECT " + "* , " * 200 + "* FROM people LIMIT 1",
    "(" * 1000,
    "SELECT '" + "x" * 100_000,
    "FIND " + " " * 1000 + "FOR",
    "FIND " + "FOR " * 250,
    "FIND birth_date FOR " + "x" * 1_000_000,
    "SELECT" + " " * 1000 + "x",
    "SELECT \"" + '"' * 1000,
]  # fmt: skip
assert len(STATEMENTS) + len(SELECTS) + len(HEAVY) > 120


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a factbase and a file that must not be read."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret.txt").write_text(SECRET)
    (folder / "schema.sql").write_text("CREATE TABLE owned (a INTEGER);")
    (folder / "load.sql").write_text("")
    write_people(folder / "facts.duckdb", fingerprint=SECRET)
    return folder


@pytest.fixture(scope="module")
def tool(place):
    with SqlTool(place / "facts.duckdb", timeout_s=TIMEOUT_S, memory_mb=64) as tool:
        yield tool


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_written(place, tool):
    """Whatever was tried: the same files with the same bytes, and the same answers."""
    os.environ["TOOLMEM_SECRET"] = SECRET
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    here = set(os.listdir())
    yield
    del os.environ["TOOLMEM_SECRET"]
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert set(os.listdir()) == here
    for row in PEOPLE[:4]:
        for column, value in zip(COLUMNS, row, strict=True):
            name = row[0].replace("'", "''")
            query = f"SELECT {column} FROM people WHERE name = '{name}' AND 2 = 2"
            assert tool.answer(query).text == value
    assert tool.answer("SELECT count(*) FROM people WHERE 3 = 3").text == str(len(PEOPLE))


def ask(tool, query):
    start = time.perf_counter()
    answer = tool.answer(query)
    seconds = time.perf_counter() - start
    assert seconds < TIMEOUT_S + 2.0, f"took {seconds:.1f} s"
    assert SECRET not in answer.text
    assert len(answer.text.encode()) <= 256
    assert not {unicodedata.category(letter) for letter in answer.text} & {"Cc", "Cs", "Zl", "Zp"}
    return answer


@pytest.mark.parametrize("query", STATEMENTS + SELECTS)
def test_refused(tool, place, query):
    query = query.format(folder=place, secret=place / "secret.txt") if "{" in query else query
    answer = ask(tool, query)
    assert answer.error, answer
    assert answer.text.startswith("error: ")
    assert str(place) not in answer.text.replace(query, "") or "there is no table" in answer.text


@pytest.mark.parametrize("query", HEAVY, ids=lambda query: query[:60])
def test_bounded(tool, query):
    ask(tool, query)


def test_the_lock_holds_behind_the_check(tool, place):
    """Should the check ever miss something, DuckDB itself still refuses it."""
    import duckdb

    cursor = tool._cursor()
    for query in (
        f"SELECT content FROM read_text('{place}/secret.txt')",
        f"COPY people TO '{place}/out.csv'",
        f"ATTACH '{place}/new.duckdb' AS x",
        "SET enable_external_access = true",
        "SET threads = 8",
        "INSTALL httpfs",
        "DROP TABLE people",
        "INSERT INTO people VALUES ('a', 'b', 'c', 'd', 'e')",
    ):
        with pytest.raises(duckdb.Error):
            cursor.execute(query).fetchall()
    cursor.close()


WORDS = (
    "SELECT FROM people meta WHERE name = 'Ann Smith' ( ) , ; -- /* */ * birth_date FIND FOR UNION "
    "JOIN ON WITH AS read_text('secret.txt') getenv('TOOLMEM_SECRET') lower(name) count(*) 1 \" ' "
    "main . :: LIMIT ORDER BY GROUP ALL NOT NULL IN || LIKE '%a%' value people.name"
)
PIECES = st.sampled_from(WORDS.split(" "))


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=14).map(" ".join)))
def test_any_text_gets_an_answer(tool, query):
    ask(tool, query)
