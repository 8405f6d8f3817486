"""The fine-tuning recipes, on a tiny model with a chat template in the place of SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from chat_templates import chat_tokenizer

import toolmem
from toolmem import checkpoints
from toolmem.cli import main
from toolmem.cli.sweep_plan import check, model_sizes
from toolmem.models import Transformer
from toolmem.sweeps import SweepRecipe, expand

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"
RECIPES = ("finetune_in_weight", "finetune_in_tool")
CUT = [
    "--data.people", "6", "--data.unseen_people", "3", "--data.batch_size", "4",
    "--data.n_val_questions", "4", "--recall.n_questions", "2", "--recall.n_unseen", "2",
    "--recall.show", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1",
    "--trainer.enable_progress_bar", "false", "--trainer.val_check_interval", "2",
    "--trainer.log_every_n_steps", "1", "--checkpointing.every_n_steps", "2",
    "--recall.every_n_steps", "2", "--trainer.max_steps", "4",
]  # fmt: skip


@pytest.fixture
def base(tmp_path, monkeypatch):
    """smollm2.ckpt in the folder that everything runs in."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tokenizer = chat_tokenizer()
    model = Transformer(tokenizer.vocab_size, 24, 2, 3, 1, hidden_dim=48, tie_embeddings=True)
    about = checkpoints.describe(model, {"tokenizer": tokenizer.spec(), "setting": None})
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    whole = {"state_dict": state, "global_step": 0, checkpoints.KEY: about}
    checkpoints.write(whole, Path("smollm2.ckpt"))
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_goes_on(recipe, base, capsys):
    words = ["fit", "--config", str(FOLDER / f"{recipe}.yaml"), *CUT]
    stop = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1"]
    assert main([*words, *stop]) == 0, capsys.readouterr().err
    assert main([*words, "--resume", "auto"]) == 0, capsys.readouterr().err
    run = toolmem.load(Path("runs", recipe), device="cpu")
    assert run.checkpoint.step == 4
    assert run.model.init_args == base.init_args
    assert run.tokenizer.chat["system"] == "" and run.tokenizer.turns is not None
    assert not torch.equal(run.model.embedding.weight, base.embedding.weight)
    assert [role for role, _ in run.ask("When was Ann born?").dialogue][:2] == ["user", "assistant"]
    config = yaml.safe_load(Path("runs", recipe, "config.yaml").read_text())
    assert config["model"]["model"]["init_args"]["dim"] == 24
    assert config["data"]["init_args"]["tokenizer"] == "smollm2.ckpt"
    Path("smollm2.ckpt").unlink()  # the run needs it no more
    assert toolmem.load(Path("runs", recipe)).checkpoint.step == 4


def test_weights_start_as_they_were(base, capsys):
    """With hardly a learning rate they end so; parts of the model may be chosen otherwise."""
    words = ["fit", "--config", str(FOLDER / "finetune_in_tool.yaml"), *CUT, "--name", "still"]
    words += ["--model.optimizer.lr", "1e-12", "--model.model.init_args.dropout", "0.1"]
    assert main(words) == 0, capsys.readouterr().err
    model = toolmem.load("runs/still").model
    assert model.init_args == {**base.init_args, "dropout": 0.1}
    for name, value in base.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-9), name


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_the_model_nothing_is_left(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("fit", "inspect"):
        assert main([command, "--config", str(FOLDER / f"{recipe}.yaml")]) == 2
        message = capsys.readouterr().err
        assert "model.init_from" in message and "smollm2.ckpt" in message
        assert "Traceback" not in message
    assert not Path("runs").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_can_be_looked_at(recipe, base, capsys):
    assert main(["inspect", "--config", str(FOLDER / f"{recipe}.yaml")]) == 0, (
        capsys.readouterr().err
    )
    n = sum(parameter.numel() for parameter in base.parameters())
    assert f"{n:,}" in capsys.readouterr().out


def test_the_sweep_is_one_that_fit_takes(base):
    sweep = SweepRecipe.read(FOLDER / "sweeps" / "finetune_laptop.yaml")
    runs = expand(sweep)
    assert len(runs) == 2 * 2 * 2
    check(sweep)
    n = sum(parameter.numel() for parameter in base.parameters())
    assert all(size >= n for size in model_sizes(runs).values())
