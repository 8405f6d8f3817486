"""Training that ends before its last step, and when it may be given up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_toys import ToyData, make_module, make_trainer

from toolmem.errors import ToolmemError
from toolmem.training import Checkpointing
from toolmem.training.callbacks import StopAt
from toolmem.training.callbacks.stopping import out_of_reach


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_it_goes_on_as_if_it_had_not_stopped(tmp_path):
    def trained(folder, callbacks, ckpt_path=None):
        torch.manual_seed(0)
        module = make_module()
        keeping = Checkpointing(every_n_steps=1000, monitor=None)
        trainer = make_trainer(
            tmp_path / folder, 8, callbacks=[*callbacks, keeping], enable_checkpointing=True
        )
        trainer.fit(module, ToyData(), ckpt_path=ckpt_path)
        return trainer.global_step, weights(module)

    steps, whole = trained("whole", [])
    assert steps == 8
    steps, part = trained("parts", [StopAt(3)])
    assert steps == 3
    assert any(not torch.equal(part[name], whole[name]) for name in whole)
    steps, again = trained("parts", [], tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert steps == 8
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_at_a_step_that_can_be():
    with pytest.raises(ToolmemError, match="step is 0"):
        StopAt(0)


def test_out_of_reach_by_hand():
    slow = [(100, 0.0), (200, 0.05), (300, 0.15), (400, 0.2)]  # at best 0.001 a step
    assert out_of_reach(slow, 0.95, 600, 0.5)  # 0.2 + 3 * 0.001 * 200 = 0.8
    assert not out_of_reach(slow, 0.95, 660, 0.5)  # 0.98
    assert not out_of_reach(slow, 0.75, 600, 0.5)
    assert not out_of_reach(slow, 0.95, 600, 0.7)  # not yet
    assert not out_of_reach(slow[1:], 0.95, 600, 0.5)  # too few rounds
    falling = [(100, 0.6), (200, 0.4), (300, 0.3), (400, 0.2)]
    assert out_of_reach(falling, 0.95, 700, 0.5)
    assert not out_of_reach(falling, 0.6, 700, 0.5)  # it was there before
    assert not out_of_reach([], 0.95, 700, 0.5)


@given(
    st.lists(st.floats(0, 1), min_size=4, max_size=12),
    st.floats(0.05, 0.95),
)
def test_what_goes_on_at_its_fastest_rate_is_never_given_up(values, goal):
    """A run that rises to its goal by the last step, never faster than it did before."""
    measured = [(100 * (i + 1), value) for i, value in enumerate(values)]
    step, last = measured[-1]
    rate = max(0.0, *(b - a for a, b in pairwise(values))) / 100
    for rest in (100, 500, 2000):
        if last + rate * rest >= goal:
            assert not out_of_reach(measured, goal, step + rest, 0.01)
