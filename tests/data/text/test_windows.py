import numpy as np
import pytest
import torch

from toolmem.data.stream import make_loader
from toolmem.data.text.windows import WindowGenerator
from toolmem.errors import ToolmemError

TOKENS = np.arange(1, 1004, dtype=np.uint16)  # a token is its own position + 1


def test_an_epoch_is_disjoint_windows_in_random_order():
    generator = WindowGenerator(TOKENS, 10, 8, seed=2)
    offsets = set()
    for epoch in range(5):
        first = epoch * generator.batches_per_epoch
        batches = [generator.batch_at(first + i) for i in range(generator.batches_per_epoch)]
        tokens = torch.cat([b.tokens for b in batches])
        assert torch.equal(torch.cat([b.targets for b in batches]), tokens + 1)
        assert (tokens[:, 1:] == tokens[:, :-1] + 1).all()
        flat = tokens.flatten().tolist()
        assert len(set(flat)) == len(flat) > 900
        starts = tokens[:, 0].tolist()
        assert starts != sorted(starts)
        offsets.add(starts[0] % 10)
        assert all(b.loss_mask.all() and b.n_tokens == 80 and len(b) == 8 for b in batches)
    assert len(offsets) > 1


@pytest.mark.parametrize("n", [11, 12, 21, 999, 1000, 1001])
def test_in_order_every_token_is_a_target_once(n):
    generator = WindowGenerator(TOKENS[:n], 10, 8, shuffle=False)
    batches = [generator.batch_at(i) for i in range(generator.batches_per_epoch)]
    targets = torch.cat([b.targets[b.loss_mask] for b in batches])
    inputs = torch.cat([b.tokens[b.loss_mask] for b in batches])
    assert targets.tolist() == TOKENS[1:n].tolist()
    assert inputs.tolist() == TOKENS[: n - 1].tolist()
    for batch in batches:
        assert not batch.tokens[~batch.loss_mask].any()
        assert not batch.targets[~batch.loss_mask].any()
    assert sum(b.n_tokens for b in batches) == n - 1


@pytest.mark.parametrize("shuffle", [True, False])
def test_ranks_share_each_batch(shuffle):
    whole = WindowGenerator(TOKENS, 10, 8, shuffle=shuffle)
    ranks = [WindowGenerator(TOKENS, 10, 8, shuffle=shuffle, rank=r, world_size=2) for r in (0, 1)]
    for index in (0, 5, whole.batches_per_epoch - 1, whole.batches_per_epoch):
        parts = [rank.batch_at(index) for rank in ranks]
        together = sorted(row for part in parts for row in part.tokens[part.loss_mask].tolist())
        all_of_it = whole.batch_at(index)
        assert together == sorted(all_of_it.tokens[all_of_it.loss_mask].tolist())


def test_a_rank_without_a_share_gets_padding():
    rank = WindowGenerator(TOKENS[:15], 10, 8, shuffle=False, rank=3, world_size=4)
    batch = rank.batch_at(0)
    assert batch.tokens.shape == (1, 10)
    assert not batch.loss_mask.any() and batch.n_tokens == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_the_second_epoch(num_workers, take):
    def make():
        return WindowGenerator(TOKENS, 10, 8, seed=1)

    stop = make().batches_per_epoch + 5
    everything = take(make_loader(make(), num_workers), stop + 6)
    assert everything[stop - 1].state["epoch"] == 1
    resumed = make()
    resumed.load_state_dict(everything[stop - 1].state)
    after = take(make_loader(resumed, num_workers), 6)
    for a, b in zip(after, everything[stop:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert a.state == b.state


def test_documents_are_numbered_within_rows():
    numbers = np.repeat(np.arange(101), 10)[: len(TOKENS)]
    batch = WindowGenerator(TOKENS, 16, 70, numbers=numbers, shuffle=False).batch_at(0)
    assert batch.documents[0].tolist() == [0] * 10 + [1] * 6
    assert batch.documents[1].tolist() == [0] * 4 + [1] * 10 + [2] * 2
    assert ((batch.documents == -1) == ~batch.loss_mask).all()


def test_too_little_text_is_told():
    with pytest.raises(ToolmemError, match=r"the file has 12 tokens, too few .* seq_len 10"):
        WindowGenerator(TOKENS[:12], 10, 8, source="the file")
    with pytest.raises(ToolmemError, match="shared by 9 processes"):
        WindowGenerator(TOKENS, 10, 8, world_size=9)
