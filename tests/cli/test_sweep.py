"""``toolmem sweep``: killed at any moment, it is finished by the same command; nothing is done twice."""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

from sweep_toys import BASE, sweep_with, write_sweep

from toolmem.sweeps import Results, SweepRecipe, expand


def rows_of(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in Results(out / "results.duckdb").rows()}


def written_at(out: Path) -> dict[str, int]:
    """When each run's result was written."""
    return {path.parent.name: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy sweep: look, but do not touch."""
    from toolmem.cli import main

    folder = tmp_path_factory.mktemp("sweep")
    recipe = write_sweep(folder / "toy.yaml", sweep_with())
    assert main(["sweep", str(recipe), "--out", str(folder / "out"), "--workers", "1"]) == 0
    return folder


def test_a_row_for_each_run(finished):
    rows = rows_of(finished / "out")
    runs = expand(SweepRecipe.read(finished / "toy.yaml"))
    assert set(rows) == {run.name for run in runs}
    for run in runs:
        row = rows[run.name]
        assert (row["status"], row["error"], row["seed"]) == ("done", None, 0)
        assert row["settings"] == run.settings
        assert row["recipe"] == run.recipe
        assert (row["width"], row["lr"]) == tuple(run.settings.values())
        assert (row["steps"], row["tokens"]) == (4, 4 * 4 * 16)
        assert row["params_total"] - row["params_non_embedding"] == 2 * 32 * row["width"]
        assert row["flops"] > 6 * row["params_non_embedding"] * row["tokens"]
        assert row["seconds"] > 0
        assert row["toolmem_version"]
        assert row["processor"]
        assert row["params_untied"] == row["params_total"]  # no table is tied here
        folder = finished / "out" / "runs" / run.name
        with open(folder / "metrics.csv", newline="") as stream:
            assert row["val/loss"] == float(list(csv.DictReader(stream))[-1]["val/loss"])
        assert not (folder / "checkpoints").exists()
        assert (folder / "log.txt").is_file()
    for name in ("report.html", "toy.csv", "toy.png", "toy.svg", "sweep.yaml"):
        assert (finished / "out" / name).stat().st_size > 100, name


def test_the_last_run_of_a_worker_is_what_fit_alone_gives(finished, toolmem, tmp_path):
    *_, run = expand(SweepRecipe.read(finished / "toy.yaml"))
    recipe = write_sweep(tmp_path / "alone.yaml", run.recipe)
    called = toolmem("fit", "--config", recipe, "--runs", tmp_path, "--name", "alone")
    assert called.code == 0, called.err
    with open(tmp_path / "alone" / "metrics.csv", newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    assert rows_of(finished / "out")[run.name]["val/loss"] == float(last["val/loss"])


def test_a_finished_sweep_is_only_drawn_again(finished, toolmem):
    out = finished / "out"
    before = written_at(out)
    (out / "toy.png").unlink()
    called = toolmem("sweep", finished / "toy.yaml", "--out", out)
    assert called.code == 0, called.err
    assert written_at(out) == before
    assert (out / "toy.png").is_file()
    assert "best lr" in called.out
    assert "has no search" in toolmem("plot", "searches", out).err
    drawn = toolmem("plot", out, "--out", finished / "page.html", "--pdf")
    assert drawn.code == 0, drawn.err
    assert [Path(line).name for line in drawn.out.splitlines()] == [
        "page.html", "toy.csv", "toy.pdf", "toy.svg"
    ]  # fmt: skip
    (out / "results.duckdb").unlink()  # it is made again of what the workers left
    assert toolmem("sweep", finished / "toy.yaml", "--out", out).code == 0
    assert len(rows_of(out)) == 4


def test_dry_run(finished, toolmem, tmp_path):
    called = toolmem("sweep", finished / "toy.yaml", "--out", tmp_path / "new", "--dry-run")
    assert called.code == 0, called.err
    sizes = {row["width"]: row["params_total"] for row in rows_of(finished / "out").values()}
    assert "runs: 4, of which 0 have a result" in called.out
    assert f"parameters: {sizes[4]:,} to {sizes[8]:,}, {2 * sum(sizes.values()):,} in" in called.out
    assert "tokens: 1,024" in called.out
    assert not (tmp_path / "new").exists()
    again = toolmem("sweep", finished / "toy.yaml", "--out", finished / "out", "--dry-run")
    assert "of which 4 have a result" in again.out


@pytest.mark.slow
def test_a_changed_recipe_adds_only_what_is_new(finished, toolmem, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    before = written_at(out)
    written = sweep_with()
    written["axes"]["width"]["values"] = [4, 6]  # 6 / 2 heads = 3: RoPE turns pairs
    recipe = write_sweep(tmp_path / "toy.yaml", written)
    refused = toolmem("sweep", recipe, "--out", out)
    assert refused.code == 2
    assert "6_0.001_s0" in refused.err
    assert written_at(out) == before

    written["axes"]["width"]["values"] = [4, 12]
    assert toolmem("sweep", write_sweep(recipe, written), "--out", out, "--workers", "1").code == 0
    after = written_at(out)
    assert {name: after[name] for name in before} == before
    assert sorted(row["width"] for row in rows_of(out).values()) == [4, 4, 8, 8, 12, 12]


@pytest.mark.slow
def test_a_failed_run_is_recorded_and_stops_no_other(toolmem, tmp_path):
    """What no check sees beforehand: a run folder that cannot be, a metric that is never logged."""
    written = sweep_with(report=None, metrics=["val/loss"])
    written["axes"] = {"pairs": {"key": "data.n_pairs", "values": [9, 2]}}  # 9 pairs in 16 tokens
    recipe, out = write_sweep(tmp_path / "toy.yaml", written), tmp_path / "out"
    called = toolmem("sweep", recipe, "--out", out, "--workers", "1")
    assert called.code == 0, called.err
    assert "1 of 2 runs failed" in called.err
    assert "4 x n_pairs" in called.err
    by_pairs = {row["pairs"]: row for row in rows_of(out).values()}
    assert by_pairs[2]["status"] == "done"
    assert by_pairs[9]["status"] == "failed"
    assert "4 x n_pairs" in by_pairs[9]["error"]
    assert "4 x n_pairs" in (out / "runs" / by_pairs[9]["name"] / "log.txt").read_text()

    before = written_at(out)
    assert toolmem("sweep", recipe, "--out", out).code == 0
    assert written_at(out) == before
    assert toolmem("sweep", recipe, "--out", out, "--workers", "1", "--retry-failed").code == 0
    after = written_at(out)
    assert [name for name in before if after[name] != before[name]] == [by_pairs[9]["name"]]

    unknown = sweep_with(report=None, metrics=["val/accuray"], axes={"w": written["axes"]["pairs"]})
    unknown["axes"]["w"] = {"key": "model.model.dim", "values": [4]}
    recipe = write_sweep(tmp_path / "unknown.yaml", unknown)
    called = toolmem("sweep", recipe, "--out", tmp_path / "other", "--workers", "1")
    assert called.code == 2
    assert "val/accuray was never logged; there are" in called.err


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        ({"key": "model.model.dmi", "values": [4]}, "dmi"),
        ({"key": "trainer.max_stesp", "values": [4]}, "max_stesp"),
        ({"key": "model.model.dim", "values": [8, -1]}, "dim"),
        ({"key": "model.model.dim", "values": ["wide"]}, "dim: expected"),
    ],
)
def test_a_key_that_fit_refuses_is_refused_before_anything_runs(toolmem, tmp_path, axis, message):
    recipe = write_sweep(tmp_path / "toy.yaml", sweep_with(axes={"w": axis}, report=None))
    called = toolmem("sweep", recipe, "--out", tmp_path / "out")
    assert called.code == 2
    assert message in called.err
    assert "Traceback" not in called.err
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.parametrize("words", [["--workers", "0"], ["--workers", "-1"]])
def test_at_least_one_worker(toolmem, tmp_path, words):
    recipe = write_sweep(tmp_path / "toy.yaml", sweep_with())
    called = toolmem("sweep", recipe, "--out", tmp_path / "out", *words)
    assert called.code == 2
    assert "at least 1" in called.err


# ---- searches and halving


def flops_sweep(**changes):
    """FLOPs grow with the width, so that a search for them has one right answer."""
    return sweep_with(
        axes={"rows": {"key": "data.batch_size", "values": [4, 8]}},
        search={
            "family": {"key": "model.model.dim", "values": [4, 8, 12, 16]},
            "metric": "flops/total",
            "reach": 2.5e6,
        },
        metrics=["flops/total"],
        report={"x": "rows"},
    ) | changes  # fmt: skip


@pytest.mark.slow
def test_a_search_finds_the_smallest_and_is_only_drawn_again(toolmem, tmp_path):
    recipe, out = write_sweep(tmp_path / "toy.yaml", flops_sweep()), tmp_path / "out"
    called = toolmem("sweep", recipe, "--out", out, "--workers", "1")
    assert called.code == 0, called.err
    assert "2 of 2 searches over" in " ".join(called.err.split())
    rows = rows_of(out)
    answers = Results(out / "results.duckdb").rows(table="searches")
    assert len(answers) == 2
    for answer in answers:
        runs = [r for r in rows.values() if r["rows"] == answer["rows"]]
        passed = [r for r in runs if r["flops/total"] >= 2.5e6]
        best = min(passed, key=lambda r: r["params_total"])
        assert (answer["status"], answer["run"]) == ("found", best["name"])
        assert answer["params_total"] == best["params_total"]
        below = [r["member"] for r in runs if r["flops/total"] < 2.5e6]
        assert not below or max(below) == best["member"] - 4
    assert answers[0]["member"] != answers[1]["member"]
    assert (out / "toy.png").is_file()
    assert "params_total" in called.out
    drawn = toolmem("plot", "searches", out, "--out", tmp_path / "drawn")
    assert drawn.code == 0, drawn.err
    assert (tmp_path / "drawn" / "report.html").is_file()
    assert (tmp_path / "drawn" / "toy.csv").read_text() == (out / "toy.csv").read_text()
    assert "is neither a sweep's folder" in toolmem("plot", "searches", tmp_path).err
    before = written_at(out)
    (out / "results.duckdb").unlink()
    assert toolmem("sweep", recipe, "--out", out).code == 0
    assert written_at(out) == before
    assert Results(out / "results.duckdb").rows(table="searches") == answers
    dry = toolmem("sweep", recipe, "--out", out, "--dry-run")
    assert "runs: about 6, at most 6, of which" in dry.out, dry.out
    assert "FLOPs: about" in dry.out
    assert "hours on this machine: about" in dry.out


def test_a_family_out_of_order_is_refused_before_anything_runs(toolmem, tmp_path):
    written = flops_sweep()
    written["search"]["family"]["values"] = [4, 12, 8]
    recipe = write_sweep(tmp_path / "toy.yaml", written)
    called = toolmem("sweep", recipe, "--out", tmp_path / "out")
    assert called.code == 2
    assert "search.family: 12 has" in called.err
    assert "and 8, which comes after it" in called.err
    assert not list((tmp_path / "out").glob("runs/*"))


@pytest.mark.slow
def test_halving_goes_on_from_checkpoints_as_if_it_had_not_paused(toolmem, tmp_path):
    base = copy.deepcopy(BASE)
    base["trainer"]["max_steps"] = 8
    base["model"]["schedule"] = {
        "class_path": "toolmem.training.WSD", "init_args": {"decay_fraction": 0.9},
    }  # fmt: skip
    written = sweep_with(
        base=base,
        axes={"lr": {"key": "model.optimizer.lr", "values": [1e-4, 1e-2, 3e-2]}},
        halving={"axis": "lr", "metric": "val/loss", "rungs": [2, 4], "keep": 0.4},
        report=None,
    )
    recipe, out = write_sweep(tmp_path / "toy.yaml", written), tmp_path / "out"
    called = toolmem("sweep", recipe, "--out", out, "--workers", "1")
    assert called.code == 0, called.err
    rows = sorted(rows_of(out).values(), key=lambda r: r["steps"])
    assert [(r["steps"], r["stopped"]) for r in rows] == [
        (2, "halving"), (4, "halving"), (8, None)
    ]  # fmt: skip
    assert not list(out.glob("runs/*/checkpoints"))
    assert rows[2]["tokens"] == 8 * 4 * 16

    plain = write_sweep(tmp_path / "plain.yaml", written | {"halving": None})
    called = toolmem("sweep", plain, "--out", tmp_path / "plain", "--workers", "1")
    assert called.code == 0, called.err
    best = rows[2]["name"]
    assert rows[2]["val/loss"] == rows_of(tmp_path / "plain")[best]["val/loss"]
    # what halving left is trained where a grid asks for it
    assert toolmem("sweep", plain, "--out", out, "--workers", "1").code == 0
    assert {r["steps"] for r in rows_of(out).values()} == {8}
    values = {name: r["val/loss"] for name, r in rows_of(out).items()}
    assert values == {n: r["val/loss"] for n, r in rows_of(tmp_path / "plain").items()}


def test_another_sweeps_results_are_refused(finished, toolmem, tmp_path):
    before = written_at(finished / "out")
    other = sweep_with(axes={"pairs": {"key": "data.n_pairs", "values": [1, 2]}}, report=None)
    recipe = write_sweep(tmp_path / "other.yaml", other)
    for words in ([], ["--dry-run"]):
        called = toolmem("sweep", recipe, "--out", finished / "out", *words)
        assert called.code == 2
        assert "holds results of another sweep, with the axes width, lr" in called.err
        assert "name another --out" in called.err
    assert written_at(finished / "out") == before
    assert len(rows_of(finished / "out")) == 4


# ---- killed


STEPS = 80


def long_sweep(path: Path) -> Path:
    """Two runs of some seconds each, with a checkpoint every few steps."""
    base = copy.deepcopy(BASE)
    base["trainer"] |= {"max_steps": STEPS, "val_check_interval": STEPS // 2}
    base["checkpointing"]["every_n_steps"] = 5
    axes = {"width": {"key": "model.model.dim", "values": [4, 8]}}
    return write_sweep(path, sweep_with(base=base, axes=axes, report=None))


@pytest.fixture
def start():
    """Start a sweep in a process of its own; whatever becomes of the test, none is left."""
    processes = []

    def sweep(recipe: Path, out: Path) -> subprocess.Popen:
        words = ["sweep", str(recipe), "--out", str(out), "--workers", "1"]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "toolmem", *words],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
        return processes[-1]

    yield sweep
    for process in processes:
        process.kill()


def wait_for(what, seconds=100):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.02)
    return found


def workers_of(pid: int) -> list[int]:
    """The worker processes of a sweep, which threads start: any of its threads may be the parent."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(word) for word in (task / "children").read_text().split()]
    return [
        child for child in found
        if "sweep_worker" in Path(f"/proc/{child}/cmdline").read_text()
    ]  # fmt: skip


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")


@linux
@pytest.mark.slow
@pytest.mark.parametrize("victim", ["parent", "worker"])
def test_killed_in_mid_run_it_is_finished(victim, start, tmp_path):
    """With the weights' last checkpoint taken up, and the results those of a run that nobody killed."""
    recipe, out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    first, second = (run.name for run in expand(SweepRecipe.read(recipe)))
    sweep = start(recipe, out)
    wait_for(lambda: (out / "runs" / second / "checkpoints" / "last.ckpt").is_file())
    [worker] = workers_of(sweep.pid)
    before = written_at(out)
    assert set(before) == {first}
    if victim == "parent":
        os.kill(sweep.pid, signal.SIGKILL)
        sweep = start(recipe, out)  # at once, while the worker may still be there
    else:
        os.kill(worker, signal.SIGKILL)
    output = sweep.communicate(timeout=200)[0]
    assert sweep.returncode == 0, output
    assert "2 done, 0 failed" in output
    assert not Path(f"/proc/{worker}").exists()

    after = written_at(out)
    assert after[first] == before[first]  # nothing was done twice
    rows = rows_of(out)
    assert {name: row["status"] for name, row in rows.items()} == {first: "done", second: "done"}
    for name in (first, second):
        with open(out / "runs" / name / "metrics.csv", newline="") as stream:
            steps = [int(row["step"]) for row in csv.DictReader(stream)]
        assert steps == sorted(set(steps))
        assert steps[-1] == rows[name]["steps"] == STEPS
        assert rows[name]["tokens"] == STEPS * 4 * 16

    *_, run = expand(SweepRecipe.read(recipe))
    from toolmem.cli import main

    alone = write_sweep(tmp_path / "alone.yaml", run.recipe)
    assert main(["fit", "--config", str(alone), "--runs", str(tmp_path), "--name", "alone"]) == 0
    with open(tmp_path / "alone" / "metrics.csv", newline="") as stream:
        last = list(csv.DictReader(stream))[-1]
    assert rows[second]["val/loss"] == pytest.approx(float(last["val/loss"]), rel=1e-6)


@linux
@pytest.mark.slow
def test_killed_between_result_and_database(finished, toolmem, tmp_path):
    """A result that a worker handed over, and that the killed sweep never wrote down, is taken up."""
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    (out / "results.duckdb").unlink()
    rows = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    Results(out / "results.duckdb").write(rows[:2])
    before = written_at(out)
    assert toolmem("sweep", finished / "toy.yaml", "--out", out).code == 0
    assert written_at(out) == before
    assert len(rows_of(out)) == 4


@linux
@pytest.mark.slow
def test_a_run_that_always_kills_its_process_fails_by_name(toolmem, tmp_path, monkeypatch):
    module = tmp_path / "my_killers.py"
    module.write_text(
        "import os, signal\nimport lightning.pytorch as pl\n"
        "class Killer(pl.Callback):\n"
        "    def on_train_start(self, trainer, pl_module):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    killer = [{"class_path": "my_killers.Killer"}]
    axes = {
        "callback": {"killer": {"trainer.callbacks": killer}, "none": {"trainer.callbacks": []}}
    }
    recipe = write_sweep(tmp_path / "toy.yaml", sweep_with(axes=axes, report=None))
    words = ["sweep", recipe, "--out", tmp_path / "out", "--workers", "1"]
    called = toolmem(*words, "--allow_packages", "my_killers")
    assert called.code == 0, called.err
    by_label = {row["callback"]: row for row in rows_of(tmp_path / "out").values()}
    assert by_label["none"]["status"] == "done"
    assert by_label["killer"]["status"] == "failed"
    assert "by SIGKILL (out of memory?)" in by_label["killer"]["error"]


@linux
@pytest.mark.slow
def test_two_at_once(start, tmp_path, toolmem):
    recipe, out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out)
    wait_for(lambda: list(out.glob("runs/*/metrics.csv")))
    [worker] = workers_of(sweep.pid)
    os.kill(worker, signal.SIGSTOP)  # it would be done before the other has looked
    called = toolmem("sweep", recipe, "--out", out)
    assert called.code == 2
    assert f"another sweep (process {sweep.pid}) is running" in called.err
    sweep.send_signal(signal.SIGINT)
    os.kill(worker, signal.SIGCONT)
    output = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 130, output
    assert "the same command goes on" in output
    assert not Path(f"/proc/{worker}").exists()
