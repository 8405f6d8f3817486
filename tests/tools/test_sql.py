"""The database tool answers lookups and plain SELECTs, alone, in bulk and from several threads."""

import asyncio
import shutil
import threading

import duckdb
import pytest
from people_file import COLUMNS, PEOPLE, write_people

from toolmem.errors import ToolmemError
from toolmem.tools import SqlTool, Toolbox


@pytest.fixture
def tool(factbase):
    with SqlTool(factbase) as tool:
        yield tool


def test_knows_its_table(tool):
    assert tool.columns == COLUMNS
    assert tool.attributes == COLUMNS[1:]
    assert tool.people == len(PEOPLE)
    assert tool.fingerprint == "abc123"


@pytest.mark.parametrize("row", PEOPLE[:5])
def test_every_fact_in_both_languages(tool, row):
    name = row[0].replace("'", "''")
    for column, value in zip(COLUMNS[1:], row[1:], strict=True):
        for query in (
            f"FIND {column} FOR {row[0]}",
            f"  FIND {column.upper()} FOR {row[0]}\n",
            f"SELECT {column} FROM people WHERE name = '{name}'",
            f"select \"{column}\" from People where NAME='{name}' ;",
            f"SELECT {column} FROM people WHERE name = '{name}' AND 1 = 1",  # not the short way
        ):
            answer = tool.answer(query)
            assert (answer.text, answer.error) == (value, False), query
            assert answer.seconds >= 0


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("SELECT count(*) FROM people", str(len(PEOPLE))),
        ("FROM people SELECT max(name) WHERE name < 'B'", "Ann Smith"),
        ("SELECT name, occupation FROM people ORDER BY name LIMIT 2",
         "Ann Smith, baker; Bob O'Neil, sailor"),
        ("SELECT name FROM people WHERE birth_place = 'Japan' AND current_address = 'Lima'",
         "Bob O'Neil"),
        ("SELECT current_address FROM people WHERE name ILIKE 'cé %'", "New York"),
        ("SELECT b.name FROM people a JOIN people b ON a.birth_place = b.birth_place "
         "WHERE a.name = 'Cé Zoë'", "Cé Zoë"),
        ("SELECT year(strptime(birth_date, '%d %B %Y')) FROM people WHERE name = 'Ann Smith'",
         "1987"),
        ("SELECT (SELECT 1987) - 1950, name IS NULL, NULL, CASE WHEN name > 'B' THEN 'x' END "
         "FROM people WHERE name = 'Ann Smith'", "37, false, null, null"),
        ("SELECT upper(occupation) || '!' FROM people WHERE name IN ('Ann Smith')", "BAKER!"),
        ("SELECT DISTINCT birth_place FROM people WHERE name LIKE 'Person 1%'", "Peru"),
        ("SELECT birth_place, count(*) c FROM people GROUP BY ALL HAVING c > 1", "Peru, 2000"),
        ("SELECT CAST('7' AS INTEGER) + 1 FROM people LIMIT 1 -- why not", "8"),
    ],
)  # fmt: skip
def test_selects(tool, query, text):
    answer = tool.answer(query)
    assert (answer.text, answer.error) == (text, False)
    assert tool.answer(query).text == text  # remembered, and the same


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("FIND birth_date FOR Nobody", "no match"),
        ("SELECT birth_date FROM people WHERE name = 'Nobody'", "no match"),
        ("SELECT birth_date FROM people WHERE name = 'Nobody' AND 1 = 1", "no match"),
        ("FIND shoe_size FOR Ann Smith", "unknown attribute shoe_size (known: birth_date,"),
        ("FIND birth_date; DROP TABLE people FOR Ann Smith", "unknown attribute"),
        ("FIND birth_date", "write FIND attribute FOR name"),
        ("FIND birth_date FOR ", "write FIND attribute FOR name"),
        ("SELECT shoe_size FROM people", "shoe_size"),
        ("SELECT CAST(name AS INTEGER) FROM people", "Ann Smith"),
        ("SELECT * FROM people", "more than 16 rows"),
        ("SELECT name || name || name || name || name || name FROM people LIMIT 16", "too long"),
        ("", ""),
        ("hello", ""),
    ],
)
def test_errors_are_answers(tool, query, words):
    answer = tool.answer(query)
    assert answer.error
    assert answer.text.startswith("error: ")
    assert words in answer.text
    assert "\n" not in answer.text and len(answer.text.encode()) <= 256


def test_bulk_equals_one_by_one(factbase):
    queries = [f"FIND {column} FOR {row[0]}" for row in PEOPLE[:300] for column in COLUMNS[1:]]
    queries += ["FIND occupation FOR Nobody", "FIND x FOR y", queries[0]]
    with SqlTool(factbase) as bulk, SqlTool(factbase) as single:
        together = bulk.answer_now(queries)
        alone = [single.answer(query) for query in queries]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert [answer.text for answer in together[:4]] == list(PEOPLE[0][1:])


def test_bulk_with_a_column_called_like_the_join(tmp_path):
    rows = [(f"P{i}", f"a{i}", f"q{i}") for i in range(40)]
    path = write_people(tmp_path / "f.duckdb", rows, ("name", "asked", 'odd "one" FOR'))
    with SqlTool(path) as tool:
        answers = tool.answer_now([f"FIND asked FOR P{i}" for i in range(40)])
        assert [answer.text for answer in answers] == [row[1] for row in rows]
        assert tool.answer('SELECT "odd ""one"" FOR" FROM people WHERE name = \'P3\'').text == "q3"


def test_memories_are_bounded_and_do_not_change_answers(factbase, monkeypatch):
    monkeypatch.setattr("toolmem.tools.sql.CACHED_ROWS", 10)
    monkeypatch.setattr("toolmem.tools.sql.CACHED_ANSWERS", 3)
    with SqlTool(factbase) as tool:
        for _ in range(2):
            for i in range(30):
                assert tool.answer(f"FIND current_address FOR Person {i}").text == f"City {i}"
            for i in range(6):
                query = f"SELECT current_address FROM people WHERE name='Person {i}' AND true"
                assert tool.answer(query).text == f"City {i}"
        assert len(tool._rows) == 10 and len(tool._answers) == 3


def test_duplicate_names_and_nulls_of_a_users_table(tmp_path):
    rows = [("A", "x"), ("A", "y"), ("B", None), ("C", "tab\tand\nline\x00end"), ("D", " ")]
    with SqlTool(write_people(tmp_path / "f.duckdb", rows, ("name", "a"))) as tool:
        assert tool.answer("FIND a FOR A").text == "x; y"
        assert tool.answer("FIND a FOR B").text == "null"
        assert tool.answer("FIND a FOR C").text == "tab and line end"
        assert tool.answer("FIND a FOR D").text == ""


def test_many_threads_at_once(factbase):
    failures = []

    def work(number):
        for i in range(number, number + 40):
            quick = tool.answer(f"FIND current_address FOR Person {i}").text
            slow = tool.answer(
                f"SELECT current_address FROM people WHERE name = 'Person {i}' AND 1=1"
            )
            if not quick == slow.text == f"City {i}":
                failures.append((i, quick, slow))

    with SqlTool(factbase) as tool:
        threads = [threading.Thread(target=work, args=(10 * n,)) for n in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_call_is_async_and_does_not_block_the_loop(factbase):
    async def both():
        ticks = 0
        slow = asyncio.ensure_future(tool.call("SELECT count(*) FROM people a, people b, people c"))
        while not slow.done():
            await asyncio.sleep(0.01)
            ticks += 1
        return ticks, slow.result(), await tool.call("FIND birth_place FOR Ann Smith")

    with SqlTool(factbase, timeout_s=0.3) as tool:
        ticks, slow, quick = asyncio.run(both())
    assert ticks > 5
    assert slow.error and "longer than 0.3 seconds" in slow.text
    assert quick.text == "France"


def test_closed_tool_says_so_in_an_answer(factbase):
    tool = SqlTool(factbase)
    tool.close()
    tool.close()
    for query in ("FIND birth_place FOR Ann Smith", "SELECT count(*) FROM people"):
        assert tool.answer(query).error


def test_opens_beside_other_readers_of_the_same_file(factbase):
    with duckdb.connect(str(factbase), read_only=True) as reader:
        with SqlTool(factbase) as one, SqlTool(factbase, memory_mb=64) as two:
            assert one.answer("FIND birth_place FOR Ann Smith").text == "France"
            assert two.answer("SELECT count(*) FROM people").text == str(len(PEOPLE))
        assert reader.execute("SELECT count(*) FROM people").fetchall() == [(len(PEOPLE),)]


def test_path_with_quotes_and_spaces(tmp_path, factbase):
    path = tmp_path / "it's a; DROP TABLE people; -- file.duckdb"
    shutil.copy(factbase, path)
    with Toolbox([SqlTool(path)]) as toolbox:
        assert toolbox.call_many(["FIND birth_place FOR Ann Smith"])[0].text == "France"


def _absent(path):
    return path


def _folder(path):
    path.mkdir()
    return path


def _text(path):
    path.write_text("name,birth_date\nAnn,1 May 1950\n" * 50)
    return path


def _empty(path):
    path.write_bytes(b"")
    return path


def _truncated(path):
    write_people(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _flipped(path):
    write_people(path)
    data = bytearray(path.read_bytes())
    for place in range(len(data) // 4, len(data), 997):
        data[place] ^= 0xFF
    path.write_bytes(data)
    return path


def _no_people(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE persons (name VARCHAR, a VARCHAR)")
    return path


def _no_name(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE people (title VARCHAR, a VARCHAR)")
    return path


def _name_only(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE people (name VARCHAR)")
    return path


def _view(path):
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE VIEW people AS SELECT content AS name, 1 AS a "
                           "FROM read_text('/etc/hostname')")  # fmt: skip
    return path


@pytest.mark.parametrize(
    "make", [_absent, _folder, _text, _empty, _truncated, _flipped, _no_people, _no_name,
             _name_only, _view]
)  # fmt: skip
def test_unusable_file_is_named(tmp_path, make):
    path = make(tmp_path / "bad.duckdb")
    with pytest.raises(ToolmemError, match=r"bad\.duckdb") as caught:
        SqlTool(path)
    assert "\n" not in str(caught.value)
    assert "toolmem facts build" in str(caught.value)
