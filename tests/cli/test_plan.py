"""``toolmem plan``: a table to read, figures to use, and what is refused."""

import json
from pathlib import Path

import pytest

RECIPES = Path(__file__).parent.parent.parent / "recipes"
SMALL = ("--model.model.n_layers", 2, "--data.train_tokenizer", 512)


def test_what_fits_on_eight_devices(toolmem, tmp_path):
    out = tmp_path / "plan.json"
    words = ("--config", RECIPES / "smollm.yaml", "--devices", 8, "--json", out)
    called = toolmem("plan", *words, "--precision", "16-mixed")
    assert called.code == 0, called.err
    found = json.loads(out.read_text())
    assert found["parameters"] == 134_515_008  # SmolLM2-135M's
    rows = {(row["layout"], row["checkpointing"]): row for row in found["layouts"]}
    assert set(rows) == {
        (layout, mode)
        for layout in ("DDP 8", "FSDP2 8")
        for mode in ("none", "selective", "blocks")
    }
    plain, again = rows["DDP 8", "none"], rows["DDP 8", "blocks"]
    assert plain["parameters"] == 4 * 134_515_008
    assert plain["fits"] and plain["most_rows"] >= 64  # eight rows each
    assert again["activations"] < plain["activations"] / 5
    assert rows["FSDP2 8", "none"]["optimizer"] * 8 == plain["optimizer"]
    assert "n_heads, 9" in found["refused"]["2"]
    assert "no TP 2, 4, 8: tensor_parallel_size 2 does not divide n_heads, 9" in called.out
    assert "fits: DDP 8, checkpointing none" in called.out


def test_tensor_parallelism_where_heads_allow_it(toolmem, tmp_path):
    out = tmp_path / "plan.json"
    words = ("--config", RECIPES / "smollm.yaml", "--devices", 3, "--json", out, *SMALL)
    assert toolmem("plan", *words, "--data.batch_size", 2).code == 0
    assert "TP 3" in {row["layout"] for row in json.loads(out.read_text())["layouts"]}


def test_rows_of_facts_are_measured(toolmem, tmp_path):
    out = tmp_path / "plan.json"
    called = toolmem("plan", "--config", RECIPES / "facts_in_tool.yaml", "--json", out)
    assert called.code == 0, called.err
    assert "32 rows of" in called.out and "1 device" in called.out
    (row, *_) = json.loads(out.read_text())["layouts"]
    assert row["sent"] == 0 and row["fits"]


def test_what_fits_nowhere_is_said(toolmem):
    words = ("--config", RECIPES / "smollm.yaml", *SMALL)
    called = toolmem("plan", *words, "--memory", "1GB")
    assert "nothing fits so; 1 device with checkpointing blocks fits with" in called.out
    called = toolmem("plan", *words, "--memory", "10MB", "--devices", 2)
    assert "nothing fits on 2 x 10MB" in called.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--memory", "much"), "say it as 32GB or 80GiB"),
        (("--devices", 0), "devices is 0: it must be 1 or more"),
        (("--precision", "8-true"), "choose 32-true, 16-mixed or bf16-mixed"),
        (("--seq_len", 4096), "at most the model's max_seq_len 2048"),
        (("--rows", 0), "rows must be 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(toolmem, words, message):
    called = toolmem("plan", "--config", RECIPES / "smollm.yaml", *SMALL, *words)
    assert called.code == 2
    assert message in called.err.replace("\n", " ")
