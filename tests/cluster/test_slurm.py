"""Sweeps of real training on Slurm, one of one node that ``slurm.sh`` sets up in a temporary folder, as root.

Without Debian's packages slurmctld, slurmd, slurm-client and munge these are skipped, but for some that then
run on the Slurm of ``fake_slurm.py``, too.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

import fake_slurm
from slurm_waits import end_all_jobs, hurry, wait_for
from sweep_toys import BASE, sweep_with, write_sweep

from toolmem.cli import main
from toolmem.errors import ToolmemError
from toolmem.sweeps import Results, SweepRecipe, expand
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.slurm import check_no_jobs
from toolmem.sweeps.slurm_queue import jobs_of_user

pytest.importorskip("submitit", reason="the extra cluster is not installed: no executor to test")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="signals and flock of Linux"),
]
STEPS = 1200


@pytest.fixture(params=["real"])
def slurm(request, tmp_path, monkeypatch):
    """Which Slurm the environment leads to; the jobs of a test end with it."""
    if request.param == "real":
        environment = request.getfixturevalue("real_slurm")
    else:
        folder = tmp_path / "cluster"
        environment = fake_slurm.install(folder)
        (folder / "kill_wait").write_text("60")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield request.param
    if request.param == "real":
        end_all_jobs()
    else:
        fake_slurm.clear(folder)


also_without = pytest.mark.parametrize("slurm", ["real", "fake"], indirect=True)


@pytest.fixture
def start():
    """Start a sweep in a process of its own; whatever becomes of the test, none is left."""
    processes = []

    def sweep(recipe: Path, out: Path, *words: str) -> subprocess.Popen:
        options = ["--executor", "slurm", "--slurm.poll_s", "1", *words]
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "toolmem", "sweep", str(recipe), "--out", str(out), *options],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
        return processes[-1]

    yield sweep
    for process in processes:
        process.kill()


class Sweep(threading.Thread):
    """A sweep in a thread of this process, which has imported all it needs."""

    def __init__(self, recipe: Path, out: Path, *words: str) -> None:
        super().__init__(daemon=True)
        words = ("--executor", "slurm", "--slurm.poll_s", "1", *words)
        self.words = ["sweep", str(recipe), "--out", str(out), *words]
        self.code: int | None = None
        self.start()

    def run(self) -> None:
        self.code = main(self.words)

    def ended(self, seconds: float = 1200) -> int | None:
        self.join(seconds)
        return self.code


def rows_of(out: Path) -> dict[str, dict]:
    return {row["name"]: row for row in Results(out / "results.duckdb").rows()}


def logged(out: Path, name: str) -> list[int]:
    """The steps that a run has logged."""
    try:
        with open(out / "runs" / name / "metrics.csv", newline="") as stream:
            return [int(row["step"]) for row in csv.DictReader(stream) if row["step"]]
    except (FileNotFoundError, ValueError):  # a line that is being written
        return []


def long_sweep(path: Path, widths=(4, 8), steps=STEPS) -> tuple[Path, list[str]]:
    """Runs of some seconds, whose regular checkpoints come late; and their names."""
    base = copy.deepcopy(BASE)
    base["trainer"] |= {"max_steps": steps, "val_check_interval": STEPS // 2}
    base["checkpointing"]["every_n_steps"] = STEPS // 2
    axes = {"width": {"key": "model.model.dim", "values": list(widths)}}
    recipe = write_sweep(path, sweep_with(base=base, axes=axes, report=None))
    return recipe, [run.name for run in expand(SweepRecipe.read(recipe))]


def seconds_before(out: Path, name: str) -> float:
    """Seconds of a run up to the checkpoint that its last process went on from; 0 when it began anew."""
    return json.loads((out / "runs" / name / "clock.json").read_text())["seconds_before"]


def number_of(name_part: str, index: int) -> str:
    """Slurm's number of a job of the one array that there is."""
    jobs = jobs_of_user().values()
    [number] = [
        job.number for job in jobs
        if name_part in job.name and job.number.endswith(f"_{index}") and not job.ended
    ]  # fmt: skip
    return number


def alone(recipe: Path, name: str, folder: Path) -> float:
    """The loss that ``toolmem fit`` alone ends with."""
    [run] = [run for run in expand(SweepRecipe.read(recipe)) if run.name == name]
    written = write_sweep(folder / "alone.yaml", run.recipe)
    assert main(["fit", "--config", str(written), "--runs", str(folder), "--name", "alone"]) == 0
    with open(folder / "alone" / "metrics.csv", newline="") as stream:
        return float(list(csv.DictReader(stream))[-1]["val/loss"])


def check_done_once(out: Path, names: list[str]) -> None:
    """Every run is done, each step of it is logged once, and no process has begun it twice."""
    rows = rows_of(out)
    assert {name: row["error"] for name, row in rows.items()} == dict.fromkeys(names)
    for name in names:
        steps = logged(out, name)
        assert steps == sorted(set(steps))
        assert steps[-1] == rows[name]["steps"] == STEPS
        assert rows[name]["tokens"] == STEPS * 4 * 16


def test_a_grid_is_what_local_workers_make_of_it(slurm, tmp_path):
    recipe = write_sweep(tmp_path / "toy.yaml", sweep_with(report=None))
    assert Sweep(recipe, tmp_path / "out").ended() == 0
    assert main(["sweep", str(recipe), "--out", str(tmp_path / "local"), "--workers", "1"]) == 0
    rows, local = rows_of(tmp_path / "out"), rows_of(tmp_path / "local")
    assert set(rows) == set(local)
    for name, row in rows.items():
        assert row["val/loss"] == pytest.approx(local[name]["val/loss"], rel=1e-6)
        for column in ("status", "steps", "tokens", "flops", "params_total", "recipe", "settings"):
            assert row[column] == local[name][column], column
        assert row["threads"] == 1
    assert len(list((tmp_path / "out" / "slurm").glob("*_submission.sh"))) == 1


def test_populations_are_jobs_too(slurm, tmp_path):
    base = copy.deepcopy(BASE)
    base["module"] = "toolmem.training.PopulationModule"
    base["model"]["members"] = [{"seed": 0}, {"seed": 1}]
    base["data"] = {
        "class_path": "toolmem.data.PopulationDataModule",
        "init_args": {"data": base["data"], "members": [{}, {"seed": 1}]},
    }
    axes = {"lr": {"key": "model.optimizer.lr", "values": [1e-3, 1e-2]}}
    written = sweep_with(base=base, axes=axes, seed_keys=["seed_everything"], report=None)
    recipe = write_sweep(tmp_path / "toy.yaml", written)
    assert Sweep(recipe, tmp_path / "out").ended() == 0
    assert main(["sweep", str(recipe), "--out", str(tmp_path / "local"), "--workers", "1"]) == 0
    rows, local = rows_of(tmp_path / "out"), rows_of(tmp_path / "local")
    assert len(rows) == 2 and set(rows) == set(local)
    for name, row in rows.items():
        assert row["error"] is None
        assert row["tokens"] == local[name]["tokens"] == 2 * 4 * 4 * 16
        assert row["val/loss"] == pytest.approx(local[name]["val/loss"], rel=1e-6)
        members = tmp_path / "out" / "runs" / name / "members"
        assert all((members / str(n) / "checkpoints" / "last.ckpt").is_file() for n in (0, 1))


def test_a_search_decides_by_results_what_is_submitted_next(slurm, tmp_path):
    written = sweep_with(
        axes={"rows": {"key": "data.batch_size", "values": [4, 8]}},
        search={
            "family": {"key": "model.model.dim", "values": [4, 8, 12, 16]},
            "metric": "flops/total",
            "reach": 2.5e6,
        },
        metrics=["flops/total"],
        report=None,
    )
    recipe, out = write_sweep(tmp_path / "toy.yaml", written), tmp_path / "out"
    assert Sweep(recipe, out).ended() == 0
    rows = rows_of(out).values()
    answers = Results(out / "results.duckdb").rows(table="searches")
    assert [answer["status"] for answer in answers] == ["found", "found"]
    for answer in answers:
        tried = [row for row in rows if row["rows"] == answer["rows"]]
        passed = [row["member"] for row in tried if row["flops/total"] >= 2.5e6]
        below = [row["member"] for row in tried if row["flops/total"] < 2.5e6]
        assert str(min(passed)) == answer["member"]
        assert not below or max(below) == min(passed) - 4
    scripts = list((out / "slurm").glob("*_submission.sh"))
    assert 2 <= len(scripts) <= len(rows)


@pytest.mark.parametrize(
    ("slurm", "asked"),
    [("real", "requeued"), ("real", "preempted"), ("fake", "requeued")],
    indirect=["slurm"],
)
def test_a_job_that_is_asked_to_end_goes_on_where_it_was(slurm, tmp_path, asked):
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = Sweep(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 40 or not sweep.is_alive())
    number = number_of("long", 0)
    if asked == "requeued":
        subprocess.run(["scontrol", "requeue", number], check=True)
    else:
        urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null"]
        subprocess.run([*urgent, "--wrap=sleep 1"], check=True, stdout=subprocess.DEVNULL)
    log = out / "slurm" / f"{number}_0_log.out"
    wait_for(lambda: "asked to end by SIGTERM" in log.read_text())
    assert logged(out, names[0])[-1] < STEPS // 2  # before any regular checkpoint
    assert (out / "runs" / names[0] / "checkpoints" / "last.ckpt").is_file()
    if slurm == "real":  # Slurm lets requeued jobs wait two minutes
        wait_for(lambda: hurry() and not sweep.is_alive())
    assert sweep.ended() == 0
    check_done_once(out, names)
    assert seconds_before(out, names[0]) > 0  # the checkpoint was taken up
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 1
    loss = alone(recipe, names[0], tmp_path)
    assert rows_of(out)[names[0]]["val/loss"] == pytest.approx(loss, rel=1e-6)


@also_without
def test_a_killed_runner_finds_its_jobs_again(slurm, start, tmp_path):
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 20)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert not rows_of(out)
    with pytest.raises(
        ToolmemError, match=r"go on with --executor slurm, or end them first: scancel"
    ):
        check_no_jobs(SweepFolder(out))
    assert Sweep(recipe, out).ended() == 0
    check_done_once(out, names)
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 1
    assert [seconds_before(out, name) for name in names] == [0, 0]


def test_a_cancelled_job_stops_no_other_and_ctrl_c_leaves_them(slurm, start, tmp_path):
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = Sweep(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 10)
    number = number_of("long", 0)
    subprocess.run(["scancel", number], check=True)
    assert sweep.ended() == 0
    rows = rows_of(out)
    assert f"its job {number} was cancelled (scancel)" in rows[names[0]]["error"]
    assert rows[names[0]]["steps"] > 10
    assert rows[names[1]]["status"] == "done"
    sweep = start(recipe, out, "--retry-failed")
    # the log has rows of the cancelled job too: only a job in the queue tells that the sweep is at work
    wait_for(lambda: any("long" in job.name and not job.ended for job in jobs_of_user().values()))
    sweep.send_signal(signal.SIGINT)
    output = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 130, output
    assert "1 runs are left: the same command goes on with them" in output
    assert "1 of them go on as jobs of Slurm; to end these too: scancel " in output
    wait_for(lambda: (out / "runs" / names[0] / "result.json").exists())
    assert Sweep(recipe, out).ended() == 0
    check_done_once(out, names)


@also_without
def test_a_run_that_is_out_of_time_says_so(slurm, tmp_path):
    recipe, _ = long_sweep(tmp_path / "long.yaml", widths=(4,), steps=10**6)
    out = tmp_path / "out"
    words = [
        "--slurm.timeout_min",
        "1",
        "--slurm.signal_delay_s",
        "20",
        "--slurm.max_num_timeout",
        "0",
    ]
    if slurm == "fake":
        (tmp_path / "cluster" / "warn").write_text("40")
    assert Sweep(recipe, out, *words).ended() == 2  # every run failed
    [row] = rows_of(out).values()
    assert row["error"].startswith("out of time: jobs of 1 minutes, 0 times requeued")
