import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are told by Linux")
def test_the_quick_benchmark_writes_every_figure(tmp_path):
    file = tmp_path / "real.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/real_models.py", "--quick", "--json", str(file)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(file.read_text())
    assert 0.3 < figures["train_speedup_over_transformers"] < 10  # noise of a busy machine
    assert 0.3 < figures["train_text_speedup_over_transformers"] < 10
    assert 0.1 < figures["train_memory_over_transformers"] < 1  # two layers: little but logits
    assert 0.1 < figures["train_memory_checkpointed"] <= 1.05
    assert figures["dialogues_share_with_loss"] == pytest.approx(0.4, abs=0.02)
    assert set(figures["dialogues_float32"]["tokens_per_s"]) == {
        "toolmem", "transformers", "toolmem_checkpointed",
    }  # fmt: skip
