"""FlexAttention's path gives what torch's own kernel gives with the materialised mask."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.models import Transformer, flex
from toolmem.models.masks import attention_mask

RUNS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def runs(lengths, rows):
    """Ids of adjacent runs, in each row begun elsewhere."""
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([ids.roll(row) for row in range(rows)])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=RUNS, spanned=st.booleans(), blocked=st.booleans(), window=st.integers(0, 7))
def test_the_rule_is_the_materialised_mask(lengths, spanned, blocked, window):
    ids = runs(lengths, 2)
    seq = ids.shape[1]
    documents = ids // 3 if blocked else None
    spans = torch.where(ids % 2 == 0, ids, -1) if spanned else None
    rule = flex.mask_rule(documents, spans, window)
    index = torch.arange(seq)
    found = rule(torch.arange(2)[:, None, None], None, index[:, None], index)
    mask = attention_mask(index, documents=documents, spans=spans, window=window)
    expected = (index[:, None] >= index) if mask is None else mask
    assert torch.equal(found.expand(2, seq, seq), expected.expand(2, 1, seq, seq)[:, 0])


OPTIONS = {
    "gqa": {"n_heads": 4, "n_kv_heads": 2},
    "softcap": {"attention_softcap": 2.0},
    "window": {"window": [20, 0]},
    "mla": {"attention": "mla"},
}


def long_row():
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(30, (2, 150), generator=generator)
    documents = torch.tensor([[0] * 140 + [1] * 10, [0] * 7 + [1] * 90 + [2] * 53])
    spans = torch.full_like(x, -1)
    spans[0, :130], spans[1, 10:60], spans[1, 70:80] = 0, 0, 1
    return x, {"none": {}, "documents": {"documents": documents}, "spans": {"spans": spans}}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), queries=st.integers(1, 9), keys=st.integers(1, 140), rows=st.integers(1, 3))
def test_a_materialised_mask_as_a_rule(data, queries, keys, rows):
    seed = data.draw(st.integers(0, 1000))
    mask = torch.rand(rows, 1, queries, keys, generator=torch.Generator().manual_seed(seed)) < 0.5
    found = flex.from_mask(mask).mask_mod
    index = [torch.arange(n) for n in (rows, queries, keys)]
    got = found(index[0][:, None, None], None, index[1][:, None], index[2])
    assert torch.equal(got, mask[:, 0])


@pytest.mark.parametrize("given", ["none", "documents", "spans"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_a_model_by_either_kernel(options, given):
    """More than one block of 128, on the CPU, where FlexAttention has a forward only."""
    torch.manual_seed(0)
    keys = {"n_heads": 2, "max_seq_len": 160, "attention_mask": "prefix", "dim": 32} | options
    model = Transformer(30, n_layers=2, **keys).eval()
    x, ways = long_row()
    expected = model(x, **ways[given])
    model.attention_kernel = "flex"
    calls = []
    original = flex.attend
    try:
        flex.attend = lambda *arguments: calls.append(1) or original(*arguments)
        found = model(x, **ways[given])
    finally:
        flex.attend = original
    assert len(calls) == 2
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.slow
@torch.no_grad()
def test_compiled():
    torch.manual_seed(0)
    model = Transformer(30, 32, 1, 2, max_seq_len=160, attention_mask="prefix").eval()
    x, ways = long_row()
    expected = model(x, **ways["spans"])
    model.attention_kernel = "flex"
    found = torch.compile(model.hidden)(x, **ways["spans"])
    torch.testing.assert_close(model.logits(found), expected, atol=1e-5, rtol=0)
