"""Workers: which cores are whose."""

from __future__ import annotations

import os

import pytest

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
