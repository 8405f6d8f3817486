"""Training in two and four processes is training in one: losses and weights, step by step.

Each number of processes is started once and runs all of its cases in one process group.
"""

import pytest
import torch
from parallel_cases import MODELS, Case, run_cases, train

from toolmem import checkpoints

# The first test of each fixture starts the processes; on a busy machine they wait for each other.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

ARCHITECTURES = ("transformer", "moe", "mamba2", "mingru", "hybrid")
FEW = {"steps": 4, "wide": True}  # options of an architecture: float64 shows what is wrong at once
TWO = [
    *(Case(name, 2, 1, "ddp") for name in ARCHITECTURES),
    *(Case(name, 2, 1, "split") for name in ARCHITECTURES),
    *(Case(name, 1, 2, "split") for name in ARCHITECTURES),
    Case("transformer", 2, 1, "ddp", "muon", wide=True),
    Case("transformer", 2, 1, "split", "muon", wide=True),
    Case("transformer", 1, 2, "split", "muon", wide=True),
    Case("plain", 1, 2, "split", sequence=True),
    Case("value_residual", 2, 1, "ddp", **FEW),
    Case("gqa_tied", 2, 1, "ddp", lora=True, **FEW),
]
FOUR = [
    *(Case(name, 2, 2, "split") for name in ARCHITECTURES),
    *(Case(name, 2, 2, "split", **FEW) for name in MODELS if name not in ARCHITECTURES),
    *(Case(name, 2, 2, "split", "muon", **FEW) for name in ("transformer", "moe", "rglru")),
    *(Case(name, 2, 2, "split", probes=True, **FEW) for name in ("hybrid", "gqa_tied")),
    Case("hybrid_rows", 2, 2, "split", sequence=True, **FEW),
    Case("mamba2_groups", 1, 4, "split", "muon", **FEW),
    Case("moe", 4, 1, "split", "muon", **FEW),
]


RESUMED = [("transformer", "adamw"), ("moe", "muon")]  # in four processes, and by what


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run_cases(TWO, 2, str(tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def four(tmp_path_factory, files):
    cases = list(FOUR)
    for name, by in RESUMED:
        train(Case(name, optimizer=by, keep=str(files / f"{name}-one"), **FEW))
        split = {"data": 2, "tensor": 2, "strategy": "split", "optimizer": by, **FEW}
        cases.append(Case(name, keep=str(files / f"{name}-four"), **split))
        cases.append(Case(name, begin=str(files / f"{name}-one" / "step_2.ckpt"), **split))
    return run_cases(cases, 4, str(tmp_path_factory.mktemp("four")))


@pytest.fixture(scope="module")
def alone():
    known = {}

    def of(case):
        key = case.alone.name, case.steps, case.wide
        if key not in known:
            known[key] = train(case.alone)
        return known[key]

    return of


def same(case, found, expected):
    bound = 1e-9 if case.wide else 1e-5
    taken = case.steps - (2 if case.begin else 0)
    assert len(found.losses) == taken
    assert found.losses == pytest.approx(expected.losses[-taken:], abs=bound, rel=0)
    assert found.losses[-1] < found.losses[0]
    assert found.tokens == expected.tokens
    assert found.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(
            found.weights[name], value, atol=bound, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", TWO, ids=lambda case: case.name)
def test_two_processes_train_as_one(two, alone, case):
    same(case, two[case.name], alone(case))


@pytest.mark.parametrize("case", FOUR, ids=lambda case: case.name)
def test_four_processes_train_as_one(four, alone, case):
    same(case, four[case.name], alone(case))


@pytest.mark.parametrize("name", ["hybrid", "gqa_tied"])
def test_norms_and_flops_are_those_of_the_whole_model(four, alone, name):
    case = Case(name, 2, 2, "split", probes=True, **FEW)
    found, expected = four[case.name].figures, alone(case).figures
    assert found.keys() == expected.keys()
    assert any(key.startswith("norms/dead_units/blocks") for key in expected)
    for key, value in expected.items():
        if key == "flops/executed_total":  # reckoned by plain attention where the model is split
            assert found[key] == pytest.approx(value, rel=0.05)
        elif key == "flops/optimizer":  # processes that share layers each update what both have
            assert value < found[key] < 2 * value
        else:
            assert found[key] == pytest.approx(value, rel=1e-6), key


@pytest.mark.parametrize(("name", "by"), RESUMED)
def test_a_file_of_one_process_is_gone_on_from_in_four(four, alone, name, by):
    case = Case(name, 2, 2, "split", by, begin="step_2.ckpt", **FEW)
    same(case, four[case.name], alone(case))


@pytest.mark.parametrize(("name", "by"), RESUMED)
def test_a_file_of_four_processes_is_gone_on_from_in_one(four, alone, files, name, by):
    file = files / f"{name}-four" / "step_2.ckpt"
    case = Case(name, optimizer=by, begin=str(file), **FEW)
    same(case, train(case), alone(case))
    saved = checkpoints.read(file)
    usual = checkpoints.read(files / f"{name}-one" / "step_2.ckpt")
    assert saved["toolmem"] == usual["toolmem"]
    assert saved["state_dict"].keys() == usual["state_dict"].keys()
    for key, value in usual["state_dict"].items():
        torch.testing.assert_close(saved["state_dict"][key], value, atol=1e-9, rtol=0)
