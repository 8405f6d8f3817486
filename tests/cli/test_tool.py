"""``toolmem tool``: single queries, files of them, and going on after a kill."""

import json

import pytest

from toolmem.cli import main
from toolmem.data.factbase import build_factbase
from toolmem.data.people import make_population

PEOPLE = make_population(300, seed=1)


@pytest.fixture(scope="module")
def factbase(tmp_path_factory):
    path = tmp_path_factory.mktemp("facts") / "facts.duckdb"
    build_factbase(PEOPLE, path)
    return path


@pytest.fixture(scope="module")
def queries(tmp_path_factory):
    path = tmp_path_factory.mktemp("queries") / "q.jsonl"
    texts = []
    for i, name in enumerate(PEOPLE.names):
        texts.append(f"FIND occupation FOR {name}")
        if i % 10 == 0:
            texts.append(f"SELECT count(*) FROM people WHERE name <= '{name}'")
        if i % 50 == 0:
            texts += ["DROP TABLE people", "", "é\u2028\u0085\x00\ud800", "SELECT\n1"]
    path.write_text("".join(json.dumps({"query": text, "id": 7}) + "\n" for text in texts))
    return path


def rows(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_one_query(factbase, capsys):
    words = ["tool", "sql", str(factbase)]
    assert main([*words, f"FIND occupation FOR {PEOPLE.names[7]}"]) == 0
    assert capsys.readouterr().out == PEOPLE.attributes["occupation"][7] + "\n"
    assert main([*words, "DROP TABLE people"]) == 0
    assert capsys.readouterr().out == "error: only SELECT is allowed\n"
    assert main([*words, "SELECT count(*) FROM people a, people b, people c, people d"]) == 0
    assert capsys.readouterr().out == "error: the query is too complex\n"
    assert main([*words, "SELECT * FROM people LIMIT 3", "--max_rows", "2"]) == 0
    assert capsys.readouterr().out == "error: more than 2 rows\n"


def test_calculator(capsys):
    assert main(["tool", "calculator", "CALCULATE 1987 - 1950"]) == 0
    assert capsys.readouterr().out == "37\n"


def test_many_queries(factbase, queries, tmp_path):
    out = tmp_path / "new" / "a.jsonl"
    words = ["tool", "sql", str(factbase), "--queries", str(queries), "--out", str(out)]
    assert main(words) == 0
    asked, answered = rows(queries), rows(out)
    assert [row["query"] for row in answered] == [row["query"] for row in asked]
    rank = {name: i + 1 for i, name in enumerate(sorted(PEOPLE.names))}
    jobs = dict(zip(PEOPLE.names, PEOPLE.attributes["occupation"], strict=True))
    for row in answered:
        assert set(row) == {"query", "answer", "error", "seconds"}
        assert row["seconds"] >= 0 and type(row["error"]) is bool
        if row["query"].startswith("FIND"):
            assert (row["answer"], row["error"]) == (jobs[row["query"][20:]], False)
        elif row["query"].startswith("SELECT count"):
            assert row["answer"] == str(rank[row["query"].split("'")[1]])
        else:
            assert row["error"] and row["answer"].startswith("error: ")
    whole = out.read_bytes()
    assert main(words) == 0
    assert out.read_bytes() == whole, "a finished file stays as it is"

    def plain(path):
        return [{**row, "seconds": 0} for row in rows(path)]

    expected = plain(out)
    for kept in (0, 1, 57, len(whole) // 2, len(whole) - 1):
        out.write_bytes(whole[:kept])  # what a killed process leaves
        assert main(words) == 0
        assert plain(out) == expected
        start = whole[:kept].rfind(b"\n") + 1
        assert out.read_bytes()[:start] == whole[:start], "what was answered is not asked again"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 3: not JSON"),
        ('{"query": 7}', "line 3"),
        ('{"prompt": "x"}', "line 3"),
        ("[]", "line 3"),
        ('"FIND"', "line 3"),
        ("\x00", "line 3"),
    ],
)
def test_a_bad_row_is_named_by_its_line(factbase, tmp_path, capsys, line, words):
    queries, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    queries.write_text('{"query": "FIND a FOR b"}\n\n' + line + '\n{"query": "x"}\n')
    call = ["tool", "sql", str(factbase), "--queries", str(queries), "--out", str(out)]
    assert main(call) == 2
    error = capsys.readouterr().err
    assert "q.jsonl" in error and words in error and "Traceback" not in error
    assert not out.exists()


def test_an_output_of_other_queries_is_left_alone(factbase, tmp_path, capsys):
    queries, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    queries.write_text('{"query": "FIND a FOR b"}\n')
    for content in ('{"query": "other", "answer": "x"}\n', "precious notes\n", "{}\n[]\n"):
        out.write_text(content)
        call = ["tool", "sql", str(factbase), "--queries", str(queries), "--out", str(out)]
        assert main(call) == 2
        assert "a.jsonl, line 1" in capsys.readouterr().err
        assert out.read_text() == content


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["F"], "either one QUERY, or --queries"),
        (["F", "x", "--queries", "Q", "--out", "O"], "either one QUERY, or --queries"),
        (["F", "--queries", "Q"], "go together"),
        (["F", "x", "--out", "O"], "go together"),
        (["F", "--queries", "none.jsonl", "--out", "O"], "none.jsonl does not exist"),
        (["F", "--queries", "Q", "--out", "Q"], "is the file of queries itself"),
        (["F", "--queries", "Q", "--out", "F/x"], "cannot write"),
        (["none.duckdb", "x"], "none.duckdb does not exist"),
        (["Q", "x"], "not a DuckDB file"),
        (["F", "x", "--timeout_s", "0"], "--timeout_s 0"),
        (["F", "x", "--timeout_s", "nan"], "nan"),
        (["F", "x", "--max_rows", "0"], "--max_rows 0"),
        (["F", "x", "--max_answer_bytes", "1"], "--max_answer_bytes 1"),
        (["F", "x", "--nonsense", "1"], "--nonsense"),
        ([], "file"),
    ],
)
def test_bad_input_is_one_plain_message(factbase, queries, tmp_path, capsys, words, message):
    known = {"F": factbase, "Q": queries, "O": tmp_path / "o.jsonl", "F/x": factbase / "x"}
    before = queries.read_bytes()
    assert main(["tool", "sql", *(str(known.get(word, word)) for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "o.jsonl").exists()
    assert queries.read_bytes() == before


def test_help_and_unknown_tool(capsys):
    assert main(["tool"]) == 0
    assert "calculator" in capsys.readouterr().out
    assert main(["tool", "hammer"]) == 2
    assert "hammer" in capsys.readouterr().err
