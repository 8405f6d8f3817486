"""A sweep's grid: every combination of its axes' values and seeds, each a recipe with a name."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.recipe_files import set_key
from toolmem.sweeps.recipe import SweepRecipe

# What the sweep itself decides of a run, whatever a recipe says.
OWN_KEYS = ("name", "runs", "resume", "ckpt_path")


@dataclass(frozen=True)
class Planned:
    """One run of a sweep.

    Args:
        name: readable, and the same wherever the settings are the same.
        settings: label by axis.
        seed: of the run.
        recipe: the whole recipe, as ``toolmem fit`` takes it.
    """

    name: str
    settings: dict[str, Any]
    seed: int
    recipe: dict[str, Any]


def expand(sweep: SweepRecipe) -> list[Planned]:
    """Every run of a sweep: seeds outermost, then the axes in their order, the last one fastest.

    Args:
        sweep: what varies.

    Raises:
        ToolmemError: for a key that leads nowhere, or two settings that are the same run.
    """
    for key in OWN_KEYS:
        if key in sweep.base:
            raise ToolmemError(f"base.{key}: the sweep itself decides it, leave it out")
    runs: dict[str, Planned] = {}
    by_recipe: dict[str, Planned] = {}
    for seed in sweep.seeds:
        for labels in itertools.product(*(axis.values for axis in sweep.axes)):
            recipe = copy.deepcopy(sweep.base)
            for axis, label in zip(sweep.axes, labels, strict=True):
                for key, value in axis.values[label].items():
                    _set(recipe, key, copy.deepcopy(value), f"axes.{axis.name}")
            for key in sweep.seed_keys:
                set_key(recipe, key, seed)
            settings = {axis.name: label for axis, label in zip(sweep.axes, labels, strict=True)}
            number = fingerprint(recipe)
            run = Planned(run_name(settings, seed, number), settings, seed, recipe)
            if number in by_recipe:
                raise ToolmemError(
                    f"axes: {run.name} and {by_recipe[number].name} are the same recipe: a value of an "
                    "axis is written over by a later one, or a value is there twice"
                )
            runs[run.name] = by_recipe[number] = run
    return list(runs.values())


def _set(recipe: dict[str, Any], key: str, value: Any, place: str) -> None:
    if key.split(".")[0] in OWN_KEYS:
        raise ToolmemError(f"{place}: {key} is decided by the sweep itself, leave it out")
    try:
        set_key(recipe, key, value)
    except ToolmemError as error:
        raise ToolmemError(f"{place}: {error}") from error


def fingerprint(recipe: Mapping[str, Any]) -> str:
    """Eight hexadecimal digits that tell one recipe from another, whatever the order of its keys."""
    text = json.dumps(recipe, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(settings: Mapping[str, Any], seed: int, number: str) -> str:
    """A folder's name that says what the run is: ``attention_64_0.003_s0-1a2b3c4d``."""
    words = [re.sub(r"[^A-Za-z0-9.+-]+", "-", str(label)) for label in settings.values()]
    return f"{'_'.join([*words, f's{seed}'])[:100]}-{number}"
