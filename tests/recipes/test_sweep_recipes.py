"""Every sweep's recipe is a grid of recipes that ``toolmem fit`` takes; cut down, it runs to its plot."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import yaml

from toolmem.cli import main
from toolmem.cli.sweep_plan import check, model_sizes
from toolmem.data import FactsDataModule
from toolmem.recipe_files import get_key, set_key
from toolmem.sweeps import Results, SweepRecipe, expand
from toolmem.sweeps.axes import with_files

FOLDER = Path(__file__).resolve().parent.parent.parent / "recipes" / "sweeps"
# what makes each small: of its axes, how many values are left, or others; of its base, what is changed
ASKED = {"every_n_steps": 2, "n_questions": 4, "n_unseen": 0, "show": False}
TWO_SETTINGS = {
    "in_weight": {"data.people": 8, "recall": ASKED},
    "in_tool": {"data.setting": "in_tool", "data.people": 8, "recall": ASKED},
}
CUT = {
    "allocation": (
        {
            "setting": {
                name: {**keys, "trainer.max_steps": 2} for name, keys in TWO_SETTINGS.items()
            },
            "list": [
                {"budget": 10000, "shape": "1 layer", "width": 20, "hidden": 72},
                {"budget": 10000, "shape": "untied", "width": 12, "hidden": 47},
            ],
        },
        {},
    ),
    "tricks": (
        {
            "setting": TWO_SETTINGS,
            "size": {16: {"model.model.dim": 16, "model.model.hidden_dim": 48}},
            "option": {
                "plain": {},
                "muon": "../tricks/muon.yaml",
                "window": {"model.model.window": [16, 0]},
            },
            "budget": {
                "2 steps": {
                    "model.model.n_layers": 2,
                    "model.model.n_heads": 2,
                    "trainer.max_steps": 2,
                    "trainer.accelerator": "cpu",
                    "trainer.devices": 1,
                    "trainer.limit_val_batches": 0,
                }
            },
        },
        {},
    ),
    "mqar": (
        {"width": 1, "lr": 1},
        {"trainer.max_steps": 2, "trainer.val_check_interval": 2, "data.val_batches": 1},
    ),
    "canon": (
        {},
        {
            "trainer.max_steps": 2,
            "trainer.val_check_interval": 2,
            "recall.every_n_steps": 2,
            "recall.n_questions": 4,
            "recall.n_unseen": 4,
            "data.people": 8,
        },
    ),
    "generalization_laptop": (
        {
            "people": 1,
            "model": {"4 a step": {"data.batch_size": 4, "trainer.max_steps": 2}},
            "setting": {"in_tool": {"data.setting": "in_tool", "data.people": 8}},
        },
        {"recall.every_n_steps": 2, "recall.n_questions": 4, "recall.n_unseen": 4},
    ),
    "compressibility_laptop": (
        {"alpha": 1, "people": {8: {"data.people": 8, "trainer.max_steps": 2}}},
        {"recall.every_n_steps": 2, "recall.n_questions": 4},
    ),
    "dynamics": (
        {
            "lr": 1,
            "warmup": 1,
            "run": {
                "8 people": {
                    "data.setting": "in_tool",
                    "data.people": 8,
                    "trainer.max_steps": 2,
                    "trainer.callbacks": [
                        {
                            "class_path": "toolmem.training.TokenLossProbe",
                            "init_args": {"every_n_steps": 1},
                        }
                    ],
                    "recall": {"every_n_steps": 1, "n_questions": 4, "n_unseen": 4},
                }
            },
        },
        {},
    ),
    "capacity": (
        {
            "people": {8: {"data.people": 8}},
            "exposures": {2: {"exposures": 2}},
            "list": [
                {"size": "8 x 2", "architecture": one, "people": 8, "exposures": 2}
                for one in ("dense", "8 experts")
            ],
        },
        {},
    ),
    **dict.fromkeys(
        ("figure1_quick", "figure1_laptop", "figure1_overnight", "figure1"),
        ({}, {"recall.every_n_steps": 2, "recall.n_questions": 4}),
    ),
}
STUDY_TOKENS = 100_000 * 128 * 257  # of a run of the published study, padding among them


def test_each_sweep_is_known_here():
    """A new recipe needs an entry in CUT, or it would go untested."""
    tested_elsewhere = {"finetune_laptop"}  # test_finetune_recipes.py
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(CUT) | tested_elsewhere


def test_every_trick_is_compared_with_the_plain_recipe():
    """The plain recipe first; of the others each file of the tricks' folder, and nothing else."""
    [options] = [a for a in SweepRecipe.read(FOLDER / "tricks.yaml").axes if a.name == "option"]
    first, *others = options.values
    tricks = {path.stem for path in FOLDER.with_name("tricks").glob("*.yaml")}
    assert (first, set(others)) == ("plain", tricks - {"plain"})


def test_shapes_stand_at_their_budgets():
    """Within 2 % of the parameters that they are compared at."""
    sweep = SweepRecipe.read(FOLDER / "allocation.yaml")
    runs = expand(sweep, sweep.seeds[:1])
    sizes = model_sizes(runs)
    for run in runs:
        assert sizes[run.name] == pytest.approx(run.settings["budget"], rel=0.02), run.name


@pytest.mark.parametrize("name", CUT)
def test_every_value_is_one_that_fit_takes(name):
    sweep = SweepRecipe.read(FOLDER / f"{name}.yaml")
    assert len(expand(sweep)) > 8
    check(sweep)


@pytest.mark.parametrize("name", ["figure1_quick", "figure1_laptop", "figure1_overnight"])
def test_figure_1_asks_for_a_share_of_the_published_tokens(name):
    """Were every row as long as the longest of 2,048 people: a 20th up to 512 people, a 5th above."""
    longest = {}
    for setting in ("in_weight", "in_tool"):
        data = FactsDataModule(people=2048, setting=setting, batch_size=512)
        data.prepare_data()
        data.setup("fit")
        longest[setting] = max(
            batch.tokens.shape[1] for batch in islice(data.train_dataloader(), 16)
        )
    assert longest["in_weight"] < longest["in_tool"] < 257
    for run in expand(SweepRecipe.read(FOLDER / f"{name}.yaml")):
        rows = get_key(run.recipe, "trainer.max_steps") * get_key(run.recipe, "data.batch_size")
        seen = rows * longest[run.settings["setting"]]
        assert seen <= STUDY_TOKENS / (20 if run.settings["people"] <= 512 else 5), run.name


@pytest.mark.slow
@pytest.mark.parametrize("name", CUT)
def test_cut_down_it_runs_to_its_plot(name, tmp_path, capsys):
    left, changes = CUT[name]
    written = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    written["base"] = SweepRecipe.read(FOLDER / f"{name}.yaml").base
    for axis, few in left.items():
        if axis == "list":
            written["list"] = few
        elif isinstance(few, int):
            written["axes"][axis]["values"] = written["axes"][axis]["values"][:few]
        else:
            written["axes"][axis] = few
    written["axes"] = with_files(written["axes"], FOLDER)
    for key, value in changes.items():
        set_key(written["base"], key, value)
    written["seeds"] = 1
    if "search" in written:  # its axes say how long a run is: two settings, of two members each
        written["axes"]["people"] = {8: {"data.people": 8}}
        written["axes"]["setting"]["in_tool"] = {"data.setting": "in_tool"}
        written["base"]["trainer"]["max_steps"] = 2
        family = written["search"]["family"]
        written["search"]["family"] = {label: family[label] for label in list(family)[:2]}
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(written, sort_keys=False), encoding="utf-8")
    code = main(["sweep", str(recipe), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert code == 0, capsys.readouterr().err
    rows = Results(tmp_path / "out" / "results.duckdb").rows()
    assert {row["status"] for row in rows} == {"done"}, [row["error"] for row in rows]
    assert len(rows) == len(expand(SweepRecipe.read(recipe)))
    assert (tmp_path / "out" / f"{name}.csv").is_file()
