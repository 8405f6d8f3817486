"""``toolmem evaluate --compare A.json B.json``: two models on the same questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolmem.console import stdout
from toolmem.errors import ToolmemError
from toolmem.files import write_json


def compare_results(first: str, second: str, out: str | None = None) -> None:
    """Compare two files of results: of each part that both have, every measure, example by example.

    Differences are the second's number less the first's, with 95 % intervals by the paired bootstrap and, of
    what is right or wrong, McNemar's exact test.

    Args:
        first: results of toolmem evaluate --out, with their answers beside.
        second: the same of another model.
        out: a JSON file for the differences.
    """
    from rich.table import Table

    from toolmem.evaluation.measures import compare
    from toolmem.evaluation.suite import measures_of, units

    sides = [_parts(Path(first)), _parts(Path(second))]
    shared = [name for name in sides[0] if name in sides[1]]
    if not shared:
        raise ToolmemError(
            f"{first} ({', '.join(sides[0]) or 'nothing'}) and {second} ({', '.join(sides[1]) or 'nothing'}) "
            "have no part in common: evaluate both by the same --tasks"
        )
    found: dict[str, Any] = {}
    table = Table(title=f"{Path(second).name} less {Path(first).name} (95 % interval)")
    for column in (
        "part",
        "measure",
        "first",
        "second",
        "difference",
        "p (McNemar, else bootstrap)",
    ):
        table.add_column(column, justify="left" if column in ("part", "measure") else "right")
    for name in shared:
        one, two = sides[0][name], sides[1][name]
        if (one["kind"], one["asked"]) != (two["kind"], two["asked"]):
            raise ToolmemError(
                f"{name}: {first} and {second} were not asked the same (other rows, recipe, examples or "
                "window): evaluate both alike"
            )
        rows = [units(sorted(side["rows"], key=_place)) for side in (one, two)]
        found[name] = {}
        for measure in measures_of(one["kind"]):
            apart = compare(measure, *rows)
            found[name][measure.name] = apart.as_dict()
            p = apart.p_bootstrap if apart.p_mcnemar is None else apart.p_mcnemar
            table.add_row(
                name,
                measure.name,
                f"{apart.first:.4g}",
                f"{apart.second:.4g}",
                f"{apart.value:+.4g} ({apart.low:+.4g} – {apart.high:+.4g})",
                f"{p:.2g}",
            )
        table.add_section()
    stdout().print(table)
    if out is not None:
        write_json(out, {"first": first, "second": second, "differences": found})


def _place(row: Mapping[str, Any]) -> tuple[int, ...]:
    return (row["document"], row["start"]) if "document" in row else (row["line"],)


def _parts(path: Path) -> dict[str, dict[str, Any]]:
    """The parts of a file of results, each with its rows."""
    from toolmem.evaluation.answers import digest_of, read_answers

    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        tasks = dict(results.get("tasks", {}))
        found: dict[str, dict[str, Any]] = {}
        for name, part in tasks.items():
            about, rows = read_answers(path.with_name(part["answers"]))
            if len(rows) != part["examples"] or about["asked"] != part["asked"]:
                raise ToolmemError(
                    f"{path.with_name(part['answers'])} is not of {path}: evaluate again"
                )
            found[name] = {"kind": part["kind"], "asked": part["asked"], "rows": rows}
        if "recall" in results:
            _, rows = read_answers(path.with_name(f"{path.stem}.answers.jsonl"))
            for split in results["recall"]:
                mine = [row for row in rows if row["split"] == split]
                # One fact may be asked in other words, with a tool or without.
                facts = digest_of(
                    json.dumps([row["attribute"], row["person"], row["expected"]]) for row in mine
                )
                own = [
                    {"line": n, "scores": {"exact_match": int(row["correct"])}}
                    for n, row in enumerate(mine)
                ]
                found[f"recall/{split}"] = {"kind": "recall", "asked": facts, "rows": own}
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ToolmemError(
            f"{path} is no file of results that this version reads ({error!r:.120}): write one by toolmem "
            "evaluate --out"
        ) from error
