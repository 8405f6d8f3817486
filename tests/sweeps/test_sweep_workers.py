"""Workers: which cores are whose."""

from __future__ import annotations

import os

import pytest

from toolmem.cli.sweep_worker import explain, fit_config
from toolmem.sweeps.workers import share_cores


@pytest.mark.parametrize(
    ("cores", "workers", "shares"),
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([2, 5], 3, [[2], [5], [2]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1], [2, 3, 4]]),
    ],
)
def test_cores_are_shared_out(monkeypatch, cores, workers, shares):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores), raising=False)
    assert share_cores(workers) == shares


def test_out_of_memory_is_said_so():
    torchs = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
    for failure in (MemoryError(), RuntimeError(torchs), RuntimeError("CUDA out of memory. Tried")):
        told = explain(failure)
        assert told.startswith("out of memory: make the model or the batch smaller, or take fewer")
        assert type(failure).__name__ in told
    assert explain(KeyError("x")) == "KeyError: 'x'"


def test_a_run_that_is_judged_before_its_end_stops_there():
    job = {"name": "a", "runs": "runs", "recipe": {"trainer": {"max_steps": 9}}}
    paths = [one["class_path"] for one in fit_config(job)["trainer"]["callbacks"]]
    assert paths == ["toolmem.training.Flops"]
    last = fit_config(job | {"until": 4})["trainer"]["callbacks"][-1]
    assert (last["class_path"].rpartition(".")[2], last["init_args"]) == ("StopAt", {"step": 4})
    assert "callbacks" not in job["recipe"]["trainer"]
