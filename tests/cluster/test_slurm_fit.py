"""`toolmem fit` as a job of a real Slurm, by recipes/slurm.sbatch: asked to end in the midst of training, it
goes on, and comes to the very end of a run that nobody asked.
"""

from __future__ import annotations

import copy
import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

from slurm_waits import end_all_jobs, hurry, wait_for
from sweep_toys import BASE, write_sweep

from toolmem import checkpoints
from toolmem.sweeps.slurm_queue import jobs_of_user

# On a busy machine a run of seconds takes minutes.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SCRIPT = Path(__file__).parent.parent.parent / "recipes" / "slurm.sbatch"
STEPS = {1: 1000, 2: 300}  # by processes
CLOCK = ("time/", "throughput/", "memory/")


@pytest.fixture(autouse=True)
def _cluster(real_slurm, monkeypatch):
    for name, value in real_slurm.items():
        monkeypatch.setenv(name, value)
    yield
    end_all_jobs()


def words_of(folder: Path, processes: int) -> list[str]:
    """Options of a run of some seconds, whose regular checkpoints come late."""
    base = copy.deepcopy(BASE)
    steps = STEPS[processes]
    base["trainer"] |= {"max_steps": steps, "val_check_interval": steps // 2}
    base["checkpointing"]["every_n_steps"] = steps // 2
    if processes > 1:
        base["trainer"] |= {"devices": processes, "strategy": "ddp"}
    recipe = write_sweep(folder / "recipe.yaml", base)
    return ["--config", str(recipe), "--runs", str(folder)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody disturbs, by processes."""
    runs: dict[int, Path] = {}

    def run(processes: int) -> Path:
        if processes not in runs:
            folder = tmp_path_factory.mktemp(f"whole_{processes}")
            fit = [sys.executable, "-m", "toolmem", "fit", *words_of(folder, processes)]
            subprocess.run([*fit, "--name", "whole"], check=True, timeout=1100)
            runs[processes] = folder / "whole"
        return runs[processes]

    return run


def submit(
    folder: Path, *options: str, processes: int = 1, name: str = "run", more: tuple[str, ...] = ()
) -> str:
    """Slurm's number of a job."""
    sbatch = ["sbatch", "--parsable", f"--job-name={name}", f"--output={folder}/%x.log", *options]
    sbatch += [f"--ntasks-per-node={processes}", str(SCRIPT), *words_of(folder, processes), *more]
    return subprocess.run(sbatch, check=True, capture_output=True, text=True).stdout.strip()


def logged(run: Path) -> list[int]:
    try:
        with open(run / "metrics.csv", newline="") as stream:
            return [int(row["step"]) for row in csv.DictReader(stream) if row["step"]]
    except (FileNotFoundError, ValueError):  # a line that is being written
        return []


def timeless(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as stream:
        return [
            {key: value for key, value in row.items() if not key.startswith(CLOCK)}
            for row in csv.DictReader(stream)
        ]


def all_ended() -> bool:
    hurry()
    return all(job.ended for job in jobs_of_user().values())


@pytest.mark.parametrize(
    ("asked", "processes"), [("requeue", 1), ("preempt", 1), ("signal", 1), ("requeue", 2)]
)
def test_a_job_that_is_asked_to_end_comes_to_the_same_end(asked, processes, whole, tmp_path):
    number = submit(tmp_path, processes=processes)
    run = tmp_path / "run"
    wait_for(lambda: len(logged(run)) > 40 or all_ended())
    if asked == "requeue":
        subprocess.run(["scontrol", "requeue", number], check=True)
    elif asked == "preempt":
        urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=2", "--output=/dev/null"]
        subprocess.run([*urgent, "--wrap=sleep 1"], check=True, stdout=subprocess.DEVNULL)
    else:  # what Slurm sends ahead of the time limit, by --signal
        subprocess.run(["scancel", "--signal=USR1", number], check=True)
    log = tmp_path / "run.log"
    name = "SIGUSR1" if asked == "signal" else "SIGTERM"
    wait_for(lambda: f"ended by {name} after step" in log.read_text())
    assert logged(run)[-1] < STEPS[processes] // 2  # before any regular checkpoint
    # for a moment a job that requeues itself looks as if it had ended
    wait_for(lambda: hurry() and logged(run)[-1:] == [STEPS[processes]], 1000)
    wait_for(all_ended)

    assert log.read_text().count("ended by") == 1
    assert timeless(run) == timeless(whole(processes))
    mine, other = (
        checkpoints.read(one / "checkpoints" / "last.ckpt")["state_dict"]
        for one in (run, whole(processes))
    )
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)


def test_an_array_is_a_run_for_each_seed(whole, tmp_path):
    submit(tmp_path, "--array=0-1", name="seed")
    runs = [tmp_path / f"seed_{index}" for index in (0, 1)]
    wait_for(lambda: all(run.is_dir() for run in runs))
    wait_for(all_ended)
    first, second = (timeless(run) for run in runs)
    assert first == timeless(whole(1))  # whose seed is 0
    assert [row["step"] for row in first] == [row["step"] for row in second]
    assert first != second


def test_a_run_that_fails_is_not_requeued(tmp_path):
    number = submit(tmp_path, more=("--trainer.max_stepz", "3"))
    wait_for(all_ended)
    shown = subprocess.run(
        ["scontrol", "show", "job", number], capture_output=True, text=True, check=True
    ).stdout
    assert "JobState=FAILED" in shown and "ExitCode=2:0" in shown and "Restarts=0" in shown
    assert "max_stepz" in (tmp_path / "run.log").read_text()
