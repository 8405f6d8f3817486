"""The tables of capacity: what models hold, by size, exposures, storage format and architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolmem.analysis.capacity import (
    AS_TRAINED,
    FORMATS,
    MARKS,
    Held,
    at_places,
    called,
    capacity,
    grouped,
    mean,
)
from toolmem.analysis.pictures import finite
from toolmem.analysis.report import Table
from toolmem.analysis.scaling import LAWS, try_fit

Group = tuple[str, int | None, str]
NEARLY = 0.95  # of the facts' bits learned: all of them, for most purposes
FORWARD = 3  # training, forward and backward, is so many forward passes


def capacity_table(held: Sequence[Held]) -> Table:
    """The best population of each group and size."""
    heads = [
        "architecture", "exposures", "parameters", "active", "facts", "bits of facts", "bits learned",
        "per parameter", "recall", "seeds",
    ]  # fmt: skip
    cells = []
    for group, runs in grouped(held).items():
        for size, best in capacity(runs).items():
            cells.append(
                [
                    group[2], number(group[1]), f"{size:,}", f"{best[0].params_active:,}",
                    f"{best[0].facts:,}", f"{best[0].entropy_bits:,.0f}",
                    spread(best, "knowledge_bits", ",.0f"),
                    spread(best, "bits_per_parameter", ".2f"), f"{mean(best, 'recall'):.2f}", str(len(best)),
                ]
            )  # fmt: skip
    return heads, cells


def said_of_marks(held: Sequence[Held]) -> str:
    """Where 2 bits per parameter, and 1, are reached, and where they are not."""
    groups = grouped(held)
    words = []
    for group, runs in groups.items():
        best = max(capacity(runs).values(), key=lambda r: mean(r, "bits_per_parameter"))
        most = mean(best, "bits_per_parameter")
        reached = [f"{mark:g}" for mark in MARKS if most >= mark]
        verdict = (
            f"{' and '.join(reached)} reached"
            if reached
            else f"{MARKS[-1]:g} not reached, {MARKS[0]:g} neither"
        )
        words.append(
            f"{called(group, groups)}: at most {most:.2f} bits per parameter ({best[0].params_total:,} "
            f"parameters, {best[0].facts:,} facts of {best[0].entropy_bits:,.0f} bits), {verdict}."
        )
    return " ".join(word[0].upper() + word[1:] for word in words)


def law_table(held: Sequence[Held]) -> Table:
    """Laws of the bits that a model of a size learns at most, by group."""
    heads = ["architecture", "exposures", "law", "bits = f(parameters)", "R²", "runs"]
    cells = []
    for group, runs in grouped(held).items():
        best = [one for r in capacity(runs).values() for one in r]
        for law in LAWS:
            found = try_fit(law, [h.params_total for h in best], [h.knowledge_bits for h in best])
            said = ["too few runs with bits", "", str(len(best))]
            if found is not None:
                said = [found.formula(), f"{found.r2:.3f}", str(len(found.residuals))]
            cells.append([group[2], number(group[1]), law, *said])
    return heads, cells


def main_group(held: Sequence[Held]) -> Group:
    """The group with the most runs among those of the most exposures."""
    most = max(one.exposures or 0 for one in held)
    groups = grouped(one for one in held if (one.exposures or 0) == most)
    return max(groups, key=lambda group: len(groups[group]))


def by_format(held: Sequence[Held]) -> dict[str, list[Held]]:
    """The main group's records by storage format, the widest first."""
    group = main_group(held)
    found: dict[str, list[Held]] = {name: [] for name in FORMATS}
    for one in held:
        if one.group == group:
            found[one.storage].append(one)
    return {name: runs for name, runs in found.items() if runs}


def stored_per_fact_bit(runs: Sequence[Held]) -> float:
    """Bits in the weights for each bit of the facts."""
    return runs[0].stored_bits / runs[0].entropy_bits


def storage_table(held: Sequence[Held]) -> Table:
    """By format: what is left of the bits, and how near they come to the bits in the weights."""
    heads = [
        "storage", "bits a parameter", "kept of float32's bits", "at most learned per parameter",
        "at most learned per stored bit", f"least stored bits a fact bit at {NEARLY:.0%} learned",
    ]  # fmt: skip
    formats = by_format(held)
    whole = {
        place: mean(r, "knowledge_bits") for place, r in at_places(formats[AS_TRAINED]).items()
    }
    cells = []
    for storage, runs in formats.items():
        places = at_places(runs)
        kept = sum(mean(r, "knowledge_bits") for r in places.values())
        before = sum(whole.get(place, 0.0) for place in places)
        full = [
            stored_per_fact_bit(r)
            for r in places.values()
            if mean(r, "knowledge_bits") >= NEARLY * r[0].entropy_bits
        ]
        per_stored = max(mean(r, "knowledge_bits") / r[0].stored_bits for r in places.values())
        width = sum(r[0].stored_bits for r in places.values()) / sum(n for n, _ in places)
        most = max(mean(r, "bits_per_parameter") for r in places.values())
        cells.append(
            [
                storage, f"{width:.1f}", f"{kept / before:.0%}" if before else "", f"{most:.2f}",
                f"{per_stored:.3f}", f"{min(full):.1f}" if full else "none",
            ]
        )  # fmt: skip
    return heads, cells


def contour_table(held: Sequence[Held]) -> Table:
    """Recall and loss at each place."""
    heads = [
        "architecture",
        "exposures",
        "parameters",
        "facts",
        "recall",
        "loss, bits a fact",
        "seeds",
    ]
    cells = [
        [
            group[2], number(group[1]), f"{size:,}", f"{facts:,}", spread(runs, "recall", ".2f"),
            spread(runs, "loss", ".2f"), str(len(runs)),
        ]
        for group, members in grouped(held).items()
        for (size, facts), runs in at_places(members).items()
    ]  # fmt: skip
    return heads, cells


def experts_cell(held: Sequence[Held]) -> list[Held]:
    """The records at the facts and exposures where most architectures meet; none for one architecture."""
    cells: dict[tuple[Any, ...], list[Held]] = {}
    for one in held:
        if one.exposures is not None:
            cells.setdefault((one.setting, one.facts, one.exposures), []).append(one)
    best = max(cells.values(), key=lambda cell: (_kinds(cell), cell[0].exposures or 0), default=[])
    sparse = any(one.params_active < one.params_total for one in best)
    return best if sparse and _kinds(best) > 1 else []


def _kinds(cell: Sequence[Held]) -> int:
    return len({one.architecture for one in cell})


def inference_flops(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], float]:
    """FLOPs of a token in inference, by total and active parameters: a third of those in training.

    Args:
        rows: of a sweep's results.
    """
    found: dict[tuple[int, int], float] = {}
    for row in rows:
        if finite(row.get("flops")) and row.get("tokens"):
            active = row.get("knowledge/active_parameters") or row["params_total"]
            found[int(row["params_total"]), int(active)] = row["flops"] / row["tokens"] / FORWARD
    return found


def experts_table(cell: Sequence[Held], costs: Mapping[tuple[int, int], float]) -> Table:
    """Each model of a cell: what it holds, by all and by active parameters."""
    heads = [
        "architecture", "parameters", "active", "FLOPs a token", "bits learned", "per parameter",
        "per active parameter", "facts recalled", "seeds",
    ]  # fmt: skip
    cells = []
    for group, runs in grouped(cell).items():
        for (size, facts), here in at_places(runs).items():
            active = here[0].params_active
            cost = costs.get((size, active))
            bits = mean(here, "knowledge_bits")
            cells.append(
                [
                    group[2], f"{size:,}", f"{active:,}", "" if cost is None else f"{cost:,.0f}",
                    spread(here, "knowledge_bits", ",.0f"), f"{bits / size:.2f}", f"{bits / active:.2f}",
                    f"{mean(here, 'recall') * facts:,.0f} of {facts:,}", str(len(here)),
                ]
            )  # fmt: skip
    return heads, cells


def spread(runs: Sequence[Held], name: str, form: str) -> str:
    """The mean over seeds and, of several, the smallest and the largest."""
    values = [getattr(one, name) for one in runs]
    said = format(mean(runs, name), form)
    return said if len(values) < 2 else f"{said} ({min(values):{form}} to {max(values):{form}})"


def number(value: int | None) -> str:
    """A count as a cell."""
    return "unknown" if value is None else f"{value:,}"
