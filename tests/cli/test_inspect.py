"""``toolmem inspect``: its figures against the model's own, and against sums on paper."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from cli_toys import changed, write_config

from toolmem.class_path import import_class
from toolmem.cli import inspect, inspect_recipe
from toolmem.models.model_flops import ModelFlops, full_row

ROOT = Path(__file__).parents[2]
CONTENT = {
    path: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "recipes").rglob("*.yaml"))
}
WHOLE = [
    p
    for p, content in CONTENT.items()
    if "class_path" in content.get("model", {}).get("model", {})
    and "init_from" not in content["model"]  # STARTED
]
PLAIN = ROOT / "recipes" / "tricks" / "plain.yaml"
TRICKS = [p for p in CONTENT if p.parent.name == "tricks" and p not in WHOLE]
KEYS = {
    "params_total",
    "params_active",
    "params_non_embedding",
    "flops_forward_per_token",
    "flops_training_per_token",
    "cache_bytes_per_token",
}
MODEL, DATA = "model__model__init_args__", "data__init_args__"


def figures(toolmem, recipe, tmp_path, *words):
    called = toolmem("inspect", "--config", recipe, "--json", tmp_path / "figures.json", *words)
    assert called.code == 0, called
    return json.loads((tmp_path / "figures.json").read_text()), called.out


def plain_model(recipe, **changes):
    """The recipe's model, made by hand."""
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data, chosen = content["data"]["init_args"], content["model"]["model"]
    size = data.get("train_tokenizer") or data.get("vocab_size")
    if size is None and content["data"]["class_path"] == "toolmem.data.MADDataModule":
        size = 16  # the module's own, as docs/synthetic-recall.md says it
    elif size is None:
        from toolmem.data.tokenizers import make_tokenizer

        size = make_tokenizer(data.get("tokenizer") or "byte").vocab_size
    kind = import_class(chosen["class_path"], "class_path")
    return kind(size, **(chosen["init_args"] | changes)), data.get("seq_len")


SMALL = [path for path in WHOLE if "smollm" not in path.name]


@pytest.mark.parametrize("recipe", SMALL, ids=lambda path: path.stem)
def test_figures_are_the_models_own(recipe, toolmem, tmp_path):
    found, _ = figures(toolmem, recipe, tmp_path)
    assert set(found) >= KEYS
    model, seq = plain_model(recipe)
    numel = {name: p.numel() for name, p in model.named_parameters()}
    assert found["params_total"] == sum(numel.values())
    tables = ("embedding.", "position_embedding.", "head.")
    assert found["params_non_embedding"] == sum(
        n for name, n in numel.items() if not name.startswith(tables)
    )
    assert found["params_active"] == model.active_parameters()
    assert found["params_by_group"] == {k: n for k, n in model.parameter_counts().items() if n}
    sizes = [model.new_cache(1, n).size_in_bytes() for n in (100, 300)]
    assert found["cache_bytes_per_token"] == (sizes[1] - sizes[0]) / 200
    assert found["cache_bytes_fixed"] + 100 * found["cache_bytes_per_token"] == sizes[0]
    seq = seq or model.max_seq_len
    assert found["seq_len"] == seq
    flops = ModelFlops(model.to("meta"))
    body, head = flops.body(1, seq), flops.head()
    n_heads = 1 + (len(model.multi_token.blocks) if model.multi_token is not None else 0)
    each = body.exact(seq, full_row) / seq + n_heads * (head.forward + head.gradient)
    assert found["flops_training_per_token"] == each
    if n_heads == 1:
        each = body.exact(seq, full_row, backward=False) / seq + head.forward
        assert found["flops_forward_per_token"] == each
    by_group = sum(found["flops_forward_by_group"].values())
    assert found["flops_forward_per_token"] == pytest.approx(by_group, rel=1e-12)
    assert found["uncounted_operations"] == []


@pytest.mark.parametrize("trick", TRICKS, ids=lambda path: path.stem)
def test_a_recipe_that_says_only_what_it_changes(trick, toolmem, tmp_path):
    found, _ = figures(toolmem, PLAIN, tmp_path, "--config", trick)
    changed_args = CONTENT[trick].get("model", {}).get("model", {}).get("init_args", {})
    changed_data = CONTENT[trick].get("data", {}).get("init_args", {})
    model = plain_model(PLAIN, **changed_args)[0]
    assert found["params_total"] == sum(p.numel() for p in model.parameters())
    assert found["params_active"] == model.active_parameters()
    assert found["seq_len"] == changed_data.get("seq_len", model.max_seq_len)


def test_figures_on_paper(toolmem, tmp_path):
    """facts_in_tool: dim 24, 2 layers, 2 heads of 12, silu of 72, 256 tokens, V ids.

    Parameters: V x 24 tied; a layer 24 x 72 + 24 x 24 + 2 x 24 x 72 = 5,760, its convolution 4 x 72 and
    norms 2 x 24; the last norm 24. FLOPs a token: 2 x 2 x 5,760 + 48 V, and for its 128.5 pairs, on
    average, 2 layers x 2 heads x 4 x 12. Cache: 2 layers x (keys and values) 48 floats.
    """
    recipe = ROOT / "recipes" / "facts_in_tool.yaml"
    found, _ = figures(toolmem, recipe, tmp_path)
    vocab = plain_model(recipe)[0].vocab_size
    assert found["params_total"] == 24 * vocab + 2 * (5760 + 288 + 48) + 24
    assert found["params_non_embedding"] == 2 * (5760 + 288 + 48) + 24
    assert found["flops_forward_per_token"] == 23_040 + 48 * vocab + 128.5 * 192
    assert found["flops_training_per_token"] == 3 * found["flops_forward_per_token"]
    assert found["cache_bytes_per_token"] == 2 * 48 * 4


STARTED = [
    p
    for p, content in CONTENT.items()
    if content.get("model", {}).get("init_from") and "model" in content["model"]
]


@pytest.mark.parametrize("recipe", STARTED, ids=lambda path: path.stem)
def test_a_recipe_that_starts_from_a_run_which_is_not_there(recipe, toolmem, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no runs here
    found, shown = figures(toolmem, recipe, tmp_path)
    base, _ = figures(toolmem, ROOT / "recipes" / "facts_in_tool.yaml", tmp_path)
    chosen, options = CONTENT[recipe]["model"]["model"], {}
    heads = 0
    if chosen["class_path"].rpartition(".")[2] in ("Eagle", "Medusa"):
        assert "base as in" in shown and "runs/facts_in_tool does not exist yet" in shown
        options = CONTENT[ROOT / "recipes" / "facts_in_tool.yaml"]["model"]["model"]
        vocab = plain_model(ROOT / "recipes" / "facts_in_tool.yaml")[0].vocab_size
        kind = import_class(chosen["class_path"], "class_path")
        heads = kind(vocab, base=options, **chosen["init_args"]).multi_token
        heads = sum(p.numel() for p in heads.parameters())
        assert heads > 0
    assert found["params_total"] == base["params_total"] + heads


def test_the_run_goes_before_its_recipe_and_without_both_it_is_asked_for(
    toolmem, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    medusa = Path("mine", "medusa.yaml")
    medusa.write_text((ROOT / "recipes" / "medusa.yaml").read_text())
    for call in (
        lambda: toolmem("inspect", "--config", medusa),
        lambda: toolmem("fit", "--config", ROOT / "recipes" / "medusa.yaml"),
    ):
        called = call()
        assert called.code == 2 and "model.init_from: no such" in called.err, called
        assert "train that run first" in called.err
    Path("mine", "facts_in_tool.yaml").write_text(
        (ROOT / "recipes" / "facts_in_tool.yaml").read_text()
    )
    assert toolmem("inspect", "--config", medusa).code == 0
    Path("runs", "facts_in_tool").mkdir(parents=True)  # a run that has no checkpoint yet
    called = toolmem("inspect", "--config", medusa)
    assert called.code == 2 and "no checkpoint in" in called.err, called


def test_a_recipe_of_changes_says_what_goes_before_it(toolmem):
    called = toolmem("inspect", "--config", TRICKS[0])
    assert called.code == 2 and f"--config {PLAIN} --config {TRICKS[0]}" in called.err, called


def test_experts_that_are_not_chosen_are_not_active(toolmem, tmp_path):
    """One layer of 8 experts of 3 x 8 x 16, of which a token uses 2: 6 x 384 are idle. A token's share of
    FLOPs is the router 2 x 8 x 8 and two experts, whatever an expert's capacity.
    """
    moe = {"n_experts": 8, "top_k": 2, "hidden_dim": 16, "capacity_factor": 1.0}
    config = changed(model__model__class_path="toolmem.models.MoETransformer")
    config["model"]["model"]["init_args"].update(moe)
    found, shown = figures(toolmem, write_config(tmp_path / "moe.yaml", config), tmp_path)
    assert found["params_total"] - found["params_active"] == 6 * 384
    by_group = found["flops_forward_by_group"]
    assert by_group["router"] == 2 * 8 * 8
    assert by_group["feed_forward"] == 2 * 2 * 384
    assert f"{found['params_active']:,} active" in shown


def test_large_models_need_neither_memory_nor_time(toolmem, tmp_path):
    """SmolLM2-135M: 30 layers of 576 x (960 + 576 + 3 x 1,536) and two norms, 49,152 tied; keys and values
    of 3 heads of 64.
    """
    began = time.thread_time()
    found, shown = figures(toolmem, ROOT / "recipes" / "smollm.yaml", tmp_path)
    assert time.thread_time() - began < 20  # alone it must be 5, below
    layer = 576 * (960 + 576 + 3 * 1536)
    assert found["params_non_embedding"] == 30 * (layer + 2 * 576) + 576
    assert found["params_total"] == found["params_non_embedding"] + 49_152 * 576
    pairs = 2049 / 2 * 30 * 9 * 4 * 64
    assert found["flops_forward_per_token"] == 2 * (30 * layer + 49_152 * 576) + pairs
    assert found["cache_bytes_per_token"] == 30 * 2 * 3 * 64 * 4
    assert "134,515,008" in shown


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*WHOLE, *STARTED], ids=lambda path: path.stem)
def test_it_takes_five_seconds(recipe, tmp_path):
    """Of a core's time, so that what else the machine does is not measured."""
    words = ["inspect", "--config", str(recipe), "--json", str(tmp_path / "figures.json")]
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-m", "toolmem", *words],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 5
    assert set(json.loads((tmp_path / "figures.json").read_text())) >= KEYS


def test_changes_of_the_recipe(toolmem, tmp_path):
    recipe = write_config(tmp_path / "r.yaml", changed())
    base, _ = figures(toolmem, recipe, tmp_path)
    wider, _ = figures(toolmem, recipe, tmp_path, "--model.model.dim=16", "--seq_len", "32")
    assert wider["params_total"] > base["params_total"]
    assert (base["seq_len"], wider["seq_len"]) == (256, 32)
    other, _ = figures(
        toolmem,
        recipe,
        tmp_path,
        "--model.model.init_args.n_layers",
        "3",
        "--data.tokenizer",
        "byte",
    )
    assert other["params_non_embedding"] > 2 * base["params_non_embedding"]


@pytest.mark.parametrize(
    ("changes", "words", "expected"),
    [
        ({}, ["--config", "nosuch.yaml"], ["nosuch.yaml", "No such file"]),
        ({}, ["--seq_len", "1000"], ["seq_len", "1000", "256"]),
        ({}, ["--seq_len", "0"], ["seq_len", "0"]),
        ({}, ["--model.model.dim"], ["--model.model.dim", "value"]),
        ({}, ["--model.model.dim", "[1"], ["--model.model.dim", "YAML"]),
        ({}, ["--what", "1"], ["what"]),
        ({MODEL + "dimm": 8}, [], ["model.model.init_args.dimm"]),
        ({MODEL + "dim": "wide"}, [], ["model.model.init_args.dim", "int"]),
        ({MODEL + "dim": -8}, [], ["dim", "-8", "at least 1"]),
        ({MODEL + "n_heads": 3}, [], ["n_heads 3", "dim 8"]),
        ({MODEL + "vocab_size": 9}, [], ["vocab_size", "data"]),
        ({DATA + "tokenizer": "runes"}, [], ["runes"]),
        ({"model__model": None}, [], ["model.model.class_path"]),
        ({"data": None}, [], ["data.class_path"]),
        ({"data__class_path": "toolmem.data.Nothing"}, [], ["data", "Nothing"]),
        ({"model__model__class_path": "toolmem.models.Transfomer"}, [], ["Transformer"]),
        ({"model__model__class_path": "torch.nn.Linear"}, [], ["torch.nn.Linear"]),
    ],
)
def test_what_is_wrong_is_named(changes, words, expected, toolmem, tmp_path):
    recipe = write_config(tmp_path / "r.yaml", changed(**changes))
    given = words if "--config" in words else ["--config", recipe, *words]
    called = toolmem("inspect", *given)
    assert called.code == 2, called
    assert "Traceback" not in called.err and called.err.startswith("toolmem")
    for text in expected:
        assert text in called.err, called.err
    assert called.out == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"\xff\xfe\x00", "text"), (b"[1, 2", "YAML"), (b"- a\n- b\n", "mapping"), (b"", "mapping")],
)
def test_what_is_no_recipe(content, expected, toolmem, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    called = toolmem("inspect", "--config", tmp_path / "r.yaml")
    assert (called.code, called.out) == (2, "")
    assert expected in called.err


def test_a_small_model_is_run_and_a_large_one_on_short_rows_if_they_tell(monkeypatch):
    recipe = inspect_recipe.read_recipe(str(ROOT / "recipes" / "facts_in_tool.yaml"), {})
    model = inspect.build(recipe, "recipe")
    by_run = inspect.counted_row(model, 64)[1]
    monkeypatch.setattr(inspect, "SMALL_STEP", 0)
    by_short_rows = inspect.counted_row(model, 64)[1]
    assert by_short_rows.same_mathematics(by_run) and by_short_rows.seq == 64
    model.blocks[0].mixer.register_forward_hook(
        lambda module, args, y: y + (args[0] @ args[0].mT) @ y
    )
    by_shapes = inspect.counted_row(model, 64)[1]
    assert {p.device for p in model.parameters()} == {torch.device("meta")}
    products = 2 * (2 * 64 * 64 * 24)  # of plain squares, which no short row foretells
    assert by_shapes.forward == by_run.forward + products


@pytest.mark.parametrize("trick", [*TRICKS, *SMALL], ids=lambda path: path.stem)
def test_short_rows_tell_what_a_long_one_costs(trick, monkeypatch):
    whole = trick in WHOLE
    recipe = inspect_recipe.read_recipe(
        str(trick if whole else PLAIN), {}, [] if whole else [trick]
    )
    model = inspect.build(recipe, "recipe").eval()
    by_run = inspect.counted_row(model, 64)[1]
    monkeypatch.setattr(inspect, "SMALL_STEP", 0)
    by_short_rows = inspect.counted_row(model, 64)[1]
    assert next(model.parameters()).device.type == "cpu"
    assert by_short_rows.exact(64, full_row) == by_run.exact(64, full_row)
