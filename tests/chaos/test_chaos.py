"""A few kills by ``run.py``, whose head says what is compared; docs/reliability.md has the whole."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run as chaos_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks into /proc"),
]


@pytest.mark.parametrize(("case", "kills"), [("facts_in_tool", 3), ("ddp", 2)])
def test_a_run_that_is_killed_is_the_run_that_was_not(case, kills, tmp_path):
    result = chaos_run.chaos(case, kills, seed=1, steps=150 * kills, folder=tmp_path)
    assert result["bit_identical"], result
    assert (result["rows_lost"], result["rows_twice"], result["orphans"]) == (0, 0, 0)
    assert result["rows"] == 15 * kills
    assert sum(result["victims"].values()) == kills


def test_the_comparison_sees_what_differs(tmp_path):
    """A bit of a weight, a row lost, one twice, one changed, a file."""
    import torch

    from toolmem import checkpoints

    def write(name, weight, steps, sample):
        run = tmp_path / name
        for folder in ("checkpoints", "samples"):
            (run / folder).mkdir(parents=True)
        state = {"state_dict": {"w": torch.tensor([weight])}, "global_step": 30}
        others = {"optimizer_states": [], "lr_schedulers": []}
        checkpoints.write(state | others, run / "checkpoints" / "last.ckpt")
        lines = [f"{step},{loss},{step * 7}" for step, loss in steps]
        head = "step,train/loss,throughput/tokens_per_s"
        (run / "metrics.csv").write_text("\n".join([head, *lines]) + "\n")
        (run / "samples" / "step_30.jsonl").write_text(sample)
        return run

    steps = [(10, 0.5), (20, 0.25), (30, 0.125)]
    whole = write("whole", 1.0, steps, "a")
    same = chaos_run.compare(whole, write("same", 1.0, steps, "a"))
    assert same["differing"] == same["files_differing"] == []
    found = [(10, 0.5), (10, 0.5), (30, 0.126), (40, 0.1)]
    other = chaos_run.compare(whole, write("other", 1.0 + 2**-23, found, "b"))
    assert other["differing"] == ["state_dict"]
    names = ("rows_lost", "rows_twice", "rows_changed", "rows_added")
    assert [other[name] for name in names] == [1, 1, 1, 1]
    assert other["files_differing"] == ["samples/step_30.jsonl"]
