import duckdb
import pytest

from toolmem.data.factbase import Factbase, build_factbase
from toolmem.data.people import Population, make_population, unseen_population
from toolmem.errors import ToolmemError


def test_round_trip(tmp_path):
    population = make_population(300, seed=4, alpha=0.5, relations=True)
    path = tmp_path / "new" / "facts.duckdb"
    assert build_factbase(population, path) == population.fingerprint()
    with Factbase.open(path) as factbase:
        assert factbase.fingerprint == population.fingerprint()
        assert factbase.attributes == tuple(population.attributes)
        assert len(factbase) == 300
        assert factbase.population() == population  # kind, seed and alpha too
        assert factbase.head(2)[1][0] == population.names[1]
        assert factbase.unseen_population() is None
    assert list(path.parent.iterdir()) == [path]


def test_it_is_plain_text_columns_indexed_by_name(tmp_path):
    path = tmp_path / "facts.duckdb"
    population = make_population(50)
    build_factbase(population, path)
    with duckdb.connect(str(path), read_only=True) as connection:
        types = connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE NOT internal"
        ).fetchall()
        assert {kind for _, kind in types} == {"VARCHAR"}
        assert connection.execute("SELECT is_unique FROM duckdb_indexes()").fetchall() == [(True,)]
        row = connection.execute("SELECT * FROM people WHERE name = ?", [population.names[7]])
        assert row.fetchone()[1:] == tuple(v[7] for v in population.attributes.values())


def test_unseen_people_can_be_asked_about_but_are_not_the_population(tmp_path):
    path = tmp_path / "facts.duckdb"
    known = make_population(40)
    unseen = unseen_population(10, training=known)
    assert build_factbase(known, path, unseen=unseen) == known.fingerprint()
    with Factbase.open(path) as factbase:
        assert len(factbase) == 40 and factbase.population() == known
        found = factbase.unseen_population()
        assert (found.names, found.attributes) == (unseen.names, unseen.attributes)
    with duckdb.connect(str(path), read_only=True) as connection:
        assert connection.execute("SELECT count(*) FROM people").fetchone() == (50,)


def test_any_columns_and_any_text(tmp_path):
    path = tmp_path / "facts.duckdb"
    table = Population(
        ['O\'Brien "x" ☃', "名前"], {"select": ["a'b", "c"], 'home "town"': ["; DROP", "é"]}
    )
    build_factbase(table, path)
    with Factbase.open(path) as factbase:
        assert factbase.population() == table
        assert factbase.head(1) == [('O\'Brien "x" ☃', "a'b", "; DROP")]


def test_it_is_read_only_and_replaced_in_one_step(tmp_path):
    path = tmp_path / "facts.duckdb"
    build_factbase(make_population(10), path)
    with Factbase.open(path) as before, Factbase.open(path) as beside:
        with pytest.raises(duckdb.Error):
            before._connection.execute("DELETE FROM people")
        build_factbase(make_population(20), path)
        assert len(before) == len(beside) == 10
        with Factbase.open(path) as after:
            assert len(after) == 20


def test_changed_contents_are_noticed(tmp_path):
    path = tmp_path / "facts.duckdb"
    build_factbase(make_population(10), path)
    with duckdb.connect(str(path)) as connection:
        connection.execute("UPDATE people SET occupation = 'spy' WHERE rowid = 3")
    with Factbase.open(path) as factbase, pytest.raises(ToolmemError, match="fingerprint"):
        factbase.population()


def test_a_failed_build_leaves_the_old_file(tmp_path):
    path = tmp_path / "facts.duckdb"
    fingerprint = build_factbase(make_population(10), path)
    with pytest.raises(ToolmemError, match="cannot write"):
        build_factbase(Population(["A", "A"], {"x": ["1", "2"]}), path)  # a name twice
    with Factbase.open(path) as factbase:
        assert factbase.fingerprint == fingerprint
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_factbase_is_refused(tmp_path):
    with pytest.raises(ToolmemError, match="toolmem facts build"):
        Factbase.open(tmp_path / "none.duckdb")
    junk = tmp_path / "junk.duckdb"
    junk.write_bytes(b"not a database" * 1000)
    with pytest.raises(ToolmemError, match=r"cannot be opened"):
        Factbase.open(junk)
    whole = tmp_path / "whole.duckdb"
    build_factbase(make_population(2000), whole)
    cut = tmp_path / "cut.duckdb"
    cut.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(ToolmemError, match=r"cut\.duckdb"), Factbase.open(cut) as factbase:
        factbase.population()
    plain = tmp_path / "plain.duckdb"
    with duckdb.connect(str(plain)) as connection:
        connection.execute("CREATE TABLE people AS SELECT 'Ann' AS name, 'x' AS job")
    with pytest.raises(ToolmemError, match="no fingerprint"):
        Factbase.open(plain)
    with duckdb.connect(str(whole)) as connection:
        connection.execute("UPDATE meta SET value = '99' WHERE key = 'schema_version'")
    with pytest.raises(ToolmemError, match="schema version 99"):
        Factbase.open(whole)
