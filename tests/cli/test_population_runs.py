"""``module: toolmem.training.PopulationModule``: many runs as one, each what it would be alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import yaml
from cli_toys import TINY, write_config

from toolmem import checkpoints
from toolmem.training.loggers import read_rows

MEMBERS = [
    {"seed": 3},
    {"seed": 1, "optimizer": {"lr": 1e-2, "weight_decay": 0.2}},
    {"seed": 2, "schedule": {"warmup_steps": 0}, "max_steps": 4},
]
DATA = [{}, {"setting": "in_tool", "seed": 7, "people": 9}, {"batch_size": 5}]


def recipe(**recall):
    """A population of the tiny recipe."""
    config = copy.deepcopy(TINY)
    config["module"] = "toolmem.training.PopulationModule"
    config["model"]["members"] = copy.deepcopy(MEMBERS)
    config["data"] = {
        "class_path": "toolmem.data.PopulationDataModule",
        "init_args": {"data": config["data"], "members": copy.deepcopy(DATA)},
    }
    config["recall"] |= {"every_n_steps": 2, **recall}
    config["trainer"]["callbacks"] = [
        {"class_path": "toolmem.training.Flops", "init_args": {"utilisation": False}}
    ]
    return config


def alone(number):
    """The recipe of the run that trains one member."""
    config, member = copy.deepcopy(TINY), MEMBERS[number]
    config["seed_everything"] = member["seed"]
    for part in ("optimizer", "schedule"):
        config["model"][part]["init_args"] |= member.get(part, {})
    config["data"]["init_args"] |= DATA[number]
    config["trainer"]["max_steps"] = member.get("max_steps", config["trainer"]["max_steps"])
    config["recall"] |= {"every_n_steps": 2}
    return config


def test_a_members_folder_is_its_own_runs(toolmem, tmp_path):
    words = ["fit", "--runs", str(tmp_path), "--config"]
    called = toolmem(*words, write_config(tmp_path / "p.yaml", recipe()), "--name", "p")
    assert called.code == 0, called.err
    for number in range(3):
        called = toolmem(
            *words, write_config(tmp_path / "one.yaml", alone(number)), "--name", number
        )
        assert called.code == 0, called.err
        folder = tmp_path / "p" / "members" / str(number)
        mine, wanted = (checkpoints.load(path) for path in (folder, tmp_path / str(number)))
        assert mine.step == wanted.step == (6, 6, 4)[number]
        assert mine.data == wanted.data
        for (name, weight), other in zip(
            mine.model.named_parameters(), wanted.model.parameters(), strict=True
        ):
            torch.testing.assert_close(weight, other, rtol=0, atol=1e-5, msg=name)
        rows, others = (
            read_rows(path / "metrics.csv") for path in (folder, tmp_path / str(number))
        )
        assert len(rows) == len(others) == (3, 3, 2)[number] + 1  # every 2, and validation at 3
        for row, other in zip(rows, others, strict=True):
            assert "train/learning_rate" in row and "recall/exact_match" in row
            for name, value in row.items():
                assert bool(value) == bool(other[name]), name
                assert not value or float(value) == pytest.approx(float(other[name]), rel=1e-4)
        assert (folder / "samples" / "step_4.jsonl").is_file()
        assert (folder / "facts.duckdb").is_file()
    rows = read_rows(tmp_path / "p" / "metrics.csv")
    assert [row["population/active"] for row in rows if row["population/active"]] == ["3", "3", "2"]
    flops = [int(row["flops/total"]) for row in rows if row["flops/total"]]
    assert flops[-1] > flops[0] > 0
    assert (tmp_path / "p" / "config.yaml").is_file()


def test_it_validates_and_goes_on(toolmem, tmp_path):
    file = write_config(tmp_path / "p.yaml", recipe())
    words = ["--config", file, "--runs", tmp_path]
    assert toolmem("fit", *words, "--name", "whole").code == 0
    stop = ["--trainer.limit_train_batches", "5", "--trainer.max_epochs", "1"]
    assert toolmem("fit", *words, "--name", "x", *stop).code == 0
    config = tmp_path / "x" / "config.yaml"
    assert yaml.safe_load(config.read_text())["model"]["members"][1]["optimizer"]["lr"] == 1e-2
    again = [*words, "--name", "x", "--resume", "auto"]
    called = toolmem("fit", *again)
    assert called.code == 0, called.err
    for number in range(3):
        whole, two = (
            tmp_path / name / "members" / str(number) / "metrics.csv" for name in ("whole", "x")
        )
        assert two.read_text() == whole.read_text()
        states = [
            checkpoints.weights_of(checkpoints.read(path.parent / "checkpoints" / "last.ckpt"))
            for path in (whole, two)
        ]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    called = toolmem("validate", "--config", config, "--ckpt_path", tmp_path / "x")
    assert called.code == 0, called.err
    called = toolmem("fit", *again, "--model.members[0].seed", "9")
    assert called.code == 2


def test_a_member_that_knows_enough_is_done(toolmem, tmp_path, monkeypatch):
    """Recall is measured by a stand-in: what is tested is who ends when."""
    from toolmem.evaluation import recall

    measure = recall.measure_in_parts

    def measured(*args, **options):
        results = measure(*args, **options)
        if options["toolbox"] is not None:
            return results
        for split, result in results.items():  # the members that answer themselves are always right
            right = {name: replace(s, correct=s.total) for name, s in result.attributes.items()}
            results[split] = replace(result, attributes=right)
        return results

    monkeypatch.setattr(recall, "measure_in_parts", measured)
    file = write_config(tmp_path / "p.yaml", recipe(stop_at=0.9))
    called = toolmem("fit", "--config", file, "--runs", tmp_path, "--name", "p")
    assert called.code == 0, called.err
    steps = [checkpoints.load(tmp_path / "p" / "members" / str(n)).step for n in range(3)]
    assert steps == [2, 6, 2]
    rows = read_rows(tmp_path / "p" / "metrics.csv")
    assert [row["population/active"] for row in rows if row["population/active"]] == ["3", "1", "1"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": MEMBERS[:2]}, "model.members has 2 entries, data.init_args.members 3"),
        ({"members": [{"lr": 1}] * 3}, "lr"),
        ({"at_once": 0}, "model.at_once is 0"),
    ],
)
def test_a_bad_population_is_refused_and_leaves_nothing(change, message, toolmem, tmp_path):
    config = recipe()
    config["model"] |= change
    called = toolmem(
        "fit", "--config", write_config(tmp_path / "p.yaml", config), "--runs", tmp_path / "runs"
    )
    assert called.code == 2 and message in called.err, called.err
    assert "Traceback" not in called.err
    assert not (tmp_path / "runs" / "p").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"members": []}, "data.init_args.members is empty"),
        (
            {"members": [{"poeple": 3}]},
            r"data.init_args.members[0].poeple: FactsDataModule takes no",
        ),
        ({"data": {}}, "data.init_args.data must have a class_path"),
        (
            {"data": {"class_path": "toolmem.data.Batch"}},
            "toolmem.data.Batch is not a toolmem.data.modules",
        ),
        (
            {"data": {"class_path": "toolmem.data.ByteTokenizer"}, "members": [{}]},
            "is not a toolmem.data.modules.StatefulDataModule",
        ),
    ],
)
def test_bad_data_is_refused(change, message, toolmem, tmp_path):
    config = recipe()
    config["data"]["init_args"] |= change
    called = toolmem(
        "fit", "--config", write_config(tmp_path / "p.yaml", config), "--runs", tmp_path / "runs"
    )
    assert called.code == 2 and message in called.err, called.err
    assert not (tmp_path / "runs" / "p").exists()
