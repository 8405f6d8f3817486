"""Nothing that a model can write reads beyond the table, writes, raises, or takes long or much."""

import os
import subprocess
import sys
import time
import unicodedata

import pytest
from hostile_queries import BENIGN, HEAVY, SELECTS, STATEMENTS
from hypothesis import given, settings
from hypothesis import strategies as st
from people_file import COLUMNS, PEOPLE, write_people

from toolmem.tools import SqlTool

SECRET = "hunter2-the-secret"
TIMEOUT_S = 0.4

MEMORY_MB = 64
QUERIES = list(dict.fromkeys(STATEMENTS + SELECTS + HEAVY))
assert len(QUERIES) >= 400


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
    with SqlTool(place / "facts.duckdb", timeout_s=TIMEOUT_S, memory_mb=MEMORY_MB) as tool:
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
    assert str(place) in query or str(place) not in answer.text


@pytest.mark.parametrize("query", HEAVY, ids=lambda query: query[:60])
def test_bounded(tool, query):
    ask(tool, query)


@pytest.mark.parametrize("query", BENIGN)
def test_honest_queries_are_answered(tool, query):
    answer = ask(tool, query)
    assert (answer.text, answer.error) == (BENIGN[query], False)


def test_a_column_called_like_a_function_can_be_asked(tmp_path):
    path = write_people(tmp_path / "f.duckdb", [("A", "root")], ("name", "user"))
    with SqlTool(path) as tool:
        assert tool.answer("SELECT user FROM people WHERE name = 'A' AND 1 = 1").text == "root"
        assert tool.answer("SELECT current_user FROM people").error


SCRIPT = """
import resource, sys
from toolmem.tools import SqlTool

def peak_mib():
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

with SqlTool(sys.argv[1], timeout_s=60.0, memory_mb=int(sys.argv[2])) as tool:
    tool.answer("SELECT max(length(a.name || b.name)) FROM people a JOIN people b USING (name)")
    before = peak_mib()
    for query in sys.argv[3:]:
        print(tool.answer(query).text)
    print(peak_mib() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module on Windows")
def test_memory_is_bounded(place):
    """In a process of its own, for its peak, and with time enough to use up what there is."""
    memory_mb = 16
    hungry = [
        query for query in HEAVY if "ORDER BY a.name ||" in query or "count(DISTINCT" in query
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(place / "facts.duckdb"), str(memory_mb), *hungry],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    *answers, grown_mib = done.stdout.splitlines()
    assert answers == ["error: the query needs too much memory"] * 2
    assert float(grown_mib) < 4 * memory_mb


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
