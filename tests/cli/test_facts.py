import pytest

from toolmem.cli import main
from toolmem.cli.facts import build, show
from toolmem.data.factbase import Factbase
from toolmem.data.people import make_population


def test_build_and_show(tmp_path, capsys):
    path = tmp_path / "facts.duckdb"
    words = ["--people", "100", "--seed", "3", "--alpha", "0.5", "--relations", "true"]
    assert main(["facts", "build", *words, "--out", str(path)]) == 0
    population = make_population(100, seed=3, alpha=0.5, relations=True)
    with Factbase.open(path) as factbase:
        assert factbase.population() == population
    assert main(["facts", "show", str(path), "--rows", "2"]) == 0
    shown = capsys.readouterr().out
    assert "500 facts (kind synthetic, seed 3, alpha 0.5)" in shown
    assert population.fingerprint() in shown and "bits of facts" in shown
    assert population.names[1].split()[0] in shown


def test_build_from_a_table_shows_values_as_they_are(tmp_path, capsys):
    table = tmp_path / "mine.csv"
    table.write_text("name,job\nAnn,[red]spy\nBob,cook\n")
    build(str(table), str(tmp_path / "facts.duckdb"))
    show(str(tmp_path / "facts.duckdb"))
    shown = capsys.readouterr().out
    assert "[red]spy" in shown and "kind table" in shown and "job 2" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["build", "--people", "169557", "--out", "F"], "169,556"),
        (["build", "--people", "-3", "--out", "F"], "people: -3"),
        (["build", "--people", "5", "--alpha", "2", "--out", "F"], "alpha: 2"),
        (["build", "--people", "none.csv", "--out", "F"], "does not exist"),
        (["build", "--people", "none.csv", "--alpha", "0.5", "--out", "F"], "is a table"),
        (["build", "--people", "5"], "out"),
        (["build", "--people", "5", "--out", "F", "--peple", "3"], "peple"),
        (["show", "none.duckdb"], "toolmem facts build"),
        (["sho"], "build or show"),
    ],
)
def test_bad_words_end_with_code_2_and_no_file(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["facts", *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    assert main(["facts"]) == 0
    assert "toolmem facts show FILE" in capsys.readouterr().out
