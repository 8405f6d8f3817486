"""No command imports what a config, a recipe of a sweep or a checkpoint names, unless it was allowed."""

from __future__ import annotations

import sys

import pytest
import yaml
from cli_toys import changed, write_config

import toolmem as library
from toolmem import checkpoints

MODULE = """
import pathlib
from lightning.pytorch import Callback
from toolmem.models import Transformer
pathlib.Path(__file__).with_suffix(".ran").touch()

class Model(Transformer): ...
class Watch(Callback): ...
def hook(*words): ...
"""
HARM = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "harm"]}}
OWN = {"class_path": "stranger.Model", "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2}}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("stranger", None)


def untouched(folder):
    return not (folder / "stranger.ran").exists() and not (folder / "harm").exists()


def hook(path):
    return [{"class_path": "LambdaCallback", "init_args": {"on_fit_start": path}}]


ATTACKS = {
    "model": {"model__model": OWN},
    "module": {"module": "stranger.Model"},
    "callback": {"trainer__callbacks": [{"class_path": "stranger.Watch"}]},
    "function": {"trainer__callbacks": hook("stranger.hook")},
    "system": {"trainer__callbacks": hook("os.system")},
    "torch.os.system": {"trainer__callbacks": hook("torch.os.system")},
    "profiler": {"trainer__profiler": HARM},
    "optimizer": {"model__optimizer": HARM},
    "data": {"data": HARM},
    "any": {"model__model__init_args__base": HARM},
    "mixer": {
        "model__model": {
            "class_path": "toolmem.models.Hybrid",
            "init_args": {
                "dim": 8,
                "n_layers": 1,
                "pattern": ["m"],
                "mixers": {"m": {"class_path": "subprocess.Popen", "args": ["touch", "harm"]}},
            },
        }
    },
    "base": {"model__model": {"class_path": "toolmem.models.Medusa", "init_args": {"base": HARM}}},
    "member": {
        "data": {
            "class_path": "toolmem.data.PopulationDataModule",
            "init_args": {"data": HARM, "members": [{}]},
        }
    },
    "tool": {"data__init_args__tools": [{"class_path": "stranger.Tool"}, HARM]},
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_config_imports_nothing(attack, stranger, toolmem):
    config = write_config(stranger / "bad.yaml", changed(**ATTACKS[attack]))
    called = toolmem("fit", "--config", config, "--name", "run")
    assert called.code == 2 and called.err.startswith("toolmem fit: ")
    assert "Traceback" not in called.err
    if attack != "any":  # there it is an option that the model does not have
        assert "is not imported: a config or a checkpoint may name" in called.err
        assert "--allow_packages " in called.err
    toolmem("inspect", "--config", config)  # what it needs not it does not look at
    assert untouched(stranger) and not (stranger / "runs" / "run" / "config.yaml").exists()


def test_the_command_line_imports_nothing_either(stranger, toolmem):
    config = write_config(stranger / "good.yaml", changed())
    for words in (["--model.model", "stranger.Model"], ["--module", "stranger.Model"]):
        called = toolmem("fit", "--config", config, *words)
        assert called.code == 2 and "stranger.Model is not imported" in called.err
    assert untouched(stranger)


def test_a_config_cannot_allow_itself(stranger, toolmem):
    config = write_config(
        stranger / "bad.yaml", changed(model__model=OWN, allow_packages="stranger")
    )
    assert toolmem("fit", "--config", config).code == 2
    assert untouched(stranger)


def test_allowed_everywhere_until_the_next_command(stranger, toolmem):
    config = write_config(
        stranger / "own.yaml", changed(model__model=OWN, trainer__callbacks=hook("stranger.hook"))
    )
    allow = ["--allow_packages", "none_such,stranger"]
    called = toolmem("fit", "--config", config, "--name", "own", *allow)
    assert called.code == 0, called.err
    run = stranger / "runs" / "own"
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert kept["model"]["model"]["class_path"] == "stranger.Model" and "allow_packages" not in kept
    sys.modules.pop("stranger")
    (stranger / "stranger.ran").unlink()
    for words in (
        ["generate", "--checkpoint", run, "--prompt", "hi", "--max_new_tokens", "2"],
        ["evaluate", "--checkpoint", run, "--n_questions", "2"],
        ["validate", "--config", run / "config.yaml", "--ckpt_path", run],
        ["inspect", "--config", run / "config.yaml"],
    ):
        called = toolmem(*words)
        assert called.code == 2 and "is not imported" in called.err, (words, called)
        assert untouched(stranger), words
    # a program that has not imported it is asked to; one that has needs no word
    with pytest.raises(library.ToolmemError, match=r"in Python: import it, or toolmem\.allow_pack"):
        library.load(run)
    assert untouched(stranger)
    assert toolmem("evaluate", "--checkpoint", run, "--n_questions", "2", *allow).code == 0
    assert type(library.load(run).model).__name__ == "Model"


def test_a_checkpoints_base_is_not_called(runs, stranger):
    checkpoint = checkpoints.read(runs / "in_weight" / "checkpoints" / "last.ckpt")
    about = checkpoint["toolmem"]["model"]
    about["init_args"] = {"base": HARM, "vocab_size": 260}
    about["class_path"] = "toolmem.models.Medusa"
    checkpoints.write(checkpoint, stranger / "bad.ckpt")
    with pytest.raises(library.ToolmemError, match=r"subprocess\.Popen is not a toolmem\.models"):
        library.load(stranger / "bad.ckpt")
    assert untouched(stranger)


@pytest.mark.parametrize(
    "words", [["--allow_packages"], ["--allow_packages="], ["--allow_packages=a.b"]]
)
def test_wrong_words(words, toolmem):
    called = toolmem("inspect", "--config", "recipes/facts_in_tool.yaml", *words)
    assert called.code == 2 and "--allow_packages" in called.err


@pytest.mark.slow
def test_the_workers_of_a_sweep_are_told(stranger, toolmem):
    recipe = write_config(stranger / "toy.yaml", changed(model__model=OWN))
    sweep = {
        "base": str(recipe),
        "report": None,
        "axes": {"lr": {"key": "model.optimizer.lr", "values": [1e-3]}},
        "seeds": [0],
    }
    path = write_config(stranger / "sweep.yaml", sweep)
    called = toolmem("sweep", path, "--out", "out", "--workers", "1")
    assert called.code == 2 and "stranger.Model is not imported" in called.err
    assert untouched(stranger)
    called = toolmem(
        "sweep", path, "--out", "out", "--workers", "1", "--allow_packages", "stranger"
    )
    assert called.code == 0, called.err
    results = [yaml.safe_load(file.read_text()) for file in stranger.glob("out/runs/*/result.json")]
    assert [row["status"] for row in results] == ["done"], results
