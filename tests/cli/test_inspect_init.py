"""``toolmem inspect init``: activations' sizes by layer and width, as figures and as a picture."""

from __future__ import annotations

import json
import math

import pytest
import torch
from cli_toys import changed, write_config

from toolmem.cli.inspect_init import usual_widths, widened
from toolmem.data.tokenizers import make_tokenizer
from toolmem.models import Hybrid, Mamba2, MoETransformer, Transformer

MODEL = "model__model__init_args__"
MUP = ("--model.model.initialization", "mup", "--model.model.mup_base_dim", "8")


@pytest.fixture
def looked(toolmem, tmp_path):
    """The command's figures and what it prints."""

    def call(*words, **changes):
        recipe = write_config(tmp_path / "r.yaml", changed(**changes))
        out = tmp_path / "init.svg"
        found = toolmem(
            "inspect",
            "init",
            "--config",
            recipe,
            "--out",
            out,
            "--json",
            tmp_path / "f.json",
            *words,
        )
        assert found.code == 0, found
        return json.loads((tmp_path / "f.json").read_text()), found.out, out.read_text()

    return call


def test_figures_are_the_models_own(looked):
    """Against the plain model: root mean squares, its embedding's 1 and its norm's; powers of widths."""
    found, shown, picture = looked("--widths", "[8,16,32,64]")
    assert found["widths"] == [8, 16, 32, 64]
    names = ["embedding", "blocks.0.mixer", "blocks.0.feed_forward", "blocks.0", "norm", "logits"]
    assert list(found["start"]) == names and not found["change"]
    torch.manual_seed(0)
    model = Transformer(make_tokenizer("byte").vocab_size, 16, 1, 2, max_seq_len=256).eval()
    tokens = torch.randint(model.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    assert found["parameters"][1] == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for name, values in (
            ("embedding", model.embedding(tokens)),
            ("norm", model.hidden(tokens)),
            ("logits", model(tokens)),
        ):
            wanted = float(values.square().mean().sqrt())
            assert found["start"][name][1] == pytest.approx(wanted, rel=1e-5)
    logs = [math.log(value) for value in found["start"]["logits"]]
    slope = sum(c * y for c, y in zip((-1.5, -0.5, 0.5, 1.5), logs, strict=True)) / (
        5 * math.log(2)
    )
    assert found["start_slopes"]["logits"] == pytest.approx(slope)
    assert "blocks.0.mixer" in shown and "init.svg" in shown
    for text in ("scaled", "root mean square at the start", "blocks.mixer", ">64<"):
        assert text in picture or f"<!-- {text.strip('<>')} -->" in picture


def test_the_coordinate_check(looked):
    found, shown, picture = looked("--steps", "2", "--seeds", "2", *MUP)
    assert found["widths"] == [8, 16, 32, 64]
    assert found["start"]["logits"] == [0.0] * 4  # muP's head starts at 0: no slope
    assert found["start_slopes"]["logits"] is None
    assert max(found["change_slopes"].values()) < 0.2
    assert "2 steps change" in shown and "what 2 steps change" in picture
    found, _, _ = looked("--steps", "2", "--seeds", "2")
    assert max(found["change_slopes"].values()) > 0.4


def test_usual_widths():
    assert usual_widths(24) == [24, 48, 96, 192]
    assert usual_widths(64) == [64, 128, 256, 512]
    assert usual_widths(256) == [64, 128, 256, 512]
    assert usual_widths(576) == [72, 144, 288, 576]
    assert usual_widths(1001) == [1001]  # refused: give widths by hand


def test_what_grows_with_the_width():
    model = Transformer(
        9, 16, 1, 2, head_dim=12, hidden_dim=24, attention="mla", mla_kv_rank=6, mla_rope_dim=4
    )
    wide = widened(model, 32).init_args
    assert wide == model.init_args | {
        "dim": 32, "head_dim": 24, "hidden_dim": 48, "mla_kv_rank": 12, "mla_rope_dim": 8,
    }  # fmt: skip
    model = MoETransformer(9, 16, 2, 2, hidden_dim=8, dense_layers=1, dense_hidden_dim=4)
    assert widened(model, 8).init_args == model.init_args | {
        "dim": 8, "hidden_dim": 4, "dense_hidden_dim": 2,
    }  # fmt: skip
    model = Mamba2(9, 16, 1, state_dim=4, head_dim=8)
    assert widened(model, 32).init_args == model.init_args | {"dim": 32}
    mixers = {
        "attention": {"n_heads": 2, "head_dim": 6},
        "mamba2": {"head_dim": 8, "state_dim": 4},
    }
    model = Hybrid(9, 16, 2, pattern=["mamba2", "attention"], mixers=mixers)
    wide = widened(model, 32)
    assert wide.blocks[0].mixer.n_heads == 2 * model.blocks[0].mixer.n_heads
    assert wide.blocks[1].mixer.head_dim == 12
    assert model.init_args["mixers"]["attention"]["head_dim"] == 6


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({}, ["--config", "nosuch.yaml"], ["nosuch.yaml"]),
        ({}, ["--widths", "[8]"], ["widths", "[8]", "two or more"]),
        ({}, ["--widths", "[8,8]"], ["widths", "[8, 8]"]),
        ({}, ["--widths", "[0,8]"], ["widths", "at least 1"]),
        ({}, ["--widths", "[8,9]"], ["widths: 9", "n_heads 2"]),
        ({}, ["--widths", "wide"], ["widths"]),
        ({MODEL + "hidden_dim": 10}, ["--widths", "[6,8]"], ["hidden_dim 10", "dim 8"]),
        (
            {MODEL + "dim": 1001, MODEL + "n_heads": 1, MODEL + "position": "none"},
            [],
            ["widths", "[1001]"],
        ),
        ({}, ["--steps", "-1"], ["steps", "-1"]),
        ({}, ["--seeds", "0"], ["seeds", "0"]),
        ({}, ["--out", "init.txt"], ["init.txt", ".png"]),
        ({"model__optimizer": None}, ["--steps", "1"], ["model.optimizer"]),
        (
            {"model__optimizer__init_args__lr": -1},
            ["--steps", "1"],
            ["model.optimizer", "lr", "-1"],
        ),
        ({"model__optimizer__init_args__rate": 1}, ["--steps", "1"], ["rate"]),
        ({}, ["--what", "1"], ["what"]),
    ],
)
def test_what_cannot_be(changes, words, expected, toolmem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = write_config(tmp_path / "r.yaml", changed(**changes))
    config = [] if "--config" in words else ["--config", recipe]
    called = toolmem("inspect", "init", *config, *words)
    assert called.code == 2
    assert "Traceback" not in called.err
    for text in expected:
        assert text in called.err
    assert not list(tmp_path.glob("init*"))
