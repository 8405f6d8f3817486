import math

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.training import WSD, Constant, Cosine, InverseSqrt, Linear


def rates(schedule, total, steps):
    """The learning rates that an optimizer with lr 2 really takes."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule.build(optimizer, total)
    taken = []
    for _ in range(steps):
        taken.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return taken


def test_warm_up_rises_from_the_first_step_on():
    assert rates(Constant(warmup_steps=4), None, 6) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_linear():
    taken = rates(Linear(warmup_steps=2, final_fraction=0.5), 12, 13)
    assert taken[2] == 2.0
    assert taken[7] == pytest.approx(1.5)
    assert taken[12] == pytest.approx(1.0)


def test_cosine_equals_the_formula_of_the_paper():
    taken = rates(Cosine(warmup_steps=10, final_fraction=0.1), 110, 110)
    for t in range(10, 110):
        expected = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * (t - 10) / 100))
        assert taken[t] == pytest.approx(2 * expected)


def test_wsd_is_constant_then_falls_linearly_to_the_end():
    taken = rates(WSD(warmup_steps=5, decay_fraction=0.25), 100, 101)
    assert taken[5:76] == [2.0] * 71
    assert taken[75:101] == pytest.approx([2 * (1 - i / 25) for i in range(26)])


def test_inverse_sqrt_is_continuous_and_quarters():
    taken = rates(InverseSqrt(warmup_steps=25), None, 400)
    assert taken[24] == pytest.approx(2.0)
    assert taken[99] == pytest.approx(1.0)
    assert taken[399] == pytest.approx(0.5)


def test_a_schedule_with_an_end_asks_for_max_steps():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    for schedule in (Cosine(), Linear(), WSD()):
        with pytest.raises(ToolmemError, match=r"trainer\.max_steps"):
            schedule.build(optimizer, None)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cosine(warmup_steps=-1),
        lambda: WSD(decay_fraction=1.5),
        lambda: Linear(final_fraction=-0.1),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ToolmemError):
        make()


def test_a_run_shorter_than_its_warm_up_still_runs():
    assert rates(WSD(warmup_steps=50), 3, 3) == pytest.approx([0.04, 0.08, 0.12])


def test_state_is_plain_data():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    state = Cosine(warmup_steps=1).build(optimizer, 10).state_dict()
    assert state["lr_lambdas"] == [None]
