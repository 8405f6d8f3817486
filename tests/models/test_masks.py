"""Masks against a brute-force reading of their definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.models.masks import cache_mask, causal_mask, document_mask, document_positions

RUNS = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6)


def ids_of(runs):
    """Adjacent runs of ids, made distinct so that a document is one run."""
    ids = [number * 10 + kind for number, (kind, length) in enumerate(runs) for _ in range(length)]
    return torch.tensor([ids], dtype=torch.int32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RUNS)
def test_document_mask(runs):
    documents = ids_of(runs)
    mask = document_mask(documents)
    n = documents.shape[1]
    assert mask.shape == (1, 1, n, n)
    for query in range(n):
        for key in range(n):
            allowed = key <= query and documents[0, key] == documents[0, query]
            assert bool(mask[0, 0, query, key]) == bool(allowed)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(RUNS)
def test_document_positions(runs):
    expected = [position for _, length in runs for position in range(length)]
    assert document_positions(ids_of(runs))[0].tolist() == expected


def test_causal_and_cache_masks_agree():
    assert torch.equal(cache_mask(torch.arange(7)[None], 7)[0, 0], causal_mask(7))
    mask = cache_mask(torch.tensor([[2, 3], [0, 1]]), 5)[:, 0].int().tolist()
    assert mask == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]]
