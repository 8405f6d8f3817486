"""What a few steps cost, watched."""

import csv
import json

import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

from toolmem.errors import ToolmemError
from toolmem.training.callbacks import Profiling
from toolmem.training.callbacks.profiling import WAITING, Operation, summary


def profiled(folder, steps=3, max_steps=8, **options):
    module = make_module(**options)
    make_trainer(folder, max_steps, callbacks=[Profiling(steps)]).fit(module, ToyData())
    return module


def test_a_trace_a_table_and_a_paragraph(tmp_path):
    profiled(tmp_path, fused=False)
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    with (tmp_path / "profile" / "operations.csv").open() as file:
        rows = list(csv.DictReader(file))
    times = [float(row["milliseconds"]) for row in rows]
    assert times == sorted(times, reverse=True)
    by_name = {row["operation"]: row for row in rows}
    assert by_name["aten::mm"]["kind"] == "matmuls"
    step = next(row for name, row in by_name.items() if name.startswith("Optimizer.step"))
    assert (step["kind"], step["calls"]) == ("optimizer", "1")
    text = (tmp_path / "profile" / "summary.txt").read_text()
    assert text.startswith("A step took ") and "the mean of 3" in text
    assert "% in matmuls" in text and "The process held" in text


def test_training_goes_on_as_if_nobody_had_watched(tmp_path):
    watched = profiled(tmp_path)
    plain = make_module()
    make_trainer(tmp_path, 8).fit(plain, ToyData())
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_paragraph_adds_up():
    operations = [
        Operation("aten::mm", 10, 5.0, 0),
        Operation("aten::_scaled_dot_product_flash_attention_for_cpu", 2, 2.0, 0),
        Operation("aten::mul", 3, 1.0, 0),
        Operation(WAITING, 1, 0.5, 0),
        Operation("aten::nll_loss_forward", 1, 0.02, 0),
    ]
    text = summary(operations, 4, 0.04, "the process held 1.00 GB at most")
    assert text == (
        "A step took 10.0 ms while it was watched, the mean of 4: 50 % in matmuls, 20 % in attention, "
        "10 % in other operations, 5 % waiting for data, 15 % outside of operations (Python, Lightning, the "
        "profiler). The costliest operations of a step: aten::mm (5.00 ms in 10 calls), "
        "aten::_scaled_dot_product_flash_attention_for_cpu (2.00 ms in 2 calls), aten::mul (1.00 ms in 3 "
        "calls). The process held 1.00 GB at most."
    )


def test_more_steps_than_there_are_left_are_refused(tmp_path):
    with pytest.raises(ToolmemError, match=r"3 steps after the first 3 are more than the 5"):
        profiled(tmp_path, max_steps=5)
    with pytest.raises(ToolmemError, match="1 or more"):
        Profiling(0)


def test_a_run_that_fails_lets_go_of_the_profiler(tmp_path, monkeypatch):
    module = make_module(fused=False)
    steps = iter(range(100))
    step = module.training_step

    def failing(*args):
        if next(steps) == 4:
            raise ValueError("in the midst")
        return step(*args)

    monkeypatch.setattr(module, "training_step", failing)
    with pytest.raises(ValueError, match="in the midst"):
        make_trainer(tmp_path, 8, callbacks=[Profiling(3)]).fit(module, ToyData())
    assert not (tmp_path / "profile").exists()
    assert not torch.autograd._profiler_enabled()
    profiled(tmp_path)  # another can be made
