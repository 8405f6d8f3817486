import json
from itertools import islice

import pytest
import torch

from toolmem.data.modules.recall import RecallDataModule
from toolmem.errors import ToolmemError


def make(**options):
    return RecallDataModule(**({"vocab_size": 100, "seq_len": 32, "n_pairs": 4} | options))


def test_batches_and_validation():
    data = make(batch_size=5, val_batches=3)
    assert data.vocab_size == 100 and data.seq_len == 32
    assert json.loads(json.dumps(data.checkpoint_info()))["tokenizer"]["vocab_size"] == 100
    train = list(islice(data.train_dataloader(), 50))
    assert all(b.tokens.shape == (5, 32) for b in train)
    val = list(data.val_dataloader())
    assert len(val) == len(data.val_dataloader()) == 3
    again = list(data.val_dataloader())
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(val, again, strict=True))
    rows = {tuple(row) for b in train for row in b.tokens.tolist()}
    assert not rows & {tuple(row) for b in val for row in b.tokens.tolist()}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming(num_workers, take):
    data = make(num_workers=num_workers)
    everything = take(data.train_dataloader(), 12)
    data.consumed(everything[4].state)
    resumed = make(num_workers=num_workers)
    resumed.load_state_dict(json.loads(json.dumps(data.state_dict())))
    for a, b in zip(take(resumed.train_dataloader(), 7), everything[5:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
    other = make(n_pairs=5)
    other.load_state_dict(data.state_dict())
    with pytest.raises(
        ToolmemError, match=r"data.init_args.n_pairs is 5, the checkpoint's run had 4"
    ):
        other.train_dataloader()


def test_mistakes_are_told():
    with pytest.raises(ToolmemError, match="at least 4 x n_pairs"):
        make(n_pairs=9)
    with pytest.raises(ToolmemError, match="val_batches"):
        make(val_batches=0)
