"""``module``: what trains the model is named in the recipe, and decides which keys ``model`` has."""

from __future__ import annotations

import pytest
import yaml
from cli_toys import TINY, changed, write_config

from toolmem.cli.fit import module_class
from toolmem.errors import ToolmemError
from toolmem.training import GRPO, LanguageModelModule

NAME = "toolmem.training.GRPO"


def test_the_last_word_on_it_counts(tmp_path):
    plain, named = (
        write_config(tmp_path / f"{i}.yaml", config)
        for i, config in enumerate((TINY, TINY | {"module": NAME}))
    )
    for words, kind in (
        (["--config", plain], LanguageModelModule),
        (["--config", named], GRPO),
        (["--config", named, "--config", plain], GRPO),  # the later one says nothing of it
        ([f"--config={plain}", "-c", named], GRPO),
        (["--config", plain, "--module", NAME], GRPO),
        (["--module=toolmem.training.LanguageModelModule", "--config", named], GRPO),
        (["--config", named, "--module=toolmem.training.LanguageModelModule"], LanguageModelModule),
        (["--config"], LanguageModelModule),
    ):
        assert module_class("fit", ["fit", *map(str, words)]) is kind, words
    assert module_class("fit", {"fit": {"module": NAME}}) is GRPO
    assert module_class("fit", {"fit": {}}) is LanguageModelModule


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toolmem.training.Nothing", "module: cannot import 'toolmem.training.Nothing'"),
        (
            "toolmem.training.AdamW",
            "module: toolmem.training.AdamW is not a toolmem.training.LanguageModelModule",
        ),
    ],
)
def test_what_trains_nothing_is_refused(name, message, toolmem, tmp_path):
    file = write_config(tmp_path / "recipe.yaml", TINY | {"module": name})
    with pytest.raises(ToolmemError, match=message):
        module_class("fit", ["--config", str(file)])
    called = toolmem("fit", "--config", str(file), "--runs", str(tmp_path / "runs"))
    assert called.code == 2 and message in called.err
    assert not (tmp_path / "runs").exists()


def test_a_run_by_another_module_is_told_in_its_config_and_goes_on(toolmem, tmp_path):
    recipe = changed(
        data__init_args__setting="in_tool", model__samples=2, model__max_new_tokens=4,
        trainer__max_steps=2, checkpointing__every_n_steps=1,
    )  # fmt: skip
    file = write_config(tmp_path / "recipe.yaml", recipe | {"module": NAME})
    words = [
        "fit",
        "--config",
        str(file),
        "--runs",
        str(tmp_path),
        "--trainer.val_check_interval",
        "1",
    ]
    assert toolmem(*words, "--name", "x").code == 0
    config = yaml.safe_load((tmp_path / "x" / "config.yaml").read_text())
    assert config["module"] == NAME and config["model"]["samples"] == 2
    again = ["--config", str(tmp_path / "x" / "config.yaml"), "--resume", "auto"]
    called = toolmem("fit", *again, "--trainer.max_steps", "3")
    assert called.code == 0, called.err
    table = (tmp_path / "x" / "metrics.csv").read_text().splitlines()
    assert "grpo/reward" in table[0] and table[-1].startswith("3,")
    # without `module`, its options are unknown
    file = write_config(tmp_path / "other.yaml", recipe)
    called = toolmem("fit", "--config", str(file), "--runs", str(tmp_path))
    assert called.code == 2 and "samples" in called.err
