import pytest
import torch

from toolmem.training.metrics import TokenCount, TokenMean, restore_state, saved_state


def test_every_token_weighs_the_same():
    metric = TokenMean()
    metric.update(torch.tensor(6.0), 3)
    metric.update(torch.tensor(2.0), 1)
    metric.update(torch.tensor(0.0), 0)
    assert metric.compute().item() == 2.0
    metric.reset()
    metric.update(torch.tensor(1.0), 2)
    assert metric.compute().item() == 0.5


def test_sums_do_not_lose_small_losses_after_many_tokens():
    metric = TokenMean()
    metric.update(torch.tensor(2.0**30), 1)
    metric.update(torch.tensor(1.0), 0)
    assert metric.compute().item() == 2.0**30 + 1


def test_state_is_plain_and_counts_once_over_ranks():
    metric = TokenCount()
    metric.update(10)
    state = saved_state(metric)
    assert state == {"count": 10}
    ranks = [TokenCount() for _ in range(3)]
    for rank, restored in enumerate(ranks):
        restore_state(restored, state, rank)
        restored.update(1)
    assert sum(int(r.compute()) for r in ranks) == 13


def test_an_empty_mean_is_no_number():
    metric = TokenMean()
    metric.update(torch.tensor(0.0), 0)
    assert metric.compute().item() == pytest.approx(float("nan"), nan_ok=True)
