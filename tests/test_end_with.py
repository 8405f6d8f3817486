"""Processes that end when the one that started them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

linux = pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks into /proc")

CHILD = (
    "import os, sys, time; from toolmem.processes import end_with; {before}; end_with({parent}); "
    "print(os.getpid(), flush=True); time.sleep(600)"
)
PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"

HANGS = """
import time
from toolmem.data.stream import IndexedBatches, make_loader

class Hangs(IndexedBatches):
    def batch_at(self, index):
        from torch.utils.data import get_worker_info
        import os
        print(os.getpid(), flush=True)
        while True:
            time.sleep(600)

next(iter(make_loader(Hangs(), num_workers=2)))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def kill_and_wait(process: subprocess.Popen, pids: list[int]) -> None:
    try:
        assert all(map(alive, pids))
        process.kill()
        process.wait()
        until = time.monotonic() + 10
        while any(map(alive, pids)):
            assert time.monotonic() < until, "it outlives the process that started it"
            time.sleep(0.02)
    finally:
        for pid in filter(alive, pids):
            os.kill(pid, signal.SIGKILL)


@linux
@pytest.mark.parametrize("before", ["pass", "sys.platform = 'another'"])  # the kernel, or a thread
def test_a_process_ends_with_its_parent(before):
    child = CHILD.format(before=before, parent="os.getppid()")
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=child)], stdout=subprocess.PIPE, text=True
    )
    kill_and_wait(process, [int(process.stdout.readline())])


def test_a_process_whose_parent_is_gone_already_ends():
    child = CHILD.format(before="pass", parent="os.getppid() + 1")
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, b"")


@linux
@pytest.mark.slow
def test_data_workers_that_hang_end_with_the_process_that_loads():
    process = subprocess.Popen([sys.executable, "-c", HANGS], stdout=subprocess.PIPE, text=True)
    kill_and_wait(process, [int(process.stdout.readline()) for _ in range(2)])
