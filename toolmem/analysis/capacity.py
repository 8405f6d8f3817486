"""What a sweep's runs hold in bits: one record a run and storage format, and what is read off them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from statistics import fmean
from typing import Any

from toolmem.analysis.pictures import finite
from toolmem.errors import ToolmemError
from toolmem.recipe_files import get_key

BITS = "knowledge/bits"
AS_TRAINED = "float32"
FLOAT32_BITS = 32
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int3", "int2")
MARKS = (2.0, 1.0)  # bits per parameter that arXiv 2404.05405 found after 1,000 and 100 exposures


@dataclass(frozen=True)
class Held:
    """What one run's weights hold of their facts, as one storage format leaves them.

    Args:
        setting: ``in_weight`` or ``in_tool``.
        people: told about; None for a table.
        facts: of theirs.
        exposures: how often each was seen, on the mean; None where the recipe does not tell.
        architecture: the label of the axis of this name; the model's class where there is none.
        seed: of the run.
        params_total: parameters.
        params_active: those that one token uses.
        storage: the format.
        stored_bits: that it takes.
        entropy_bits: of the facts.
        knowledge_bits: learned, at least.
        bits_per_parameter: of all parameters.
        recall: share of facts whose every token is the likeliest.
        loss: bits that a fact costs.
        tokens_trained: tokens seen in training.
        seconds: of the run.
    """

    setting: str
    people: int | None
    facts: int
    exposures: int | None
    architecture: str
    seed: int
    params_total: int
    params_active: int
    storage: str
    stored_bits: int
    entropy_bits: float
    knowledge_bits: float
    bits_per_parameter: float
    recall: float
    loss: float
    tokens_trained: int | None
    seconds: float | None

    @property
    def group(self) -> tuple[str, int | None, str]:
        """Setting, exposures and architecture: runs that differ in size and facts alone."""
        return self.setting, self.exposures, self.architecture

    @property
    def place(self) -> tuple[int, int]:
        """Parameters and facts."""
        return self.params_total, self.facts


COLUMNS = [field.name for field in fields(Held)]


def records(held: Sequence[Held]) -> tuple[list[str], list[list[Any]]]:
    """Heads and rows of ``capacity.csv``."""
    return COLUMNS, [list(astuple(one)) for one in held]


def held_by(rows: Iterable[Mapping[str, Any]]) -> list[Held]:
    """A record for each run that measured knowledge, and each format that it kept.

    Args:
        rows: of a sweep's results.
    """
    found = []
    for row in rows:
        if not finite(row.get(BITS)):
            continue
        formats = {
            match[1] for name in row if (match := re.fullmatch(r"knowledge/(\w+)/bits", name))
        }
        for storage in (AS_TRAINED, *(f for f in FORMATS if f in formats and f != AS_TRAINED)):
            prefix = "knowledge" if storage == AS_TRAINED else f"knowledge/{storage}"
            if finite(row.get(f"{prefix}/bits")):
                found.append(_held(row, storage, prefix))
    return found


def _held(row: Mapping[str, Any], storage: str, prefix: str) -> Held:
    recipe = row["recipe"]
    settings = row["settings"]
    size = int(row["params_total"])
    active = row.get("knowledge/active_parameters")
    facts = int(_needed(row, "knowledge/facts"))
    stored = FLOAT32_BITS * size
    if storage != AS_TRAINED:
        stored = int(_needed(row, f"{prefix}/stored_bits"))
    path = str(get_key(recipe, "model.model.class_path", "model"))
    people = get_key(recipe, "data.people")
    bits = float(row[f"{prefix}/bits"])
    return Held(
        setting=str(get_key(recipe, "data.setting", "in_weight")),
        people=people if isinstance(people, int) else None,
        facts=facts,
        exposures=_exposures(row, facts),
        architecture=str(settings.get("architecture", path.rpartition(".")[2])),
        seed=int(row["seed"]),
        params_total=size,
        params_active=size if active is None else int(active),
        storage=storage,
        stored_bits=stored,
        entropy_bits=float(_needed(row, "knowledge/entropy")),
        knowledge_bits=bits,
        bits_per_parameter=bits / size,
        recall=float(_needed(row, f"{prefix}/recall")),
        loss=float(_needed(row, f"{prefix}/loss")),
        tokens_trained=row.get("tokens"),
        seconds=row.get("seconds"),
    )


def _needed(row: Mapping[str, Any], name: str) -> Any:
    if row.get(name) is None:
        raise ToolmemError(
            f"metrics: {row['name']} has no {name}: list it among the sweep's metrics, and train again"
        )
    return row[name]


def _exposures(row: Mapping[str, Any], facts: int) -> int | None:
    """As the recipe says, or by its steps; of a run that ended early, as far as it came."""
    recipe = row["recipe"]
    asked = recipe.get("exposures")
    if isinstance(asked, int) and row.get("stopped") is None:
        return asked
    batch, steps = get_key(recipe, "data.batch_size", 128), row.get("steps")
    if not steps or get_key(recipe, "data.templates") or get_key(recipe, "data.held_out"):
        return None
    return round(steps / -(-facts // batch))


def grouped(held: Iterable[Held]) -> dict[tuple[str, int | None, str], list[Held]]:
    """Records by group, the most exposures first."""
    found: dict[tuple[str, int | None, str], list[Held]] = {}
    for one in sorted(held, key=lambda h: (h.setting, -(h.exposures or 0))):
        found.setdefault(one.group, []).append(one)
    return found


def at_places(held: Iterable[Held]) -> dict[tuple[int, int], list[Held]]:
    """Records by parameters and facts, seeds together."""
    found: dict[tuple[int, int], list[Held]] = {}
    for one in sorted(held, key=lambda h: h.place):
        found.setdefault(one.place, []).append(one)
    return found


def capacity(held: Iterable[Held]) -> dict[int, list[Held]]:
    """By parameters, the runs of the population of which a model of this size has learned most.

    What a model can hold shows where there is more to learn than it holds; with few facts it has soon
    learned them all. By the mean over seeds.

    Args:
        held: of one group and one format.
    """
    best: dict[int, list[Held]] = {}
    for (size, _), runs in at_places(held).items():
        if size not in best or mean(runs, "knowledge_bits") > mean(best[size], "knowledge_bits"):
            best[size] = runs
    return best


def mean(runs: Sequence[Held], name: str) -> float:
    """Of one column over runs."""
    return fmean(getattr(one, name) for one in runs)


def called(group: tuple[str, int | None, str], groups: Iterable[tuple[Any, ...]]) -> str:
    """A group in as many words as tell it from the others.

    Args:
        group: to be named.
        groups: all of them.
    """
    setting, exposures, architecture = group
    several = [len(set(values)) > 1 for values in zip(*groups, strict=True)]
    words = [setting.replace("_", " ")] if several[0] else []
    words += [architecture] if several[2] else []
    words += ["exposures unknown" if exposures is None else f"{exposures:,} exposures"]
    return ", ".join(words)
