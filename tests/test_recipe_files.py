"""Recipes as plain data, changed by dotted keys."""

from __future__ import annotations

import pytest

from toolmem.errors import ToolmemError
from toolmem.recipe_files import flattened, get_key, parse_yaml, read_mapping, set_key


def recipe():
    return {
        "model": {"optimizer": {"class_path": "a.B", "init_args": {"lr": 1}}, "z_loss": 0.0},
        "data": {"class_path": "c.D"},
    }


def test_init_args_may_be_left_out():
    changed = recipe()
    set_key(changed, "model.optimizer.lr", 2)
    set_key(changed, "model.optimizer.init_args.beta", 3)
    set_key(changed, "data.seed", 4)
    set_key(changed, "trainer.max_steps", 5)
    assert changed["model"]["optimizer"] == {
        "class_path": "a.B", "init_args": {"lr": 2, "beta": 3}
    }  # fmt: skip
    assert changed["data"] == {"class_path": "c.D", "init_args": {"seed": 4}}
    assert changed["trainer"] == {"max_steps": 5}
    for key in ("model.optimizer.lr", "model.optimizer.init_args.lr"):
        assert get_key(changed, key) == 2
    assert get_key(changed, "data.seed") == 4
    assert get_key(changed, "data.missing", 7) == get_key(changed, "seed.x.y", 7) == 7


def test_a_mapping_replaces_all_that_was_there():
    changed = recipe()
    set_key(changed, "model.optimizer", {"class_path": "e.F"})
    assert changed["model"]["optimizer"] == {"class_path": "e.F"}


def test_a_key_through_a_number_is_refused():
    with pytest.raises(ToolmemError, match=r"model.z_loss.x: model.z_loss is 0.0"):
        set_key(recipe(), "model.z_loss.x", 1)


def test_numbers_are_as_jsonargparse_reads_them(tmp_path):
    assert parse_yaml("lr: 1e-3", "x") == {"lr": 0.001}
    with pytest.raises(ToolmemError, match=r"^here: this is not YAML \(line 2"):
        parse_yaml("a: 1\nb: ]", "here")
    with pytest.raises(ToolmemError, match="No such file"):
        read_mapping(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ToolmemError, match="no mapping"):
        read_mapping(tmp_path / "list.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ToolmemError, match="not a text file"):
        read_mapping(tmp_path / "bytes.yaml")


def test_flattened():
    assert flattened({"a": {"b": 1, "c": {"d": [2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [2], "e": {}}
