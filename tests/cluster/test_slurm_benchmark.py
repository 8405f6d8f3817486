"""``benchmarks/slurm_sweep.py``: figures where there is a Slurm, a word where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "slurm_sweep.py"


def test_without_a_slurm_it_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "there is no sbatch here" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_measures(real_slurm, tmp_path):
    words = [sys.executable, str(SCRIPT), "--quick", "--json", str(tmp_path / "f.json")]
    subprocess.run(words, env=os.environ | real_slurm, check=True, capture_output=True)
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["sweep_scaling"] > 0 and figures["jobs_slowdown"] > 0
