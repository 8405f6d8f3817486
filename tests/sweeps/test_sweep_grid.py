"""A sweep's recipe, and the runs that it stands for."""

from __future__ import annotations

import copy

import pytest
import yaml
from sweep_toys import BASE, sweep_with, write_sweep

from toolmem.errors import ToolmemError
from toolmem.recipe_files import get_key
from toolmem.sweeps import SweepRecipe, expand


def runs_of(**changes):
    return expand(SweepRecipe.parse(sweep_with(**changes), "toy"))


def test_every_combination_with_every_seed():
    runs = runs_of(seeds=[3, 5])
    assert [(r.settings["width"], r.settings["lr"], r.seed) for r in runs] == [
        (width, lr, seed) for seed in (3, 5) for width in (4, 8) for lr in (1e-3, 1e-2)
    ]
    for run in runs:
        assert get_key(run.recipe, "model.model.init_args.dim") == run.settings["width"]
        assert get_key(run.recipe, "model.optimizer.init_args.lr") == run.settings["lr"]
        assert run.recipe["seed_everything"] == run.recipe["data"]["init_args"]["seed"] == run.seed
        assert run.recipe["trainer"] == BASE["trainer"]
    assert len({run.name for run in runs}) == 8


def test_a_bundle_sets_many_keys_and_later_axes_change_it():
    rnn = {
        "class_path": "toolmem.models.RNN",
        "init_args": {"dim": 1, "n_layers": 2, "cell": "gru"},
    }
    axes = {
        "architecture": {"attention": {"model.model.n_heads": 1}, "GRU": {"model.model": rnn}},
        "width": {"key": "model.model.dim", "values": [4, 8]},
    }
    runs = runs_of(axes=axes, report=None)
    assert [tuple(run.settings.values()) for run in runs] == [
        ("attention", 4), ("attention", 8), ("GRU", 4), ("GRU", 8)
    ]  # fmt: skip
    gru = runs[3].recipe["model"]["model"]
    assert gru == rnn | {"init_args": {"dim": 8, "n_layers": 2, "cell": "gru"}}
    assert rnn["init_args"]["dim"] == 1  # what the recipe says is not written to
    attention = runs[0].recipe["model"]["model"]["init_args"]
    assert attention == {"dim": 4, "n_layers": 1, "n_heads": 1, "max_seq_len": 16}


def test_names_stay_whatever_else_is_swept():
    first = {run.name for run in runs_of()}
    assert first == {run.name for run in runs_of()}
    assert "8_0.01_s0-" in " ".join(first)
    axes = {
        "width": {"key": "model.model.dim", "values": [16, 8, 4]},
        "lr": {"key": "model.optimizer.init_args.lr", "values": [0.1, 1e-2, 1e-3]},
    }
    more = {run.name for run in runs_of(axes=axes, seeds=2, metrics=["val/loss", "train/loss"])}
    assert first < more
    assert len(more) == 18
    other = copy.deepcopy(BASE)
    other["trainer"]["max_steps"] = 5
    assert not first & {run.name for run in runs_of(base=other)}
    backwards = yaml.safe_load(yaml.safe_dump(BASE, sort_keys=True))
    assert first == {run.name for run in runs_of(base=backwards)}


def test_a_name_is_a_folder_whatever_the_label():
    bundles = {"a/../b c": {"model.model.dim": 4}, "x" * 300: {"model.model.dim": 8}}
    runs = runs_of(axes={"kind": bundles}, report=None)
    for run in runs:
        assert "/" not in run.name
        assert len(run.name) < 120
    assert runs[0].settings == {"kind": "a/../b c"}


def test_it_is_read_from_a_file_beside_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "sweeps").mkdir()
    path = write_sweep(tmp_path / "sweeps" / "mine.yaml", sweep_with(base="../base.yaml"))
    read = SweepRecipe.read(path)
    assert read.name == "mine"
    assert {run.name for run in expand(read)} == {run.name for run in runs_of()}


WIDTH = {"key": "model.model.dim", "values": [4, 8]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bsae": {}}, "bsae: a sweep has no such key"),
        ({"base": None}, "base is missing"),
        ({"base": "nowhere.yaml"}, "base: .*nowhere.yaml: No such file"),
        ({"base": {**BASE, "runs": "x"}}, "base.runs: the sweep itself decides"),
        ({"axes": {}}, "axes is empty"),
        ({"axes": {"w": {"key": "model.model.dim", "values": []}}}, "axes.w.values is"),
        ({"axes": {"w": {"key": "model.model.dim", "values": [4, 4]}}}, "axes.w.values names"),
        ({"axes": {"w": {"values": [4]}}}, "axes.w.key is None"),
        ({"axes": {"w": {**WIDTH, "step": 2}}}, "axes.w.step: a sweep has no such key"),
        ({"axes": {"w": [4, 8]}}, r"axes.w is \[4, 8\]: write"),
        ({"axes": {"w": {"small": 4}}}, "axes.w.small is 4"),
        ({"axes": {"w": {"key": "x", "values": [{"a": 1}]}}}, "axes.w: .* needs a label"),
        ({"axes": {"seed": WIDTH}}, "axes.seed: every result has a column"),
        ({"axes": {"w": WIDTH, "v": {"key": "name", "values": ["x"]}}}, "axes.v: name is decided"),
        ({"axes": {"w": WIDTH, "v": WIDTH}}, "are the same recipe"),
        ({"axes": {"w": {"key": "seed_everything.x", "values": [1]}}}, "axes.w: seed_everything"),
        ({"seeds": 0}, "seeds is 0"),
        ({"seeds": [1, 1]}, "seeds names one twice"),
        ({"seeds": [True]}, "seeds is"),
        ({"seed_keys": "seed_everything"}, "seed_keys is"),
        ({"metrics": []}, "metrics is"),
        ({"metrics": {"val/loss": "mean"}}, "metrics.val/loss is 'mean'"),
        ({"metrics": ["tokens"]}, "'tokens' is the name of another column"),
        ({"keep_checkpoints": 1}, "keep_checkpoints is 1"),
        ({"report": {"metric": "x", "x": "w"}}, "report.metric is 'x': choose from metrics"),
        ({"report": {"metric": "val/loss", "x": "depth"}}, "report.x is 'depth'"),
        ({"report": {"metric": "val/loss", "x": "w", "best": []}}, "report.best: a sweep has no"),
        ({"report": {"metric": "val/loss", "x": "w", "line": "w"}}, "report: x, line, panel and best_over"),
        ({"report": {"metric": "val/loss", "x": "w", "mode": "up"}}, "report.mode is 'up'"),
        (
            {"axes": {"w": WIDTH, "lr": {"key": "model.optimizer.lr", "values": [1, 2]}},
             "report": {"metric": "val/loss", "x": "w"}},
            "report: the axis lr is neither",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_its_key(changes, message):
    changes = {"axes": {"w": WIDTH}, "report": None} | changes
    with pytest.raises(ToolmemError, match=message):
        runs_of(**changes)
