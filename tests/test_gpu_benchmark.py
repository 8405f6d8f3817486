"""``benchmarks/gpu.py`` without a GPU: it says so, and its checks' logic holds on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


def run(*words) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)],
        capture_output=True, text=True, timeout=240, env=environment,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path):
    done = run("--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert "no CUDA device here: nothing was checked" in done.stdout
    assert json.loads((tmp_path / "found.json").read_text())["checks"] == {}


@pytest.mark.slow
def test_its_checks_hold_on_a_cpu(tmp_path):
    names = [
        "architectures", "attention kernels", "precision", "checkpointing", "memory plan", "engine",
    ]  # fmt: skip
    done = run("--quick", "--device", "cpu", "--json", tmp_path / "found.json", "--only", *names)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(names, "ok")
    assert 0 < found["architectures"]["largest_difference"] < 1e-4


@pytest.mark.slow
def test_a_check_that_fails_is_told_and_the_others_go_on(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "import gpu\n"
        "def wrong(self): gpu.expect(False, 'it is wrong')\n"
        "def dies(self): raise RuntimeError('no kernel image')\n"
        "gpu.Checks.architectures, gpu.Checks.kernels = wrong, dies\n"
        "sys.exit(gpu.main())\n"
    )
    words = ["--quick", "--device", "cpu", "--json", str(tmp_path / "found.json"), "--only"]
    words += ["architectures", "attention kernels", "checkpointing"]
    done = subprocess.run(
        [sys.executable, broken, *words], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    found = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [one["status"] for one in found.values()] == ["FAILED", "FAILED", "ok"]
    assert "it is wrong" in done.stdout and "no kernel image" in done.stderr
