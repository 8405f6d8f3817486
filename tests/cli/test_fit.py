"""``toolmem fit``: a run's folder, going on after a kill, loggers, and the other three commands."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from cli_toys import TINY, changed, write_config

from toolmem import checkpoints
from toolmem.data.factbase import Factbase

CLOCK = ("throughput/",)  # what depends on the machine


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def timeless(run: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows(run)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return checkpoints.read(run / "checkpoints" / "last.ckpt")["state_dict"]


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_what_a_run_leaves(setting, runs):
    run = runs / setting
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "metrics.csv", "checkpoints", "samples", "evaluations", "environment.json",
        "facts.duckdb",
    }  # fmt: skip
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}

    table = rows(run)
    assert [row["step"] for row in table] == ["2", "3", "4", "6"]
    assert {
        "step", "train/loss", "train/tokens", "throughput/tokens_per_s", "val/loss",
        "recall/exact_match", "recall/unseen/exact_match",
    } <= table[0].keys()  # fmt: skip
    assert [bool(row["val/loss"]) for row in table] == [False, True, False, True]
    assert 4 < float(table[0]["train/loss"]) < 7  # ln 260 = 5.6
    assert 0 < int(table[0]["train/tokens"]) < int(table[-1]["train/tokens"])

    sample = json.loads((run / "samples" / "step_6.jsonl").read_text().splitlines()[0])
    assert sample["turns"][0]["role"] == "user"
    assert sample["expected"]

    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert not any("HOME" in key or "TOKEN" in key for key in environment)

    with Factbase.open(run / "facts.duckdb") as facts:
        assert len(facts.population()) == 12


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_a_checkpoint_rebuilds_its_model_alone(setting, name, runs, tmp_path):
    copy = shutil.copy(runs / setting / "checkpoints" / name, tmp_path / "alone.ckpt")
    loaded = checkpoints.load(copy)
    assert loaded.step == 6
    assert loaded.data["setting"] == setting
    assert loaded.data["factbase"]["people"] == 12
    assert loaded.tokenizer.vocab_size == loaded.model.vocab_size == 260
    with Factbase.open(runs / setting / "facts.duckdb") as facts:
        assert loaded.data["factbase"]["fingerprint"] == facts.fingerprint
    assert loaded.model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 260)


def test_the_config_reruns_as_it_is(runs, tmp_path, toolmem):
    config = runs / "in_weight" / "config.yaml"
    words = ["--config", config, "--runs", tmp_path, "--name", "again"]
    assert toolmem("fit", *words).code == 0
    assert same(weights(tmp_path / "again"), weights(runs / "in_weight"))
    assert timeless(tmp_path / "again") == timeless(runs / "in_weight")
    first = yaml.safe_load(config.read_text())
    second = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert second == first | {"name": "again", "runs": str(tmp_path)}


def test_the_name_is_the_recipe_s_when_there_is_none(tmp_path, toolmem):
    recipe = write_config(tmp_path / "thing.yaml", TINY)
    assert (
        toolmem("fit", "--config", recipe, "--runs", tmp_path, "--trainer.max_steps", 1).code == 0
    )
    assert (tmp_path / "thing" / "checkpoints" / "last.ckpt").is_file()


class Killed(BaseException):
    """As abrupt as it gets within a process."""


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_a_killed_run_goes_on_to_the_same_end(setting, tmp_path, runs, toolmem, monkeypatch):
    config = changed(data__init_args__setting=setting, checkpointing__every_n_steps=2)
    recipe = write_config(tmp_path / "recipe.yaml", config)
    words = ["fit", "--config", recipe, "--runs", tmp_path, "--name", "run", "--resume", "auto"]

    def kill(callback: pl.Callback, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 5:  # one step after a checkpoint, and one logged row
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("toolmem.training.Throughput.on_train_batch_end", kill)
        with pytest.raises(Killed):
            toolmem(*words)
    assert checkpoints.load(tmp_path / "run").step == 4
    assert toolmem(*words).code == 0
    assert same(weights(tmp_path / "run"), weights(runs / setting))
    expected = timeless(runs / setting)
    assert timeless(tmp_path / "run") == expected
    # a run that has ended goes nowhere, and says nothing wrong
    assert toolmem(*words).code == 0
    assert same(weights(tmp_path / "run"), weights(runs / setting))
    assert timeless(tmp_path / "run") == expected


def test_wandb_offline(tmp_path, toolmem, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    words = ["fit", "--config", recipe, "--runs", tmp_path, "--name", "run", "--logger", "wandb"]
    assert toolmem(*words, "--trainer.max_steps", 2).code == 0
    [offline] = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))
    about = checkpoints.read(tmp_path / "run" / "checkpoints" / "last.ckpt")["toolmem"]
    assert offline.name.endswith(about["loggers"]["WandbLogger"])
    assert rows(tmp_path / "run")  # the local file is there all the same


def test_tensorboard(tmp_path, toolmem):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    words = ["fit", "--config", recipe, "--runs", tmp_path, "--name", "run"]
    assert toolmem(*words, "--logger", "tensorboard", "--trainer.max_steps", 4).code == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    expected = {
        int(r["step"]): float(r["train/loss"]) for r in rows(tmp_path / "run") if r["train/loss"]
    }
    assert logged == pytest.approx(expected)


@pytest.mark.parametrize(("command", "metric"), [("validate", "val/loss"), ("test", "test/loss")])
def test_validate_and_test(command, metric, runs, toolmem):
    run = runs / "in_tool"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    called = toolmem(command, "--config", run / "config.yaml", "--ckpt_path", run)
    assert called.code == 0
    assert metric in called.out
    [value] = re.findall(r"\d+\.\d+", called.out)
    assert float(value) == pytest.approx(float(rows(run)[-1]["val/loss"]))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_predict(runs, toolmem):
    from toolmem.cli.fit import run

    folder = runs / "in_weight"
    words = ["predict", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder)]
    assert toolmem(*words).code == 0
    predictions = run("predict", words).trainer.predict_loop.predictions
    loss = sum(batch["loss"].sum() for batch in predictions)
    count = sum(batch["count"].sum() for batch in predictions)
    assert float(loss / count) == pytest.approx(float(rows(folder)[-1]["val/loss"]), rel=1e-5)


def test_print_config(tmp_path, toolmem):
    recipe = write_config(tmp_path / "recipe.yaml", TINY)
    called = toolmem("fit", "--config", recipe, "--data.alpha", "0.5", "--print_config")
    assert called.code == 0
    config = yaml.safe_load(called.out)
    assert config["data"]["init_args"]["alpha"] == 0.5
    assert config["model"]["model"]["init_args"]["dim"] == 8
    assert list(tmp_path.iterdir()) == [recipe]


def test_progress_can_be_turned_off(tmp_path, toolmem):
    recipe = write_config(tmp_path / "recipe.yaml", TINY)  # it is off there
    words = ["fit", "--config", recipe, "--runs", tmp_path, "--name", "run"]
    called = toolmem(*words, "--trainer.max_steps", 1, "--recall.every_n_steps", 0)
    assert (called.code, called.out, called.err) == (0, "", "")


def test_the_study_s_options_go_together(tmp_path, toolmem):
    """Both query languages, layouts and masks, long dialogues: each trains."""
    for index, options in enumerate(
        (
            ["--data.setting", "in_tool", "--data.query", "sql", "--data.layout", "packed"],
            ["--data.setting", "in_tool", "--data.templates", "in_tool_long", "--data.mask", "all"],
            ["--data.templates", "biographies/in_weight", "--data.held_out", "0.2"],
        )
    ):
        recipe = write_config(tmp_path / "recipe.yaml", TINY)
        words = ["fit", "--config", recipe, "--runs", tmp_path, "--name", f"run{index}"]
        options += ["--trainer.max_steps", "2", "--model.model.max_seq_len", "512"]
        called = toolmem(*words, *options)
        assert called.code == 0, called.err


def test_exposures_say_how_long_a_run_is(toolmem, tmp_path):
    """12 people have 48 facts, seen once in 6 steps of 8."""
    config = changed(exposures=2, trainer__max_steps=-1, trainer__log_every_n_steps=1)
    config["recall"]["every_n_steps"] = 0
    recipe = write_config(tmp_path / "a.yaml", config)
    called = toolmem("fit", "--config", recipe, "--runs", tmp_path)
    assert called.code == 0, called.err
    logged = rows(tmp_path / "a")
    assert logged[-1]["step"] == "12"
    assert float(logged[-1]["train/learning_rate"]) < float(logged[1]["train/learning_rate"])
    rerun = toolmem(
        "fit", "--config", tmp_path / "a" / "config.yaml", "--runs", tmp_path, "--name", "b"
    )
    assert rerun.code == 0, rerun.err
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    both = toolmem(
        "fit", "--config", recipe, "--runs", tmp_path, "--name", "c", "--trainer.max_steps", 5
    )
    assert both.code == 2
    assert "exposures is 2 and trainer.max_steps is 5: both say how long to train" in both.err
    assert not (tmp_path / "c").exists()
