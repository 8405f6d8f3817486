import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two cores")
def test_the_quick_benchmark_writes_every_figure(tmp_path):
    file = tmp_path / "ddp.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/ddp.py", "--quick", "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert 0.3 < figures["ddp_scaling"] < 3  # noise of a busy machine
    assert 0.3 < figures["machine_scaling"] < 3
    assert figures["ddp_efficiency"] > 0.2
    assert 2.9e6 < figures["details"]["parameters"] < 3.2e6
    assert set(figures["details"]["tokens_per_s"]) == {"one", "apart", "ddp"}
