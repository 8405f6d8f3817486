"""``toolmem plot circuits``: from a run's checkpoints to its page."""

from __future__ import annotations

import csv
import shutil

import pytest
from cli_toys import changed, write_config

from toolmem.checkpoints import kept
from toolmem.cli import main

KEEPING = {"data__init_args__setting": "in_tool", "checkpointing__keep_every_n_steps": 2}
DATA = {
    "people": 24,
    "setting": "in_tool",
    "batch_size": 8,
    "unseen_people": 4,
    "n_val_questions": 8,
}


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory):
    """A tiny run of six steps with three checkpoints."""
    folder = tmp_path_factory.mktemp("circuits")
    recipe = write_config(folder / "recipe.yaml", changed(**KEEPING, data__init_args=DATA))
    assert main(["fit", "--config", str(recipe), "--runs", str(folder), "--name", "tiny"]) == 0
    return folder / "tiny"


@pytest.mark.slow
def test_a_run_with_three_checkpoints(kept_run, tmp_path, toolmem):
    assert [path.name for path in kept(kept_run)] == [
        "step_2.ckpt",
        "step_4.ckpt",
        "step_6.ckpt",
        "last.ckpt",
    ]
    out = tmp_path / "new" / "page.html"
    called = toolmem("plot", "circuits", kept_run, "--dialogues", 4, "--out", out)
    assert called.code == 0 and "alone" not in called.err
    names = called.out.split()
    assert names[0] == str(out)
    for name in ("page_scores.png", "page_attention.png"):
        assert (out.parent / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out.parent / "page_scores.csv").open()))
    assert {row["step"] for row in rows} == {"2", "4", "6"}
    assert {row["head"] for row in rows} == {"0.0", "0.1"}
    assert (out.parent / "page_probe.csv").exists()  # 24 people are enough
    page = out.read_text(encoding="utf-8")
    assert "Circuits of tiny" in page and '"steps": [2, 4, 6]' in page
    assert "4 about" in page and "facts in_tool, templates in_tool" in page


def test_one_checkpoint_and_unseen_people(kept_run, toolmem, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(kept_run, run)
    for path in (run / "checkpoints").glob("step_*"):
        path.unlink()
    called = toolmem("plot", "circuits", run, "--dialogues", 2, "--split", "unseen")
    assert called.code == 0 and "keep_every_n_steps" in called.err
    assert (run / "circuits.html").exists()
    # too few people for a probe
    assert not (run / "circuits_probe.csv").exists()


def test_bad_input(kept_run, toolmem, tmp_path):
    def refused(*words):
        called = toolmem("plot", "circuits", *words)
        assert called.code == 2 and called.out == "" and "Traceback" not in called.err
        return called.err

    (tmp_path / "empty").mkdir()
    assert "no checkpoint" in refused(tmp_path / "empty")
    assert "no such checkpoint or run folder" in refused(tmp_path / "missing")
    assert "dialogues is 0" in refused(kept_run, "--dialogues", 0)
    assert "must end in .html" in refused(kept_run, "--out", tmp_path / "x.png")
    assert "no attention" in refused(without_attention(tmp_path, DATA), "--dialogues", 2)
    config = {"class_path": "toolmem.data.RecallDataModule", "init_args": {}}
    assert "not trained on facts" in refused(without_facts(tmp_path, config))


def without_attention(folder, data):
    """An untrained run of a Mamba."""
    model = {
        "class_path": "toolmem.models.Mamba",
        "init_args": {"dim": 8, "n_layers": 1, "max_seq_len": 256},
    }
    return trained(
        folder, "mamba", changed(model__model=model, data__init_args=data, trainer__max_steps=1)
    )


def without_facts(folder, data):
    """A run of synthetic recall."""
    config = changed(data=data, trainer__max_steps=1, trainer__val_check_interval=None)
    config["trainer"]["limit_val_batches"] = 0
    config.pop("recall")
    return trained(folder, "mqar", config)


def trained(folder, name, config):
    recipe = write_config(folder / f"{name}.yaml", config)
    words = ["fit", "--config", str(recipe), "--runs", str(folder), "--name", name]
    assert main(words) == 0
    return folder / name


def test_help(toolmem):
    assert "toolmem plot circuits runs/first" in toolmem("plot").out
    page = toolmem("plot", "circuits", "--help").out
    assert "--dialogues" in page and "keep_every_n_steps" in page
