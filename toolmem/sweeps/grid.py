"""A sweep's grid: every combination of its axes' values and seeds, each a recipe with a name."""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.recipe_files import set_key
from toolmem.sweeps.recipe import MEMBER, SweepRecipe

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


def expand(sweep: SweepRecipe, seeds: Sequence[int] | None = None) -> list[Planned]:
    """Every run that a sweep may need: seeds outermost, then the axes in their order, the last one fastest.

    Of a search these are its whole family, of which it trains a few, with further seeds where it needs
    them.

    Args:
        sweep: what varies.
        seeds: these alone; all when None.

    Raises:
        ToolmemError: for a key that leads nowhere, or two settings that are the same run.
    """
    members = (
        [{}] if sweep.search is None else [{MEMBER: one} for one in sweep.search.family.values]
    )
    by_recipe: dict[str, Planned] = {}
    for seed in sweep.seeds if seeds is None else seeds:
        for combination in sweep.combinations:
            for member in members:
                run = make_run(sweep, combination | member, seed)
                number = fingerprint(run.recipe)
                if number in by_recipe:
                    raise ToolmemError(
                        f"axes: {run.name} and {by_recipe[number].name} are the same recipe: a value of "
                        "an axis is written over by a later one, or a value is there twice"
                    )
                by_recipe[number] = run
    return list(by_recipe.values())


def make_run(sweep: SweepRecipe, settings: Mapping[str, Any], seed: int) -> Planned:
    """One run of a sweep.

    Args:
        sweep: what varies.
        settings: label by axis; a search's family is the axis ``member``.
        seed: of the run.

    Raises:
        ToolmemError: for a key that leads nowhere.
    """
    for key in OWN_KEYS:
        if key in sweep.base:
            raise ToolmemError(f"base.{key}: the sweep itself decides it, leave it out")
    recipe = copy.deepcopy(sweep.base)
    for axis in sweep.varying:
        if axis.name not in settings:
            continue
        place = f"axes.{axis.name}" if axis in sweep.axes else "search.family"
        for key, value in axis.values[settings[axis.name]].items():
            _set(recipe, key, copy.deepcopy(value), place)
    for key in sweep.seed_keys:
        set_key(recipe, key, seed)
    ordered = {axis.name: settings[axis.name] for axis in sweep.varying if axis.name in settings}
    return Planned(run_name(ordered, seed, fingerprint(recipe)), ordered, seed, recipe)


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
