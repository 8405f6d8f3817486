"""What a job of Slurm calls: one run, once, however often the job is started."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

from sweep_toys import row

from toolmem.cli import sweep_worker
from toolmem.cli.sweep_job import SweepJob
from toolmem.files import write_json
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.slurm_options import SlurmOptions
from toolmem.training.callbacks.preemption import SIGNALS, Preempted

pytest.importorskip("submitit", reason="the extra cluster is not installed: no executor to test")
OPTIONS = SlurmOptions(timeout_min=7).over(SlurmOptions())


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job whose training is noted alone, and the folder of its sweep."""
    before = [signal.getsignal(one) for one in SIGNALS]
    words = {
        "name": "a", "settings": {"width": 4}, "seed": 0, "recipe": {}, "metrics": {"val/loss": "last"},
        "runs": str(tmp_path / "runs"),
    }  # fmt: skip
    monkeypatch.setenv("SLURM_NTASKS", "1")
    made = SweepJob(words, OPTIONS)
    made.trained, made.raises = [], None

    def train(words, threads):
        made.trained.append((words, threads, os.environ.get("SLURM_NTASKS")))
        if made.raises is not None:
            raise Preempted(made.raises)

    monkeypatch.setattr(sweep_worker, "train", train)
    yield made
    for one, handler in zip(SIGNALS, before, strict=True):
        signal.signal(one, handler)


def test_it_trains_by_the_code_of_the_workers(job):
    job()
    [(words, threads, tasks)] = job.trained
    assert words == job.words | {"preemptible": True}
    assert (threads, tasks) == (1, None)  # Lightning is not to take the job for one of several
    [callback] = [
        one for one in sweep_worker.fit_config(words)["trainer"]["callbacks"]
        if "Preemption" in one["class_path"]
    ]  # fmt: skip
    assert callback == {"class_path": "toolmem.training.callbacks.Preemption"}


@pytest.mark.parametrize(("until", "again"), [(None, False), (2, False), (4, True)])
def test_what_is_trained_already_is_not_again(job, tmp_path, until, again):
    done = row("a", {"width": 4}, steps=2, stopped="halving" if until else None)
    write_json(tmp_path / "runs" / "a" / "result.json", done)
    if until:
        job.words["until"] = until
    job()
    assert bool(job.trained) == again


def test_asked_by_submitits_signal_it_has_itself_requeued(job):
    requeued = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: requeued.append(signum))
    job.raises = signal.SIGUSR2
    job()
    assert requeued == [signal.SIGUSR2]


def test_asked_by_slurm_it_ends(job, tmp_path):
    requeued = []
    signal.signal(signal.SIGUSR2, lambda signum, frame: requeued.append(signum))
    job.raises = signal.SIGTERM
    with pytest.raises(SystemExit) as ended:
        job()
    assert (ended.value.code, requeued) == (143, [])
    assert SweepFolder(tmp_path).result("a") is None


def test_too_often_out_of_time_it_is_a_failed_run(job, tmp_path):
    from submitit.core.utils import UncompletedJobError

    def no_more(signum, frame):
        raise UncompletedJobError("timed-out too many times")

    signal.signal(signal.SIGUSR2, no_more)
    job.raises = signal.SIGUSR2
    job()
    result = SweepFolder(tmp_path).result("a")
    assert result["status"] == "failed"
    assert result["error"].startswith("out of time: jobs of 7 minutes, 3 times requeued")


def test_it_is_what_submitit_takes_up_again(job):
    plain = SweepJob(job.words, OPTIONS)
    again = pickle.loads(pickle.dumps(plain.checkpoint())).function
    assert (again.words, again.options) == (plain.words, plain.options)
