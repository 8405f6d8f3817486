"""``toolmem fit`` in two processes, by the command line, as a user starts it."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from cli_toys import changed, write_config

from toolmem import checkpoints

# On a busy machine processes wait for each other long.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SPLIT = (
    "--trainer.devices=2",
    "--trainer.strategy=ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=1",
    "--trainer.strategy.tensor_parallel_size=2",
    "--trainer.strategy.save_distributed_checkpoint=false",
)


@pytest.fixture
def toolmem(tmp_path):
    config = changed(
        model__model__init_args__n_layers=2,
        trainer__gradient_clip_val=0.5,
        norms={"every_n_steps": 6, "rows": 4},
    )
    write_config(tmp_path / "base.yaml", config)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "toolmem", *words],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


def figures(folder):
    """Every figure that depends on no clock, by step and name."""
    with open(folder / "metrics.csv", newline="") as stream:
        return {
            (row["step"], name): float(value)
            for row in csv.DictReader(stream)
            for name, value in row.items()
            if name != "step" and value and not name.startswith("throughput/")
        }


def test_two_processes_by_the_command_line_are_one(toolmem, tmp_path):
    fit = ("fit", "--config", "base.yaml")
    for name, words in {"one": (), "two": SPLIT}.items():
        done = toolmem(*fit, "--name", name, *words)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (tmp_path / "runs" / name for name in ("one", "two"))
    alone, split = figures(one), figures(two)
    assert split.keys() == alone.keys()
    for key, value in alone.items():
        assert split[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    file = two / "checkpoints" / "last.ckpt"
    weights, whole = (
        checkpoints.read(run / "checkpoints" / "last.ckpt")["state_dict"] for run in (two, one)
    )
    torch.testing.assert_close(weights, whole, atol=1e-5, rtol=0)
    done = toolmem(
        "generate", "--checkpoint", str(file), "--prompt", "Who?", "--max_new_tokens", "4"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # and one process goes on from it
    done = toolmem(*fit, "--name", "two", "--resume", "auto", "--trainer.max_steps", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("8", "train/loss") in figures(two)


def test_heads_that_cannot_be_shared_are_refused_in_one_line(toolmem, tmp_path):
    done = toolmem("fit", "--config", "base.yaml", *SPLIT, "--model.model.init_args.n_heads=1")
    assert done.returncode == 2
    assert "tensor_parallel_size 2 does not divide n_heads, 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
