"""Capacity read off made-up results: numbers worked out by hand, a page of all figures, refusals."""

from __future__ import annotations

import csv
import io
import math

import pytest
from plot_toys import source_of, write_folder
from sweep_toys import row, sweep_with

from toolmem.analysis.capacity import called, capacity, grouped, held_by
from toolmem.analysis.capacity_plot import applies, panels
from toolmem.analysis.capacity_tables import capacity_table, law_table, said_of_marks, storage_table
from toolmem.analysis.page import Request, kinds, plot
from toolmem.errors import ToolmemError
from toolmem.sweeps import SweepRecipe

A_FACT = 8.0  # bits
SIZES = {4: 1000, 8: 2000, 12: 4000}
METRICS = [
    "knowledge/bits", "knowledge/entropy", "knowledge/loss", "knowledge/recall", "knowledge/facts",
    "knowledge/active_parameters", "knowledge/int8/bits", "knowledge/int8/loss",
    "knowledge/int8/recall", "knowledge/int8/stored_bits",
]  # fmt: skip


def written(**changes):
    experts = {"model.model.class_path": "toolmem.models.MoETransformer"}
    return sweep_with(
        **{
            "name": "toy",
            "axes": {
                "size": {"key": "model.model.dim", "values": list(SIZES)},
                "architecture": {"dense": {}, "4 experts": experts},
                "people": {"key": "data.people", "values": [25, 100, 400]},
                "exposures": {
                    1000: {"exposures": 1000, "data.batch_size": 128},
                    100: {"exposures": 100, "data.batch_size": 8},
                },
            },
            "seeds": 2,
            "metrics": METRICS,
            "report": {
                "metric": "knowledge/bits", "kind": "capacity", "x": "size", "line": "exposures",
                "panel": "architecture", "best_over": ["people"],
            },
        }
        | changes
    )  # fmt: skip


def learned(size, people, exposures, seed, experts=False):
    """Bits: all of the facts', or what a parameter holds: 1.5 after 1,000 exposures, else 0.5."""
    whole = 4 * people * A_FACT
    return min(whole, size * (1.5 if exposures == 1000 else 0.5) * (1 + 0.2 * seed))


def values(run):
    settings, people = run.settings, run.settings["people"]
    experts = settings["architecture"] != "dense"
    size = SIZES[settings["size"]] * (2 if experts else 1)
    whole = 4 * people * A_FACT
    bits = learned(size, people, settings["exposures"], run.seed)
    return {
        "params_total": size, "tokens": 1000, "flops": 6000.0 * SIZES[settings["size"]],
        "seconds": 3.0, "knowledge/bits": bits, "knowledge/entropy": whole,
        "knowledge/loss": (whole - bits) / (4 * people), "knowledge/recall": bits / whole,
        "knowledge/facts": 4.0 * people, "knowledge/active_parameters": float(size // (1 + experts)),
        "knowledge/int8/bits": 0.8 * bits, "knowledge/int8/loss": 1.0,
        "knowledge/int8/recall": 0.5, "knowledge/int8/stored_bits": 9.0 * size,
    }  # fmt: skip


def rows_of(sweep, **changes):
    from toolmem.sweeps import expand

    return [
        row(run.name, run.settings, seed=run.seed, steps=50)
        | {"recipe": run.recipe, "stopped": None}
        | values(run)
        | changes
        for run in expand(sweep)
    ]


@pytest.fixture(scope="module")
def source():
    sweep = SweepRecipe.parse(written(), "toy")
    return source_of(sweep, rows_of(sweep))


def test_a_record_for_each_run_and_format(source):
    held = held_by(source.rows)
    assert len(held) == 2 * len(source.rows) == 2 * 3 * 2 * 3 * 2 * 2
    one = next(
        h for h in held if h.place == (2000, 1600) and h.seed == 1 and h.architecture == "dense"
    )
    assert (one.setting, one.facts, one.exposures, one.architecture) == (
        "in_weight", 1600, 1000, "dense",
    )  # fmt: skip
    assert one.storage == "float32" and one.stored_bits == 32 * 2000 and one.params_active == 2000
    assert math.isclose(one.knowledge_bits, 2000 * 1.5 * 1.2)
    assert math.isclose(one.bits_per_parameter, 1.8) and one.tokens_trained == 1000
    rounded = held[held.index(one) + 1]
    assert rounded.storage == "int8" and rounded.stored_bits == 9 * 2000
    assert math.isclose(rounded.knowledge_bits, 0.8 * one.knowledge_bits)


def test_exposures_are_read_off_steps_where_the_recipe_does_not_say(source):
    """400 facts in batches of 128 are 4 steps an epoch."""
    old = next(r for r in source.rows if r["settings"]["people"] == 100)
    recipe = {key: value for key, value in old["recipe"].items() if key != "exposures"}
    (one, _) = held_by([old | {"recipe": recipe, "steps": 80}])
    assert one.exposures == 20
    (one, _) = held_by([old | {"steps": 200, "stopped": "recall reached"}])
    assert one.exposures == 50
    (one, _) = held_by([old | {"recipe": recipe, "steps": None}])
    assert one.exposures is None


def test_capacity_is_of_the_population_of_which_most_was_learned(source):
    held = [h for h in held_by(source.rows) if h.storage == "float32"]
    groups = grouped(held)
    assert [called(group, groups) for group in groups] == [
        "dense, 1,000 exposures", "4 experts, 1,000 exposures",
        "dense, 100 exposures", "4 experts, 100 exposures",
    ]  # fmt: skip
    best = capacity(groups["in_weight", 1000, "dense"])
    assert {size: runs[0].people for size, runs in best.items()} == {
        1000: 100,
        2000: 400,
        4000: 400,
    }
    assert all(len(runs) == 2 for runs in best.values())
    _, cells = capacity_table(held)
    assert cells[0] == [
        "dense", "1,000", "1,000", "1,000", "400", "3,200", "1,650 (1,500 to 1,800)",
        "1.65 (1.50 to 1.80)", "0.52", "2",
    ]  # fmt: skip
    said = said_of_marks(held)
    assert "Dense, 1,000 exposures: at most 1.65 bits per parameter" in said
    assert "1 reached." in said and "1 not reached, 2 neither" in said


def test_laws_are_those_of_the_data(source):
    held = [h for h in held_by(source.rows) if h.storage == "float32" and h.seed == 0]
    _, cells = law_table(held)
    power, linear = cells[:2]
    assert power[2] == "power" and power[3].startswith("1.5 [1.5, 1.5] · x^1 [1, 1]")
    assert linear[3].startswith("1.5 [1.5, 1.5] · x + ") and linear[4] == "1.000"
    _, cells = law_table([h for h in held if h.params_total == 1000])
    assert cells[0][3] == "too few runs with bits"


def test_storage_against_the_facts(source):
    _, cells = storage_table(held_by(source.rows))
    by_name = {line[0]: line for line in cells}
    assert list(by_name) == ["float32", "int8"]
    # 400 people, 12,800 bits in 4,000 parameters hold 1.65 each over seeds, of 32 bits stored
    assert by_name["float32"][1:] == ["32.0", "100%", "1.65", "0.052", "20.0"]
    assert by_name["int8"][1:] == ["9.0", "80%", "1.32", "0.147", "none"]


def test_the_csv_has_a_row_for_each_run_and_format(source):
    (panel,) = [p for p in panels(source, Request()) if p.name == "capacity"]
    lines = list(csv.DictReader(io.StringIO(panel.csv())))
    assert list(lines[0]) == [
        "setting", "people", "facts", "exposures", "architecture", "seed", "params_total",
        "params_active", "storage", "stored_bits", "entropy_bits", "knowledge_bits",
        "bits_per_parameter", "recall", "loss", "tokens_trained", "seconds",
    ]  # fmt: skip
    assert len(lines) == 2 * len(source.rows)


@pytest.mark.slow
def test_the_page_and_its_files(tmp_path):
    folder = write_folder(tmp_path / "toy", written(), values)
    files = plot(folder, tmp_path / "out", kind="capacity")
    names = (
        "capacity",
        "capacity_laws",
        "capacity_storage",
        "capacity_contours",
        "capacity_experts",
    )
    assert {path.name for path in files} == {"report.html", *(f"{name}.csv" for name in names)}
    page = (tmp_path / "out" / "report.html").read_text()
    for heading in (
        "Bits per parameter",
        "Laws",
        "Mixture of experts",
        "over parameters and facts",
    ):
        assert heading in page
    assert page.count("data:image/png") >= 4


def test_experts_are_told_by_total_and_active_parameters(source):
    (panel,) = [p for p in panels(source, Request()) if p.name == "capacity_experts"]
    lines = [line for line in panel.table[1] if line[:2] == ["4 experts", "2,000"]]
    # 25 people are 800 bits, known by all: the cell of most exposures and first facts is drawn
    assert lines == [
        [
            "4 experts",
            "2,000",
            "1,000",
            "2,000",
            "800 (800 to 800)",
            "0.40",
            "0.80",
            "100 of 100",
            "2",
        ]
    ]


def test_fewer_formats_sizes_and_architectures_make_fewer_figures(source):
    def names(rows):
        return [p.name for p in panels(source_of(source.recipe, rows), Request())]

    dense = [r for r in source.rows if r["settings"]["architecture"] == "dense"]
    assert names(dense)[-1] == "capacity_contours"
    one = [r for r in dense if r["settings"]["size"] == 4]
    assert names(one) == ["capacity", "capacity_laws", "capacity_storage"]
    line = [{**r, "knowledge/facts": r["params_total"] / 10} for r in dense]
    assert "capacity_contours" not in names(line)  # all on a line: there is nothing between
    plain = [{k: v for k, v in r.items() if "int8" not in k} for r in one]
    assert names(plain) == ["capacity", "capacity_laws"]
    nothing = [r | {"knowledge/bits": 0.0} for r in plain]
    assert names(nothing) == ["capacity", "capacity_laws"]


def test_what_cannot_be_drawn_is_refused(source):
    assert "capacity" in kinds()
    bare = [{k: v for k, v in r.items() if k != "knowledge/bits"} for r in source.rows]
    assert applies(source) and not applies(source_of(source.recipe, bare))
    with pytest.raises(ToolmemError, match=r"no run with knowledge/bits: .*KnowledgeProbe"):
        panels(source_of(source.recipe, bare), Request())
    lacking = [{k: v for k, v in r.items() if k != "knowledge/entropy"} for r in source.rows]
    with pytest.raises(ToolmemError, match="has no knowledge/entropy: list it among"):
        panels(source_of(source.recipe, lacking), Request())
