from itertools import islice

import numpy as np
import pytest
import torch

from toolmem.data.recall import RecallGenerator
from toolmem.data.stream import make_loader
from toolmem.errors import ToolmemError


@pytest.mark.parametrize("fill", [True, False])
@pytest.mark.parametrize("vocab_size", [40, 4096])
def test_each_pair_is_asked_once_and_its_value_is_the_target(fill, vocab_size):
    generator = RecallGenerator(vocab_size, 32, 6, 50, random_non_queries=fill, seed=1)
    batch = generator.batch_at(3)
    assert batch.tokens.shape == (50, 32) and batch.n_tokens == 1600
    for tokens, targets, mask in zip(batch.tokens, batch.targets, batch.loss_mask, strict=True):
        told = dict(zip(tokens[0:12:2].tolist(), tokens[1:12:2].tolist(), strict=True))
        assert len(told) == 6 == len(set(told.values()))
        assert all(0 < key < vocab_size // 2 <= value < vocab_size for key, value in told.items())
        asked = mask.nonzero().flatten().tolist()
        assert all(place >= 12 and place % 2 == 0 for place in asked)
        assert {tokens[place].item(): targets[place].item() for place in asked} == told
        others = tokens[12:][~mask[12:]]
        assert others.any() == fill


def test_places_follow_the_power_law():
    """The same law drawn by numpy's own weighted choice without replacement, as the paper's code does."""
    seq_len, n_pairs, power_a = 64, 4, 0.3
    generator = RecallGenerator(256, seq_len, n_pairs, 4000, power_a=power_a)
    counts = generator.batch_at(0).loss_mask[:, 2 * n_pairs :: 2].double().mean(0).numpy()
    space = (seq_len - 2 * n_pairs) // 2
    p = power_a * np.arange(1, space + 1) ** (power_a - 1)
    p /= p.sum()
    rng = np.random.default_rng(0)
    reference = np.zeros(space)
    for _ in range(4000):
        reference[rng.choice(space, n_pairs, replace=False, p=p)] += 1 / 4000
    assert np.abs(counts - reference).max() < 5 * np.sqrt(0.25 / 4000) * 1.5
    assert counts[0] > 2 * counts[-1]


def test_batches_differ_ranks_share_and_resuming_continues(take):
    whole = RecallGenerator(128, 32, 4, 6, seed=9)
    everything = list(islice(make_loader(whole), 12))
    assert not torch.equal(everything[0].tokens, everything[1].tokens)
    halves = [RecallGenerator(128, 32, 4, 6, seed=9, rank=r, world_size=2) for r in (0, 1)]
    parts = [half.batch_at(4) for half in halves]
    assert torch.equal(
        torch.stack([p.tokens for p in parts], 1).flatten(0, 1), everything[4].tokens
    )
    resumed = RecallGenerator(128, 32, 4, 6, seed=9)
    resumed.load_state_dict(everything[6].state)
    for a, b in zip(take(make_loader(resumed, 2), 5), everything[7:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.loss_mask, b.loss_mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seq_len": 33}, "must be even"),
        ({"seq_len": 32, "n_pairs": 9}, "at least 4 x n_pairs"),
        ({"vocab_size": 64, "seq_len": 64}, "must exceed seq_len"),
        ({"batch_size": 1, "world_size": 2}, "smaller than 2 processes"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ToolmemError, match=message):
        RecallGenerator(**options)
