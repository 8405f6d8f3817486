"""The Slurm executor on a real Slurm, with jobs that take no time: how they end, and Slurm's words."""

from __future__ import annotations

import json
import subprocess
import threading
from collections import Counter
from pathlib import Path

import pytest
from slurm_toys import ToyJob, calls, jobs_file, toy_recipe
from slurm_waits import end_all_jobs, wait_for

from toolmem.errors import ToolmemError
from toolmem.sweeps import slurm
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.plans import make_plan
from toolmem.sweeps.runner import SweepRunner
from toolmem.sweeps.slurm import SlurmExecutor, check_no_jobs
from toolmem.sweeps.slurm_options import SlurmOptions
from toolmem.sweeps.slurm_queue import jobs_of_user

pytest.importorskip("submitit", reason="the extra cluster is not installed: no executor to test")
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _cluster(real_slurm, monkeypatch):
    for name, value in real_slurm.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent / "sweeps"))
    monkeypatch.setattr(slurm, "SETTLE", 1.0)
    yield
    end_all_jobs()


def executor_of(recipe, out, **options):
    settled = SlurmOptions(poll_s=0.5, **options).over(SlurmOptions())
    return SlurmExecutor(recipe, SweepFolder(out), settled, ToyJob)


def sweep(recipe, out, **options):
    folder = SweepFolder(out)
    with folder.locked() as lock:
        runner = SweepRunner(recipe, make_plan(recipe), folder)
        runner.take_stock()
        runner.run(executor_of(recipe, out, **options), lock, lambda state: None)
    return {row["act"]: row for row in folder.results.rows()}


def in_background(recipe, out, **options):
    found = {}
    thread = threading.Thread(
        target=lambda: found.update(sweep(recipe, out, **options)), daemon=True
    )
    thread.start()
    return thread, found


def start(recipe, out, **options):
    """What a runner does that is killed after it has submitted."""
    folder = SweepFolder(out)
    executor = executor_of(recipe, out, **options)
    wanted = make_plan(recipe).wanted({})
    with folder.locked() as lock:
        executor.open(wanted, lock)
        executor.submit(wanted)
    return executor


def state_of(number):
    return next((job.state for job in jobs_of_user().values() if job.number == number), None)


def test_jobs_that_die_and_that_do_not(tmp_path):
    out = tmp_path / "out"
    rows = sweep(toy_recipe("die", "b", "c"), out)
    assert {act: row["status"] for act, row in rows.items()} == {
        "die": "failed", "b": "done", "c": "done",
    }  # fmt: skip
    assert "its job ended 3 times without a result, the last as FAILED" in rows["die"]["error"]
    assert Counter(Counter(calls(out)).values()) == {3: 1, 1: 2}
    assert jobs_file(out) == []


def test_a_cancelled_one(tmp_path):
    out = tmp_path / "out"
    thread, rows = in_background(toy_recipe("wait", "b"), out)
    wait_for(lambda: len(calls(out)) == 2)
    number = jobs_file(out)[0]["job"] + "_0"
    subprocess.run(["scancel", number], check=True)
    thread.join(100)
    assert rows["b"]["status"] == "done"
    assert f"its job {number} was cancelled (scancel)" in rows["wait"]["error"]


@pytest.mark.parametrize("known", ["number", "name", "name, and nothing handed in"])
def test_jobs_of_a_killed_runner_are_taken_up(tmp_path, known):
    """Also one killed while sbatch did its work: it knows no number, and the job waits for its call."""
    out = tmp_path / "out"
    if known == "name, and nothing handed in":
        blocker = [
            "sbatch",
            "--cpus-per-task=2",
            "--output=/dev/null",
            "--parsable",
            "--wrap=sleep 100",
        ]
        block = subprocess.run(blocker, check=True, capture_output=True, text=True).stdout.strip()
        wait_for(lambda: state_of(block) == "RUNNING")
    start(toy_recipe("wait", "wait2"), out)
    batches = jobs_file(out)
    if known != "number":
        written = {"batches": [batches[0] | {"job": None}]}
        (out / "slurm" / "jobs.json").write_text(json.dumps(written))
    if known == "name, and nothing handed in":
        for path in (out / "slurm").glob("*_submitted.pkl"):
            path.unlink()
    with pytest.raises(ToolmemError, match=f"end them first: scancel {batches[0]['job']}$"):
        check_no_jobs(SweepFolder(out))
    thread, rows = in_background(toy_recipe("wait", "wait2", "new"), out)
    if known == "name, and nothing handed in":
        wait_for(lambda: len(list((out / "slurm").glob("*_submitted.pkl"))) == 3)
        subprocess.run(["scancel", block], check=True)
    for name in ("go", "go2"):
        (out / name).touch()
    thread.join(200)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert sorted(Counter(calls(out)).values()) == [1, 1, 1]
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 2


def test_what_waits_is_told_with_slurms_reason(tmp_path):
    executor = start(toy_recipe("wait", "wait2", "c"), tmp_path / "out", array_parallelism=1)
    wait_for(lambda: len(calls(tmp_path / "out")) == 1)
    executor.wait(0)
    assert executor.note() == "2 in the queue (JobArrayTaskLimit 2)"
    assert executor.places() == 1
    never = start(toy_recipe("b"), tmp_path / "never", cpus_per_task=64)
    never.wait(0)
    assert never.note() == "1 in the queue (PartitionConfig 1)"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"partition": "gpus"}, "invalid partition specified: gpus"),
        ({"constraint": "avx9"}, "Invalid feature specification"),
        ({"additional_parameters": {"frobnicate": 3}}, "unrecognized option '--frobnicate=3'"),
    ],
)
def test_what_is_refused_is_told_in_slurms_words(tmp_path, options, words):
    with pytest.raises(ToolmemError, match=words):
        sweep(toy_recipe("a"), tmp_path / "out", **options)
    assert jobs_file(tmp_path / "out") == []
