"""One file of results that SQL can be asked of, and one writer at a time."""

from __future__ import annotations

import subprocess
import sys
import time

import duckdb
import pytest
from sweep_toys import row

from toolmem.errors import ToolmemError
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.outcome import Logged, RunClock, result_row
from toolmem.sweeps.results import Results


def test_rows_are_columns_for_sql(tmp_path):
    results = Results(tmp_path / "results.duckdb")
    assert results.rows() == []
    first = row("a", {"width": 8, "kind": "x"}, **{"val/loss": 1.5})
    second = row("b", {"width": 16, "kind": "y"}, **{"val/loss": 0.5})
    results.write([first, second])
    results.write([row("b", {"width": 16, "kind": "y"}, **{"val/loss": 0.25})])
    with duckdb.connect(str(results.path), read_only=True) as connection:
        found = connection.execute(
            'SELECT kind, "val/loss" FROM runs WHERE width > 4 ORDER BY width'
        ).fetchall()
        assert found == [("x", 1.5), ("y", 0.25)]
        [(width,)] = connection.execute(
            "SELECT settings->>'width' FROM runs WHERE name = 'a'"
        ).fetchall()
        assert width == "8"
    assert [r["settings"] for r in results.rows(["b", "a", "missing"])] == [
        second["settings"], first["settings"]
    ]  # fmt: skip
    assert results.status() == {"a": "done", "b": "done"}


def test_a_column_widens_to_what_comes(tmp_path):
    results = Results(tmp_path / "results.duckdb")
    results.write([row("a", {"size": 1})])
    results.write([row("b", {"size": 2.5})])
    assert [r["size"] for r in results.rows(["a", "b"])] == [1.0, 2.5]
    results.write([row("c", {"size": "large"})])
    results.write([row("d", {"size": 4})])
    assert [r["size"] for r in results.rows(["b", "c", "d"])] == ["2.5", "large", "4"]
    results.write([row("e", {'odd "name"; --': 1})])
    assert results.rows(["e"])[0]['odd "name"; --'] == 1
    assert results.rows(["a"])[0]["settings"] == {"size": 1}


def test_all_rows_of_a_write_or_none(tmp_path):
    results = Results(tmp_path / "results.duckdb")
    results.write([row("a", {"size": 1})])
    with pytest.raises(duckdb.Error):
        results.write([row("b", {"size": 2}), row("c", {"size": 3}, seed="no number")])
    assert set(results.status()) == {"a"}


def test_a_file_of_something_else_is_refused(tmp_path):
    other = Results(tmp_path / "other.duckdb")
    with duckdb.connect(str(other.path)) as connection:
        connection.execute("CREATE TABLE people (name VARCHAR)")
    for use in (lambda: other.write([row("a", {})]), other.rows):
        with pytest.raises(ToolmemError, match="no results of a sweep"):
            use()
    with duckdb.connect(str(other.path)) as connection:
        connection.execute("CREATE TABLE runs (name VARCHAR)")
    with pytest.raises(ToolmemError, match="has no column status"):
        other.rows()
    text = Results(tmp_path / "text.duckdb")
    text.path.write_text("hello, this is no database at all\n" * 400)
    with pytest.raises(ToolmemError, match=r"text.duckdb: "):
        text.rows()


HOLD = """
import sys, time
from toolmem.sweeps.folder import SweepFolder
from pathlib import Path
with SweepFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_sweep_at_a_time(tmp_path):
    folder = SweepFolder(tmp_path / "sweep")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        began = time.monotonic()
        with (
            pytest.raises(ToolmemError, match=rf"process {other.pid}\) is running"),
            folder.locked(),
        ):
            pass
        assert time.monotonic() - began < 5
    finally:
        other.kill()
    with folder.locked():  # the killed one, not even waited for, holds nothing
        other.wait()
    with folder.locked():
        pass


def test_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolmemError, match="--out"), SweepFolder(tmp_path / "file").locked():
        pass


def test_what_was_logged(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,val/loss,train/loss\n1,3.0,\n2,1.0,5\n3,2.0,\n")
    logged = Logged(path)
    assert (logged.steps, logged.names) == (3, ["val/loss", "train/loss"])
    found = [logged.value("val/loss", kept) for kept in ("last", "min", "max")]
    assert found == [2.0, 1.0, 3.0]
    assert logged.value("train/loss", "last") == 5.0
    assert logged.value("other", "last") is None
    assert Logged(tmp_path / "none.csv").steps == 0


def test_seconds_count_what_led_to_the_result(tmp_path, monkeypatch):
    import os

    now = [1000.0]
    monkeypatch.setattr("toolmem.sweeps.outcome.time.time", lambda: now[0])
    clock = RunClock(tmp_path)
    now[0] += 5
    assert clock.seconds() == 5
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_text("")
    os.utime(checkpoint, (1003, 1003))
    now[0] = 2000.0
    again = RunClock(tmp_path)  # 3 seconds were saved, 2 of the 5 were lost
    now[0] += 10
    assert again.seconds() == 13
    checkpoint.unlink()
    assert RunClock(tmp_path).seconds() == 0


def test_by_what_a_run_was_judged_at_rungs(tmp_path):
    (tmp_path / "a").mkdir()
    log = "step,val/loss,train/loss\n10,3.0,\n15,2.5,\n20,2.0,\n40,4.0,\n"
    (tmp_path / "a" / "metrics.csv").write_text(log)
    job = {
        "name": "a", "seed": 0, "settings": {}, "recipe": {}, "metrics": {"val/loss": "last"},
        "runs": str(tmp_path), "judged": ["val/loss", [10, 20]],
    }  # fmt: skip
    assert result_row(job, seconds=1, threads=1)["judged"] == {"10": 3.0, "20": 2.0}
    paused = result_row(job | {"until": 10}, seconds=1, threads=1, stopped="halving")
    assert (paused["judged"], paused["stopped"]) == ({"10": 3.0}, "halving")
    job["metrics"] = {"val/loss": "min"}
    assert result_row(job, seconds=1, threads=1)["judged"] == {"10": 3.0, "20": 2.0}
    results = Results(tmp_path / "results.duckdb")
    results.write([paused])
    assert results.rows()[0]["judged"] == {"10": 3.0}


def test_rows_of_an_older_version_stay_and_new_ones_are_added(tmp_path):
    """A file without the columns processor and params_untied is read as it is, and takes rows with them."""
    results = Results(tmp_path / "results.duckdb")
    old = row("a", {"width": 4})
    results.write([old])
    with duckdb.connect(str(results.path)) as connection:
        columns = {
            name for _, name, *_ in connection.execute("PRAGMA table_info('runs')").fetchall()
        }
    assert not {"processor", "params_untied"} & columns
    results.write([row("b", {"width": 8}, processor="A processor", params_untied=140)])
    found = {one["name"]: one for one in results.rows()}
    assert (found["a"]["processor"], found["a"]["params_untied"]) == (None, None)
    assert (found["b"]["processor"], found["b"]["params_untied"]) == ("A processor", 140)


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_models_parameters_were_without_a_tied_table(tied, tmp_path):
    from toolmem.models import Transformer

    model = Transformer(32, 8, n_layers=1, n_heads=2, max_seq_len=16, tie_embeddings=tied)
    job = {
        "name": "a",
        "seed": 0,
        "settings": {},
        "recipe": {},
        "metrics": {},
        "runs": str(tmp_path),
    }
    made = result_row(job, seconds=1, threads=1, model=model)
    untied = Transformer(32, 8, n_layers=1, n_heads=2, max_seq_len=16)
    assert made["params_untied"] == sum(p.numel() for p in untied.parameters())
    assert made["params_total"] == made["params_untied"] - (32 * 8 if tied else 0)
    assert made["processor"]


def test_a_file_is_small_and_one_of_larger_blocks_is_gone_on_with(tmp_path):
    results = Results(tmp_path / "results.duckdb")
    results.write([row(f"run {i}", {"width": i}) for i in range(50)])
    assert results.path.stat().st_size < 400_000
    old = tmp_path / "old.duckdb"
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{results.path}' AS new (READ_ONLY)")
        connection.execute(f"ATTACH '{old}' AS old (BLOCK_SIZE 262144)")
        connection.execute("COPY FROM DATABASE new TO old")
    Results(old).write([row("one more", {"width": 50})])
    assert len(Results(old).rows()) == 51
