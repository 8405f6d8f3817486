"""Which combinations of the axes are trained: a list, or some at random."""

from __future__ import annotations

import math

import pytest
from sweep_toys import sweep_with

from toolmem.errors import ToolmemError
from toolmem.recipe_files import get_key
from toolmem.sweeps import SweepRecipe, expand

KIND = {"a": {"model.model.n_heads": 1}, "b": {"model.model.n_heads": 2}}
WIDTH = {"key": "model.model.dim"}
LR = {"key": "model.optimizer.lr"}


def parse(**changes):
    return SweepRecipe.parse(sweep_with(report=None) | changes, "toy")


def labels(sweep):
    return [tuple(run.settings.values()) for run in expand(sweep)]


def test_an_axis_that_no_combination_names_is_crossed():
    sweep = parse(axes={"kind": KIND, "width": WIDTH}, list=[{"width": 8}, {"width": 4}])
    assert [tuple(one.values()) for one in sweep.combinations] == [
        ("a", 8), ("a", 4), ("b", 8), ("b", 4)
    ]  # fmt: skip


def test_a_label_that_is_a_recipes_file(tmp_path):
    """Its keys, dotted; classes change with the options they had in common, as one key after another."""
    (tmp_path / "muon.yaml").write_text(
        "model: {optimizer: {class_path: toolmem.training.Muon, init_args: {lr: 1e-2}}}\n"
    )
    axes = {"optimizer": {"plain": {}, "muon": "muon.yaml"}}
    sweep = SweepRecipe.parse(sweep_with(axes=axes, report=None), "toy", tmp_path)
    assert sweep.axes[0].values["muon"] == {
        "model.optimizer.class_path": "toolmem.training.Muon", "model.optimizer.init_args.lr": 0.01
    }  # fmt: skip
    plain, muon = expand(sweep)
    assert get_key(plain.recipe, "model.optimizer.class_path") == "toolmem.training.AdamW"
    assert get_key(muon.recipe, "model.optimizer.lr") == 0.01
    with pytest.raises(ToolmemError, match=r"axes.optimizer.muon: .*gone.yaml: No such file"):
        SweepRecipe.parse(
            sweep_with(axes={"optimizer": {"muon": "gone.yaml"}}, report=None), "toy", tmp_path
        )


def test_a_list_of_combinations():
    listed = [{"width": 8, "kind": "b"}, {"kind": "a", "width": 4}]
    sweep = parse(axes={"kind": KIND, "width": WIDTH}, list=listed)
    assert labels(sweep) == [("b", 8), ("a", 4)]
    run = expand(sweep)[0]
    assert get_key(run.recipe, "model.model.dim") == 8
    assert get_key(run.recipe, "model.model.n_heads") == 2
    assert list(sweep.axes[1].values) == [4, 8]  # for the plot, in order


def random_axes():
    return {
        "lr": LR | {"log_uniform": [1e-4, 1e-1]},
        "width": WIDTH | {"log_uniform": [4, 64]},
        "decay": {"key": "model.optimizer.weight_decay", "uniform": [0.0, 0.5]},
        "kind": KIND,
    }


def test_at_random_within_the_ranges_and_always_the_same():
    sweep = parse(axes=random_axes(), random={"n": 300, "seed": 1})
    found = labels(sweep)
    assert len(found) == 300
    assert found == labels(parse(axes=random_axes(), random={"n": 300, "seed": 1}))
    rates, widths, decays, kinds = zip(*found, strict=True)
    assert all(1e-4 <= lr <= 1e-1 for lr in rates)
    assert all(type(width) is int and 4 <= width <= 64 for width in widths)
    assert {min(widths), max(widths)} == {4, 64}
    assert all(0 <= decay <= 0.5 for decay in decays)
    # each decade has its third of the rates, each half its half of the decays
    assert all(
        70 < sum(math.floor(math.log10(lr)) == d for lr in rates) < 130 for d in (-4, -3, -2)
    )
    assert 120 < sum(decay < 0.25 for decay in decays) < 180
    assert 120 < kinds.count("a") < 180
    assert labels(parse(axes=random_axes(), random={"n": 300, "seed": 2})) != found


def test_more_of_them_add_to_those_there():
    few = {run.name for run in expand(parse(axes=random_axes(), random={"n": 5}))}
    more = {run.name for run in expand(parse(axes=random_axes(), random={"n": 8}))}
    assert len(few) == 5
    assert few < more
    fewer_axes = {name: axis for name, axis in random_axes().items() if name != "decay"}
    rates = [run.settings["lr"] for run in expand(parse(axes=fewer_axes, random={"n": 5}))]
    assert rates == [one[0] for one in labels(parse(axes=random_axes(), random={"n": 5}))]


def test_what_is_drawn_twice_is_trained_once():
    assert sorted(labels(parse(axes={"kind": KIND}, random={"n": 50}))) == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {"lr": LR | {"uniform": [0, 1]}}}, "axes.lr.uniform is a range: say how many"),
        ({"axes": {"lr": LR}}, "axes.lr.values is None"),
        ({"axes": {"lr": LR}, "random": {"n": 2}}, "axes.lr.values is None"),
        ({"axes": {"lr": LR | {"uniform": [1, 0]}}, "random": {"n": 2}}, "must be the smaller"),
        ({"axes": {"lr": LR | {"uniform": [1]}}, "random": {"n": 2}}, "axes.lr.uniform is"),
        ({"axes": {"lr": LR | {"log_uniform": [0, 1]}}, "random": {"n": 2}}, "must be above 0"),
        ({"axes": {"lr": LR | {"uniform": [0, 1], "values": [1]}}}, "has values and uniform: keep"),
        ({"random": {"n": 0}}, "random.n is 0"),
        ({"random": {"n": 2, "seed": -1}}, "random.seed is -1"),
        ({"random": 3}, "random is 3"),
        ({"random": {"m": 3}}, "random.m: a sweep has no such key"),
        ({"list": []}, r"list is \[\]"),
        ({"list": [{"width": 4}, {"width": 4, "lr": 1e-3}]}, r"list\[0\]: it says nothing of lr"),
        ({"list": [{"width": 4, "lr": 1e-3, "x": 1}]}, r"list\[0\].x: a sweep has no such key"),
        ({"list": [{"width": 5, "lr": 1e-3}]}, r"list\[0\].width is 5: choose from 4, 8"),
        ({"list": [{"width": 4, "lr": 1e-3}] * 2}, r"list\[1\] is there twice"),
        ({"list": [{"width": 4, "lr": 1e-3}], "random": {"n": 2}}, "list and random are both"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes, message):
    with pytest.raises(ToolmemError, match=message):
        parse(**changes)
