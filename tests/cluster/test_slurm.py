"""Sweeps of real training on Slurm: on a real one of one node where it is installed, and on one that is none.

The real one is set up by ``slurm.sh``, in a temporary folder, as root; without Debian's packages slurmctld,
slurmd, slurm-client and munge its tests are skipped.
"""

from __future__ import annotations

import copy
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

import fake_slurm
from sweep_toys import BASE, sweep_with, write_sweep

from toolmem.sweeps import Results, SweepRecipe, expand
from toolmem.sweeps.slurm_queue import jobs_of_user

pytest.importorskip("submitit")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="signals and flock of Linux"),
]
SCRIPT = Path(__file__).parent / "slurm.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
STEPS = 600


@pytest.fixture(scope="module")
def real_slurm():
    """The environment of a Slurm of one node."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here: a real Slurm (apt-get install slurmctld slurmd munge)"
        )
    if os.getuid() != 0:
        pytest.skip("a real Slurm: only root can start slurmd")
    folder = Path(tempfile.mkdtemp(prefix="toolmem-slurm-"))
    try:
        folder.chmod(0o755)  # munged is another user
        subprocess.run([SCRIPT, "start", folder], check=True, timeout=120)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)
        shutil.rmtree(folder)


@pytest.fixture(params=["real", "fake"])
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
        subprocess.run(["scancel", "--user=root"], check=True)
        wait_for(lambda: all(job.ended for job in jobs_of_user().values()))
    else:
        fake_slurm.clear(folder)


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


def wait_for(what, seconds=300):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.1)
    return found


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
    words = ["fit", "--config", written, "--runs", folder, "--name", "alone"]
    subprocess.run(
        [sys.executable, "-m", "toolmem", *map(str, words)], check=True, capture_output=True
    )
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


def test_a_grid_is_what_local_workers_make_of_it(slurm, start, tmp_path):
    recipe = write_sweep(tmp_path / "toy.yaml", sweep_with(report=None))
    sweep = start(recipe, tmp_path / "out")
    output = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, output
    assert "4 done, 0 failed, 0 to go" in " ".join(output.split())
    words = ["sweep", str(recipe), "--out", str(tmp_path / "local"), "--workers", "1"]
    subprocess.run([sys.executable, "-m", "toolmem", *words], check=True, capture_output=True)
    rows, local = rows_of(tmp_path / "out"), rows_of(tmp_path / "local")
    assert set(rows) == set(local)
    for name, row in rows.items():
        assert row["val/loss"] == pytest.approx(local[name]["val/loss"], rel=1e-6)
        for column in ("status", "steps", "tokens", "flops", "params_total", "recipe", "settings"):
            assert row[column] == local[name][column], column
        assert row["threads"] == 1
    assert len(list((tmp_path / "out" / "slurm").glob("*_submission.sh"))) == 1


def test_a_search_decides_by_results_what_is_submitted_next(slurm, start, tmp_path):
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
    sweep = start(recipe, out)
    output = sweep.communicate(timeout=900)[0]
    assert sweep.returncode == 0, output
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


@pytest.mark.parametrize("asked", ["requeued", "preempted"])
def test_a_job_that_is_requeued_goes_on_where_it_was(slurm, start, tmp_path, asked):
    if asked == "preempted" and slurm == "fake":
        pytest.skip("who preempts whom is Slurm's own affair")
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 40 or sweep.poll() is not None)
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
        for job in [number] if asked == "requeued" else [number, number_of("long", 1)]:
            update = ["scontrol", "update", f"JobId={job}", "StartTime=now"]
            wait_for(
                lambda update=update: subprocess.run(update, capture_output=True).returncode == 0
            )
    output = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, output
    assert "2 done, 0 failed, 0 to go" in " ".join(output.split())
    check_done_once(out, names)
    assert seconds_before(out, names[0]) > 0  # the checkpoint was taken up
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 1
    loss = alone(recipe, names[0], tmp_path)
    assert rows_of(out)[names[0]]["val/loss"] == pytest.approx(loss, rel=1e-6)


def test_a_killed_runner_finds_its_jobs_again(slurm, start, tmp_path):
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 20)
    os.kill(sweep.pid, signal.SIGKILL)
    sweep.wait()
    assert not rows_of(out)
    words = ["sweep", str(recipe), "--out", str(out), "--workers", "1"]
    local = subprocess.run(
        [sys.executable, "-m", "toolmem", *words], capture_output=True, text=True
    )
    ended = all(job.ended for job in jobs_of_user().values())
    if not ended:  # else it is quicker than this test, and local workers find all done
        assert local.returncode == 2
        assert "go on with --executor slurm, or end them first: scancel" in local.stderr
    sweep = start(recipe, out)
    output = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, output
    check_done_once(out, names)
    assert len(list((out / "slurm").glob("*_submission.sh"))) == 1
    assert [seconds_before(out, name) for name in names] == [0, 0]


def test_a_cancelled_job_stops_no_other_and_ctrl_c_leaves_them(slurm, start, tmp_path):
    (recipe, names), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out)
    wait_for(lambda: len(logged(out, names[0])) > 10)
    number = number_of("long", 0)
    subprocess.run(["scancel", number], check=True)
    output = sweep.communicate(timeout=600)[0]
    assert sweep.returncode == 0, output
    assert "1 of 2 runs failed" in output
    rows = rows_of(out)
    assert f"its job {number} was cancelled (scancel)" in rows[names[0]]["error"]
    assert rows[names[0]]["steps"] > 10
    assert rows[names[1]]["status"] == "done"
    sweep = start(recipe, out, "--retry-failed", "true")
    wait_for(lambda: len(logged(out, names[0])) > 10)
    sweep.send_signal(signal.SIGINT)
    output = sweep.communicate(timeout=60)[0]
    assert sweep.returncode == 130, output
    assert "1 runs are left: the same command goes on with them" in output
    assert "1 of them go on as jobs of Slurm; to end these too: scancel " in output
    wait_for(lambda: (out / "runs" / names[0] / "result.json").exists())
    sweep = start(recipe, out)
    assert sweep.wait(timeout=300) == 0
    check_done_once(out, names)


def test_a_run_that_is_out_of_time_says_so(slurm, start, tmp_path):
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
    sweep = start(recipe, out, *words)
    output = sweep.communicate(timeout=300)[0]
    assert sweep.returncode == 2, output
    [row] = rows_of(out).values()
    assert row["error"].startswith("out of time: jobs of 1 minutes, 0 times requeued")
    assert "every run failed, the first so: out of time" in " ".join(output.split())


def test_a_refused_partition_is_told_in_slurms_words(slurm, start, tmp_path):
    if slurm == "fake":
        pytest.skip("tests/sweeps/test_slurm_executor.py has it")
    (recipe, _), out = long_sweep(tmp_path / "long.yaml"), tmp_path / "out"
    sweep = start(recipe, out, "--slurm.partition", "gpus")
    output = sweep.communicate(timeout=100)[0]
    assert sweep.returncode == 2, output
    assert "invalid partition specified: gpus" in output
    assert "Traceback" not in output
