"""Each trick, laid over the plain recipe, changes what it says and nothing else, and trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from toolmem import checkpoints
from toolmem.cli import main

FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "tricks"
TRICKS = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "plain")
CUT = [
    "--model.model.dim", "32", "--model.model.n_layers", "2", "--data.people", "20",
    "--data.unseen_people", "4", "--data.n_val_questions", "8", "--data.batch_size", "4",
    "--recall.every_n_steps", "0", "--trainer.max_steps", "2", "--trainer.accelerator", "cpu",
    "--trainer.devices", "1", "--trainer.enable_progress_bar", "false",
    "--trainer.val_check_interval", "2", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
# What a trick's run logs beside the plain one's, where it logs something.
LOGGED = {
    "z_loss": {"train/z_loss"},
    "multi_token": {"multi_token/loss", "multi_token/loss_2"},
    "multi_token_parallel": {"multi_token/loss", "multi_token/loss_2"},
}


def leaves(tree, prefix=""):
    """Dotted name -> value of everything in a config; lists whole."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def config(capsys, *names):
    words = ["fit"]
    for name in names:
        words += ["--config", str(FOLDER / f"{name}.yaml")]
    assert main([*words, "--print_config"]) == 0
    return leaves(yaml.safe_load(capsys.readouterr().out))


@pytest.fixture(scope="module")
def plain():
    return {}


def plain_config(plain, capsys):
    if not plain:
        plain |= config(capsys, "plain")
    return plain


def test_every_trick_is_in_the_docs():
    page = (FOLDER.parents[1] / "docs" / "tricks.md").read_text()
    missing = [name for name in TRICKS if f"`{name}`" not in page]
    assert not missing


@pytest.mark.parametrize("trick", TRICKS)
def test_it_changes_what_it_says_and_nothing_else(trick, plain, capsys):
    before = plain_config(plain, capsys)
    after = config(capsys, "plain", trick)
    written = leaves(yaml.safe_load((FOLDER / f"{trick}.yaml").read_text()))
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    assert changed, "the plain recipe has it already"
    swapped = {key.rpartition(".")[0] for key in written if key.endswith("class_path")}
    for key, value in written.items():
        if not isinstance(value, list) or not any(isinstance(item, dict) for item in value):
            assert after[key] == value
    for key in changed - written.keys():
        # the options of another class come with it
        assert any(key.startswith(f"{owner}.init_args") for owner in swapped) or key == (
            "trainer.callbacks"
        ), key


@pytest.mark.slow
@pytest.mark.parametrize("trick", TRICKS)
def test_it_trains_two_steps(trick, tmp_path, capsys):
    words = [
        "fit",
        "--config",
        str(FOLDER / "plain.yaml"),
        "--config",
        str(FOLDER / f"{trick}.yaml"),
    ]
    assert main([*words, "--runs", str(tmp_path), *CUT]) == 0, capsys.readouterr().err
    loaded = checkpoints.load(tmp_path / trick)
    assert loaded.step == 2
    columns = (tmp_path / trick / "metrics.csv").read_text().splitlines()[0].split(",")
    assert LOGGED.get(trick, set()) <= set(columns)
    assert any("z_loss" in name or "multi_token" in name for name in columns) == (trick in LOGGED)
