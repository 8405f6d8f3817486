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

    def run(*words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *launcher, "-m", "toolmem", *words],
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


SHARDED = (
    "--trainer.devices=2",
    "--trainer.strategy=ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
    "--trainer.strategy.save_distributed_checkpoint=true",
)


def test_folders_of_shards_by_the_command_line(toolmem, tmp_path):
    fit = ("fit", "--config", "base.yaml")
    for name, words in {"one": (), "two": SHARDED}.items():
        done = toolmem(*fit, "--name", name, "--checkpointing.every_n_steps=3", *words)
        assert done.returncode == 0, done.stderr[-3000:]
    runs = tmp_path / "runs"
    folder = runs / "two" / "checkpoints" / "last.ckpt"
    assert folder.is_dir()
    done = toolmem("convert", str(runs / "two"), "two.ckpt")
    assert done.returncode == 0, done.stderr[-3000:]
    weights, whole = (
        checkpoints.read(path)["state_dict"]
        for path in (tmp_path / "two.ckpt", runs / "one" / "checkpoints" / "last.ckpt")
    )
    torch.testing.assert_close(weights, whole, atol=1e-5, rtol=0)
    for name, words in {"one": (), "two": SHARDED}.items():
        done = toolmem(*fit, "--name", name, *words, "--resume=auto", "--trainer.max_steps=8")
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (figures(runs / name)["8", "train/loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, abs=1e-5)


def test_every_rank_has_the_packages_that_were_allowed(toolmem, tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(
        "import os, pathlib\n"
        "from lightning.pytorch import Callback\n"
        "class Watch(Callback):\n"
        "    def on_train_end(self, trainer, module):\n"
        "        pathlib.Path(f'rank_{trainer.global_rank}').touch()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ("fit", "--config", "base.yaml", "--trainer.devices=2", "--trainer.strategy=ddp")
    watch = ("--trainer.callbacks=stranger.Watch",)
    done = toolmem(*words, *watch)
    assert done.returncode == 2
    assert "--allow_packages stranger" in done.stderr
    done = toolmem(*words, *watch, "--allow_packages", "stranger")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "rank_0").exists() and (tmp_path / "rank_1").exists()


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def test_ranks_that_torchrun_starts_are_those_that_lightning_starts(toolmem, tmp_path):
    fit = ("fit", "--config", "base.yaml", "--trainer.strategy=ddp", "--trainer.devices=2")
    done = toolmem(*fit, "--name", "own")
    assert done.returncode == 0, done.stderr[-3000:]
    done = toolmem(*fit, "--name", "torchrun", launcher=TORCHRUN)
    assert done.returncode == 0, done.stderr[-3000:]
    own, run = (tmp_path / "runs" / name for name in ("own", "torchrun"))
    assert figures(run) == figures(own)
    weights, expected = (
        checkpoints.read(one / "checkpoints" / "last.ckpt")["state_dict"] for one in (run, own)
    )
    torch.testing.assert_close(weights, expected, atol=0, rtol=0)
    done = toolmem(
        *fit, "--name=torchrun", "--resume=auto", "--trainer.max_steps=8", launcher=TORCHRUN
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert ("8", "train/loss") in figures(run)
    # what all are refused is told in a line
    done = toolmem(*fit, "--name=torchrun", launcher=TORCHRUN)
    assert "go on with it by --resume auto" in done.stderr


def test_heads_that_cannot_be_shared_are_refused_in_one_line(toolmem, tmp_path):
    done = toolmem("fit", "--config", "base.yaml", *SPLIT, "--model.model.init_args.n_heads=1")
    assert done.returncode == 2
    assert "tensor_parallel_size 2 does not divide n_heads, 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())
