"""The Slurm executor, without Slurm: what it submits, watches, takes up and gives up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import fake_slurm
import pytest
from slurm_toys import ToyJob, calls, jobs_file, toy_recipe

from toolmem.errors import ToolmemError
from toolmem.sweeps import slurm
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.plans import make_plan
from toolmem.sweeps.runner import SweepRunner
from toolmem.sweeps.slurm import SlurmExecutor, check_no_jobs
from toolmem.sweeps.slurm_options import SlurmOptions

pytest.importorskip("submitit")


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """The folder of a Slurm that is none; what runs there is ended with the test."""
    folder = tmp_path / "cluster"
    for name, value in fake_slurm.install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(slurm, "LOOK", 0.0)
    monkeypatch.setattr(slurm, "SETTLE", 0.05)
    monkeypatch.setattr("toolmem.sweeps.runner.LOOK", 0.05)
    yield folder
    fake_slurm.clear(folder)


def executor_of(recipe, out, **options):
    settled = SlurmOptions(**({"poll_s": 0.1} | options)).over(SlurmOptions())
    return SlurmExecutor(recipe, SweepFolder(out), settled, ToyJob)


def sweep(recipe, out, *, watch=lambda state: None, **options):
    """Run a sweep to its end; its rows by act, or by name where acts come up several times."""
    folder = SweepFolder(out)
    with folder.locked() as lock:
        runner = SweepRunner(recipe, make_plan(recipe), folder)
        runner.take_stock()
        executor = executor_of(recipe, out, **options)
        runner.run(executor, lock, watch)
    return {row["act"]: row for row in folder.results.rows()}


def arrays(cluster) -> list[str]:
    """The scripts that were submitted, in order."""
    paths = sorted(cluster.glob("*.sh"), key=lambda path: int(path.stem))
    return [path.read_text() for path in paths]


def test_what_is_wanted_at_once_is_one_array(cluster, tmp_path):
    out = tmp_path / "out"
    rows = sweep(
        toy_recipe("a", "b", "c"), out, partition="gpu", account="ours", mem_gb=1.5, timeout_min=90,
        cpus_per_task=2, gpus_per_node=1, array_parallelism=2, setup=["echo set up"],
        additional_parameters={"reservation": "mine"},
    )  # fmt: skip
    assert {act: row["status"] for act, row in rows.items()} == dict.fromkeys("abc", "done")
    assert sorted(Counter(calls(out)).values()) == [1, 1, 1]
    [script] = arrays(cluster)
    for words in (
        "--array=0-2%2", "--partition=gpu", "--account=ours", "--mem=1536MB", "--time=90", "--requeue",
        "--cpus-per-task=2", "--gpus-per-node=1", "--reservation=mine", "--signal=USR2@90",
    ):  # fmt: skip
        assert f"#SBATCH {words}\n" in script.replace("'", ""), words
    assert script.index("OMP_NUM_THREADS=2") < script.index("echo set up") < script.index("srun")
    assert jobs_file(out) == []
    sweep(toy_recipe("a", "b", "c"), out)
    assert len(arrays(cluster)) == 1


def test_a_job_that_dies_is_submitted_again_and_then_recorded(cluster, tmp_path):
    out = tmp_path / "out"
    rows = sweep(toy_recipe("die", "b"), out)
    assert rows["b"]["status"] == "done"
    assert rows["die"]["status"] == "failed"
    assert "its job ended 3 times without a result, the last as FAILED" in rows["die"]["error"]
    assert "srun" in rows["die"]["error"] or "the last words" in rows["die"]["error"]
    assert Counter(calls(out))[rows["die"]["name"]] == 3
    assert len(arrays(cluster)) == 3
    assert "_log.out and the run's log.txt" in rows["die"]["error"]


def in_background(recipe, out, **options):
    """A sweep in a thread, and where its rows will be."""
    found = {}
    thread = threading.Thread(
        target=lambda: found.update(sweep(recipe, out, **options)), daemon=True
    )
    thread.start()
    return thread, found


def wait_for(what, seconds=100):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "nothing came"
        time.sleep(0.02)
    return found


def cancel(cluster, number):
    """scancel, and wait until the process is no more."""
    subprocess.run(["scancel", number], check=True)
    path = cluster / "jobs" / f"{number}.json"
    wait_for(lambda: not json.loads(path.read_text()).get("pid"))


def test_a_cancelled_job_is_a_failed_run(cluster, tmp_path):
    out = tmp_path / "out"
    thread, rows = in_background(toy_recipe("wait", "b"), out)
    wait_for(lambda: len(calls(out)) == 2)
    cancel(cluster, "1_0")
    thread.join(100)
    assert rows["b"]["status"] == "done"
    assert (rows["wait"]["status"], len(calls(out))) == ("failed", 2)
    assert "its job 1_0 was cancelled (scancel)" in rows["wait"]["error"]
    assert rows["wait"]["val/loss"] == 2.0  # what it had logged


def test_out_of_time_is_said_so(cluster, tmp_path):
    (cluster / "limit").write_text("0.8")
    rows = sweep(toy_recipe("wait"), tmp_path / "out", timeout_min=7)
    assert rows["wait"]["status"] == "failed"
    assert rows["wait"]["error"].startswith("out of time: jobs of 7 minutes")
    assert "raise slurm.timeout_min" in rows["wait"]["error"]
    assert len(arrays(cluster)) == 3


@pytest.mark.parametrize("state", ["OUT_OF_MEMORY", "NODE_FAIL"])
def test_how_other_ends_are_told(cluster, tmp_path, state):
    out = tmp_path / "out"
    thread, rows = in_background(toy_recipe("wait"), out, mem_gb=2)
    wait_for(lambda: calls(out))
    fake_slurm.change(cluster / "jobs" / "1.json", state=state)
    if state == "NODE_FAIL":
        wait_for(lambda: len(calls(out)) == 2)
        (out / "go").touch()
    thread.join(100)
    if state == "NODE_FAIL":
        assert rows["wait"]["status"] == "done"
    else:
        assert "out of memory: job 1 had 2 GB: raise slurm.mem_gb" in rows["wait"]["error"]


# ---- a runner that was killed


def start(recipe, out, **options):
    """What a runner does that is killed after it has submitted."""
    folder = SweepFolder(out)
    executor = executor_of(recipe, out, **options)
    wanted = make_plan(recipe).wanted({})
    with folder.locked() as lock:
        executor.open(wanted, lock)
        executor.submit(wanted[: executor.free()])
    return executor


@pytest.mark.parametrize("written", ["its number", "its name alone"])
def test_jobs_of_a_killed_runner_are_taken_up(cluster, tmp_path, written):
    out = tmp_path / "out"
    executor = start(toy_recipe("wait", "b"), out)
    assert "2 of them go on as jobs of Slurm" in executor.left()
    assert executor.left().endswith("scancel 1")
    path = out / "slurm" / "jobs.json"
    if written == "its name alone":
        batches = jobs_file(out)
        assert batches[0]["job"] == "1"
        path.write_text(json.dumps({"batches": [batches[0] | {"job": None}]}))
    thread, rows = in_background(toy_recipe("wait", "b", "new"), out)
    wait_for(lambda: len(arrays(cluster)) == 2)  # the new one alone
    (out / "go").touch()
    thread.join(100)
    assert {act: row["status"] for act, row in rows.items()} == {
        "wait": "done", "b": "done", "new": "done",
    }  # fmt: skip
    assert sorted(Counter(calls(out)).values()) == [1, 1, 1]
    assert "--array" not in arrays(cluster)[1]
    assert jobs_file(out) == []


def test_a_batch_that_was_never_submitted_is(cluster, tmp_path):
    out = tmp_path / "out"
    recipe = toy_recipe("a")
    [job] = make_plan(recipe).wanted({})
    (out / "slurm").mkdir(parents=True)
    batch = {"name": "toy-nobody", "runs": {job.run.name: None}, "job": None}
    (out / "slurm" / "jobs.json").write_text(json.dumps({"batches": [batch]}))
    assert sweep(recipe, out)["a"]["status"] == "done"
    assert len(arrays(cluster)) == 1


def test_what_ended_while_nobody_looked_goes_on(cluster, tmp_path):
    """A cancelled job, too: the command that is given again asks for its run."""
    out = tmp_path / "out"
    start(toy_recipe("wait"), out)
    wait_for(lambda: calls(out))
    cancel(cluster, "1")
    (out / "go").touch()
    assert sweep(toy_recipe("wait"), out)["wait"]["status"] == "done"
    assert len(arrays(cluster)) == 2


def test_a_jobs_file_that_is_none(cluster, tmp_path):
    path = tmp_path / "out" / "slurm" / "jobs.json"
    path.parent.mkdir(parents=True)
    path.write_text("[]")
    with pytest.raises(ToolmemError, match=r"jobs\.json does not tell which jobs were submitted"):
        sweep(toy_recipe("a"), tmp_path / "out")


def test_local_workers_leave_runs_of_jobs_alone(cluster, tmp_path, monkeypatch):
    out = tmp_path / "out"
    check_no_jobs(SweepFolder(out))
    start(toy_recipe("wait"), out)
    with pytest.raises(ToolmemError, match=r"go on with --executor slurm, .*: scancel 1$"):
        check_no_jobs(SweepFolder(out))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("PATH", str(tmp_path))
        with pytest.raises(ToolmemError, match=r"there is no squeue here.*remove .*jobs.json"):
            check_no_jobs(SweepFolder(out))
    cancel(cluster, "1")
    check_no_jobs(SweepFolder(out))


# ---- a Slurm that refuses, errs, forgets


def test_a_refusal_is_told_in_slurms_words(cluster, tmp_path):
    (cluster / "refuse").write_text("sbatch: error: invalid partition specified: gpus")
    with pytest.raises(
        ToolmemError, match=r"(?s)invalid partition specified: gpus.*slurm\.partition"
    ):
        sweep(toy_recipe("a"), tmp_path / "out", partition="gpus")
    assert jobs_file(tmp_path / "out") == []
    (cluster / "refuse").unlink()
    assert sweep(toy_recipe("a"), tmp_path / "out")["a"]["status"] == "done"


def test_a_refusal_while_others_go_on_is_tried_again(cluster, tmp_path):
    out, notes = tmp_path / "out", []
    recipe = toy_recipe("wait", "wait2", "c")
    thread, rows = in_background(recipe, out, max_jobs=2, watch=lambda s: notes.append(s.note))
    wait_for(lambda: len(calls(out)) == 2)
    (cluster / "refuse").write_text("sbatch: error: AssocMaxSubmitJobLimit")
    (out / "go").touch()
    wait_for(lambda: any("AssocMaxSubmitJobLimit" in note for note in notes))
    (cluster / "refuse").unlink()
    wait_for(lambda: len(calls(out)) == 3)
    (out / "go2").touch()
    thread.join(100)
    assert {row["status"] for row in rows.values()} == {"done"}
    assert sorted(Counter(calls(out)).values()) == [1, 1, 1]


def test_a_job_that_sbatch_has_lost_is_found(cluster, tmp_path):
    """It times out, and the job is in the queue all the same."""
    (cluster / "lost").touch()
    assert sweep(toy_recipe("a"), tmp_path / "out")["a"]["status"] == "done"
    assert len(arrays(cluster)) == len(calls(tmp_path / "out")) == 1


def test_a_slurm_that_does_not_answer_loses_nothing(cluster, tmp_path):
    out, notes = tmp_path / "out", []
    thread, rows = in_background(
        toy_recipe("wait"), out, watch=lambda state: notes.append(state.note)
    )
    wait_for(lambda: calls(out))
    (cluster / "silent").touch()
    wait_for(lambda: any("Slurm does not answer: slurm_load_jobs error" in n for n in notes))
    (out / "go").touch()
    thread.join(100)
    assert rows["wait"]["status"] == "done"
    assert len(calls(out)) == 1


@pytest.mark.parametrize("accounting", [True, False])
def test_a_job_that_squeue_has_forgotten(cluster, tmp_path, accounting):
    out = tmp_path / "out"
    (cluster / "forgetful").touch()
    if accounting:
        (cluster / "accounting").touch()
    thread, rows = in_background(toy_recipe("wait"), out)
    wait_for(lambda: calls(out))
    cancel(cluster, "1")
    if not accounting:
        wait_for(lambda: len(calls(out)) == 2)
    (out / "go").touch()
    thread.join(100)
    assert rows["wait"]["status"] == ("failed" if accounting else "done")


def test_jobs_that_never_begin_stop_the_sweep(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "REFUSALS", 3)
    with pytest.raises(
        ToolmemError, match=r"(?s)end before they train, the last as FAILED.*No module"
    ):
        sweep(toy_recipe("stillborn", seeds=3), tmp_path / "out")


def test_no_more_jobs_than_allowed(cluster, tmp_path):
    executor = start(toy_recipe("wait", "b", "c"), tmp_path / "out", max_jobs=2)
    assert (executor.free(), len(executor.busy())) == (0, 2)
    wait_for(lambda: len(executor.wait(0.05)) == 1)
    assert executor.free() == 1
    assert "wait" in next(iter(executor.busy()))


def test_the_queue_is_told(cluster, tmp_path):
    (cluster / "hold").touch()
    executor = start(toy_recipe("a", "b"), tmp_path / "out")
    assert executor.note() == "2 in the queue (submitted 2)"
    executor.wait(0)
    assert executor.note() == "2 in the queue (Resources 2)"
    assert executor.running() == {}


# ---- what must be there


def test_without_slurm_or_submitit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolmemError, match="there is no sbatch here: run this on a machine that"):
        executor_of(toy_recipe("a"), tmp_path / "out")
    for name, value in fake_slurm.install(tmp_path / "cluster").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ToolmemError, match=r'pip install "toolmem\[cluster\]"'):
        executor_of(toy_recipe("a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_of_the_command_go_before_those_of_the_recipe():
    recipe = SlurmOptions.parse({"timeout_min": 240, "mem_gb": 8, "setup": ["module load x"]})
    settled = SlurmOptions(timeout_min=10, partition="p").over(recipe)
    assert (settled.timeout_min, settled.mem_gb, settled.partition) == (10, 8, "p")
    assert (settled.cpus_per_task, settled.max_num_timeout, settled.setup) == (
        1,
        3,
        ["module load x"],
    )
    assert toy_recipe("a", slurm={"qos": "long"}).slurm.qos == "long"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ({"partitoin": "x"}, "slurm.partitoin: a sweep has no such key"),
        ({"timeout_min": "4:00:00"}, "slurm.timeout_min is '4:00:00': it must be a whole number"),
        ({"cpus_per_task": 0}, "slurm.cpus_per_task is 0: it must be a whole number, at least 1"),
        ({"setup": "module load"}, "slurm.setup is 'module load': it must be a list of commands"),
        ({"partition": 3}, "slurm.partition is 3: it must be a word"),
        ({"ahead": 1}, "slurm.ahead is 1: it must be true or false"),
    ],
)
def test_options_that_cannot_be(written, message):
    with pytest.raises(ToolmemError, match=message):
        toy_recipe("a", slurm=written)


def test_numbers_too_small_on_the_command_line():
    for options in (SlurmOptions(timeout_min=0), SlurmOptions(mem_gb=0.0), SlurmOptions(poll_s=-1)):
        [name] = options.given()
        with pytest.raises(ToolmemError, match=f"slurm.{name} is "):
            options.over(SlurmOptions())
