"""Every recipe parses, and trains for a few steps on a cut-down budget."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from toolmem import checkpoints
from toolmem.cli import main

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes"
# (those that leave their model to a pretrained one: test_finetune_recipes.py)
RECIPES = sorted(p.stem for p in FOLDER.glob("*.yaml") if not p.stem.startswith("finetune_"))
SHORT = [
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
TINY = [
    "--model.model.dim", "16", "--model.model.n_layers", "1", "--model.model.hidden_dim", "32", *SHORT,
]  # fmt: skip
FACTS = [
    "--data.people", "20", "--data.unseen_people", "4", "--data.n_val_questions", "8",
    "--data.batch_size", "4", "--recall.n_questions", "2", "--recall.n_unseen", "2",
    "--recall.show", "false",
]  # fmt: skip
TEXT = ["--data.batch_size", "2", "--data.seq_len", "32", "--data.num_workers", "0"]
SMOLLM = [
    *TEXT, "--model.model.n_heads", "4", "--model.model.n_kv_heads", "2",
    "--data.train_tokenizer", "300", "--data.val_fraction", "0.2", "--trainer.accumulate_grad_batches", "1",
]  # fmt: skip
# Heads on the model of another recipe, cut down: that is trained first.
HEADS = {"medusa": "facts_in_tool", "eagle": "facts_in_tool"}
# Recipes that go on from the weights of a run of their own architecture: (its recipe, its name).
AFTER = {"rl_in_tool": ("facts_in_tool", "half")}
TEXT_RECIPES = ["shakespeare", "smollm", "smollm_debug"]
CUT = {
    "facts_in_weight": FACTS,
    "facts_in_tool": FACTS,
    "facts_in_weight_mamba2": FACTS,
    "facts_in_tool_mamba2": FACTS,
    **{
        f"facts_in_{setting}_{name}": [*FACTS, "--model.model.n_layers", layers]
        for name, layers in (("moe", "1"), ("mingru", "1"), ("griffin", "3"))
        for setting in ("weight", "tool")
    },
    "facts_in_tool_jamba": [*FACTS, "--model.model.n_layers", "4"],
    "mad": ["--data.batch_size", "2", "--data.seq_len", "16", "--data.val_batches", "1"],
    "shakespeare": [*TEXT, "--trainer.precision", "32-true"],
    "medusa": ["--model.model.n_heads", "2"],
    "eagle": ["--model.model.depth", "2"],
    "population": [],  # small as it is; its members' options are lists
    "rl_in_tool": [*FACTS, "--model.samples", "2", "--model.max_new_tokens", "8"],
    "smollm": SMOLLM,
    "smollm_debug": [*SMOLLM, "--model.model.n_heads", "4"],
}


def prose(n: int, seed: int) -> str:
    """Words that repeat, so that a tokenizer has pairs to merge."""
    words = ["the", "play", "is", "thing", "wherein", "conscience", "of", "king", "shall", "catch"]
    choose = random.Random(seed)
    return " ".join(choose.choice(words) for _ in range(n))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("data")
    text = folder / "play.txt"
    text.write_text(prose(4000, 0))
    shards = folder / "shards"
    shards.mkdir()
    for shard in range(2):
        rows = [prose(60, shard * 100 + row) for row in range(60)]
        pq.write_table(pa.table({"text": rows}), shards / f"{shard}.parquet")
    return {"shakespeare": text, "smollm": shards, "smollm_debug": shards}


def test_each_recipe_is_known_here():
    """A new recipe needs an entry in CUT, or it would go untested."""
    assert set(RECIPES) == set(CUT)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_parses_as_it_is(recipe, data, capsys):
    words = ["fit", "--config", str(FOLDER / f"{recipe}.yaml")]
    if recipe in data:
        words += ["--data.path", str(data[recipe])]
    assert main([*words, "--print_config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    assert config["trainer"]["max_steps"] == written["trainer"]["max_steps"] > 0
    for key, value in written["model"]["model"]["init_args"].items():
        assert config["model"]["model"]["init_args"][key] == value


def step_of(run: Path) -> int:
    """The step of a run's last checkpoint; of a population's first member's."""
    member = run / "members" / "0"
    return checkpoints.load(member if member.exists() else run).step


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_and_goes_on(recipe, data, tmp_path, capsys, monkeypatch):
    if recipe in data:
        monkeypatch.setenv("TOOLMEM_DATA", str(data[recipe]))
    words = ["fit", "--config", str(FOLDER / f"{recipe}.yaml"), "--runs", str(tmp_path)]
    if recipe in HEADS:
        words += [*FACTS, *SHORT]
        first = ["fit", "--config", str(FOLDER / f"{HEADS[recipe]}.yaml"), "--runs", str(tmp_path)]
        assert main([*first, *TINY, *FACTS, "--trainer.max_steps", "2"]) == 0, (
            capsys.readouterr().err
        )
        words += ["--model.init_from", str(tmp_path / HEADS[recipe])]
    else:
        words += TINY
    if recipe in AFTER:
        first, name = AFTER[recipe]
        before = ["fit", "--config", str(FOLDER / f"{first}.yaml"), "--runs", str(tmp_path)]
        before += [*TINY, *FACTS, "--name", name, "--trainer.max_steps", "2"]
        assert main(before) == 0, capsys.readouterr().err
        words += ["--model.init_from", str(tmp_path / name)]
    words += ["--trainer.max_steps", "4", *CUT[recipe], "--checkpointing.every_n_steps", "2"]
    stop = ["--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1"]
    assert main([*words, *stop]) == 0, capsys.readouterr().err
    assert step_of(tmp_path / recipe) == 2
    assert main([*words, "--resume", "auto"]) == 0, capsys.readouterr().err
    assert step_of(tmp_path / recipe) == 4
    assert (tmp_path / recipe / "metrics.csv").read_text().count("\n") >= 4
    if recipe in HEADS:  # the run's own config tells the base's architecture, and can be looked at
        written = tmp_path / recipe / "config.yaml"
        config = yaml.safe_load(written.read_text())
        assert config["model"]["model"]["init_args"]["base"]["init_args"]["dim"] == 16
        assert main(["inspect", "--config", str(written)]) == 0, capsys.readouterr().err


STARTS = HEADS | {recipe: name for recipe, (_, name) in AFTER.items()}


@pytest.mark.parametrize("recipe", STARTS)
def test_without_the_run_it_starts_from_nothing_is_left(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(FOLDER / f"{recipe}.yaml"), "--name", "x"]) == 2
    message = capsys.readouterr().err
    assert "model.init_from" in message and f"runs/{STARTS[recipe]}" in message
    assert not (tmp_path / "runs" / "x").exists()


def test_every_recipe_on_text_is_known_to_be_one():
    written = {name: yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in RECIPES}
    on_text = [
        n for n in RECIPES if written[n]["data"]["class_path"] == "toolmem.data.TextDataModule"
    ]
    assert on_text == TEXT_RECIPES


@pytest.mark.parametrize("recipe", TEXT_RECIPES)
def test_without_data_it_says_where_data_comes_from(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TOOLMEM_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", str(FOLDER / f"{recipe}.yaml"), "--name", "x"]) == 2
    message = capsys.readouterr().err
    assert "TOOLMEM_DATA" in message
    assert "huggingface" in message.lower()
    assert not (tmp_path / "runs" / "x").exists()
