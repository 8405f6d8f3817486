import datetime
import json

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolmem.data.factbase import build_factbase
from toolmem.data.people import make_population
from toolmem.data.tables import load_population
from toolmem.errors import ToolmemError

ROWS = [
    {"name": "Ann O'Neil", "home town": "Paris, Texas", "age": "41"},
    {"name": "Zoë Łoś", "home town": 'the "Hague"', "age": "7"},
]
COLUMNS = {key: [row[key] for row in ROWS] for key in ROWS[0]}


def write(path, columns=COLUMNS):
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif path.suffix == ".duckdb":
        table = pa.table(columns)
        with duckdb.connect(str(path)) as connection:
            connection.register("given", table)
            connection.execute("CREATE TABLE mine AS SELECT * FROM given")
    else:
        import csv

        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet", "duckdb"])
def test_every_format_gives_the_same_population(tmp_path, ending):
    path = tmp_path / f"people.{ending}"
    write(path)
    population = load_population(path)
    assert population.names == COLUMNS["name"]
    assert population.attributes == {key: COLUMNS[key] for key in ("home town", "age")}
    assert (population.kind, population.alpha, population.source) == ("table", None, str(path))


def test_values_that_are_not_text_become_text(tmp_path):
    path = tmp_path / "people.parquet"
    born = [datetime.date(1987, 3, 12), datetime.date(1990, 1, 1)]
    pq.write_table(
        pa.table({"name": ["A", "B"], "n": [1, 2], "ok": [True, False], "d": born}), path
    )
    assert load_population(path).attributes == {
        "n": ["1", "2"],
        "ok": ["true", "false"],
        "d": ["1987-03-12", "1990-01-01"],
    }


def test_a_factbase_is_a_table_too(tmp_path):
    population = make_population(30, seed=2, alpha=0.5)
    build_factbase(population, tmp_path / "facts.duckdb")
    assert load_population(tmp_path / "facts.duckdb") == population


def test_byte_order_mark_and_blank_lines_are_passed_over(tmp_path):
    path = tmp_path / "people.csv"
    path.write_bytes(b"\xef\xbb\xbfname, job\r\nAnn ,spy\r\n\r\nBob,cook\r\n")
    population = load_population(path)
    assert (population.names, population.attributes) == (["Ann", "Bob"], {"job": ["spy", "cook"]})


NAMES = {
    "no column 'name'": ({"Name": ["A"], "x": ["1"]}, "no column 'name'"),
    "only names": ({"name": ["A"]}, "only names"),
    "no rows": ({"name": [], "x": []}, "no rows"),
    "empty name": ({"name": ["A", " "], "x": ["1", "2"]}, "row 2: the name is empty"),
    "duplicate": ({"name": ["A", "B", "A "], "x": list("123")}, "row 3: the name 'A' is in row 1"),
    "no value": ({"name": ["A", "B"], "x": ["1", ""]}, "row 2, column 'x': no value"),
    "bell": ({"name": ["A\x07"], "x": ["1"]}, "row 1, column 'name'"),
    "line end": ({"name": ["A"], "x": ["1\n2"]}, "row 1, column 'x'"),
    "line separator": ({"name": ["A"], "x": ["1\u20282"]}, "control character"),
    "bad header": ({"name": ["A"], "x\x01": ["1"]}, "column name"),
    "for": ({"name": ["A"], "x FOR y": ["1"]}, "' FOR '"),
}


@pytest.mark.parametrize("case", NAMES)
@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_bad_contents_are_refused_by_row(tmp_path, case, ending):
    columns, message = NAMES[case]
    path = tmp_path / f"people.{ending}"
    write(path, columns)
    with pytest.raises(ToolmemError) as caught:
        load_population(path)
    if (case, ending) == ("no rows", "jsonl"):  # an empty file has no columns either
        message = "no column 'name'"
    assert message in str(caught.value) and "people." in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_nul_is_refused(tmp_path, ending):
    path = tmp_path / f"people.{ending}"
    write(path, {"name": ["A", "B"], "x": ["1", "a\0b"]})
    with pytest.raises(ToolmemError, match=r"row 2, column 'x'.*NUL"):
        load_population(path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("p.csv", "name,x\nA,1,2\n", "row 1 (line 2): 3 values"),
        ("p.csv", "name,x,X\nA,1,2\n", "two columns are named"),
        ("p.csv", b"name,x\nA,\xff\n", "not UTF-8"),
        ("p.csv", "name,x\nA,\0\n", "people:"),
        ("p.jsonl", '{"name": "A", "x": 1}\n{"name": "B"\n', "row 2 (line 2): not JSON"),
        ("p.jsonl", '{"name": "A", "x": 1}\n\n{"name": "B", "y": 1}\n', "row 2 (line 3)"),
        ("p.jsonl", '{"name": "A", "x": null}\n', "no value"),
        ("p.jsonl", '{"name": "A", "x": [1]}\n', "list or object"),
        ("p.jsonl", "[1]\n", "not an object"),
        ("p.parquet", "nonsense", "not a whole Parquet file"),
        ("p.duckdb", "nonsense" * 4000, "not a whole DuckDB file"),
        ("p.xlsx", "nonsense", "cannot read '.xlsx'"),
    ],
)
def test_unreadable_files_are_refused(tmp_path, file, content, message):
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ToolmemError) as caught:
        load_population(path)
    assert message in str(caught.value) and str(path) in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(ToolmemError, match="does not exist"):
        load_population(tmp_path / "none.csv")
    with pytest.raises(ToolmemError, match="folder"):
        load_population(tmp_path)


def test_a_database_must_say_which_table_holds_the_people(tmp_path):
    path = tmp_path / "two.duckdb"
    with duckdb.connect(str(path)) as connection:
        connection.execute("CREATE TABLE a AS SELECT 'A' AS name, 'x' AS job")
        connection.execute("CREATE TABLE b AS SELECT 'B' AS name, 'y' AS job")
    with pytest.raises(ToolmemError, match="no table 'people'"):
        load_population(path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("ALTER TABLE b RENAME TO people")
    assert load_population(path).names == ["B"]


def test_a_damaged_page_is_noticed(tmp_path):
    path = tmp_path / "facts.duckdb"
    build_factbase(make_population(5000), path)
    content = bytearray(path.read_bytes())
    for at in range(20_000, len(content), 5_000):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ToolmemError, match=r"facts\.duckdb"):
        load_population(path)
