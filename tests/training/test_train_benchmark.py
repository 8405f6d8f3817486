import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_quick_benchmark_writes_every_figure(tmp_path):
    file = tmp_path / "train.json"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "benchmarks/train.py", "--quick", "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.perf_counter() - began < 200  # 40 s on a machine that has nothing else to do
    figures = json.loads(file.read_text())
    assert figures["in_weight_speedup_over_naive"] > 2
    assert figures["in_tool_speedup_over_naive"] > 1
    assert figures["in_weight_fused_speedup"] > 1
    assert figures["in_tool_fused_speedup"] > 1
    assert -0.9 < figures["lightning_overhead"] < 2  # noise of a busy machine
    assert 0.2 < figures["matmul_share"] < 1.2
    assert figures["details"]["in_weight_dim_32"]["parameters"] == 49_568
    assert "in_tool_speedup_over_naive" in done.stdout
