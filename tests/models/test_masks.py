"""Masks against a brute-force reading of their definition."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.models.masks import (
    attention_mask,
    causal_mask,
    document_mask,
    document_positions,
    ring_mask,
)

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


def brute_force(positions, key_positions, spans, key_spans, documents, window):
    """One entry after another, as the words say it."""
    rows = []
    for q, position in enumerate(positions):
        row = []
        for k, key_position in enumerate(key_positions):
            seen = key_position <= position
            if spans is not None and spans[q] >= 0 and spans[q] == key_spans[k]:
                seen = True
            if window and abs(position - key_position) >= window:
                seen = False
            if documents is not None and documents[q] != documents[k]:
                seen = False
            row.append(seen and key_position >= 0)
        rows.append(row)
    return torch.tensor(rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(runs=RUNS, spanned=st.booleans(), blocked=st.booleans(), window=st.integers(0, 6))
def test_attention_mask_is_what_the_words_say(runs, spanned, blocked, window):
    documents = ids_of(runs)
    seq = documents.shape[1]
    # every other run of three tokens is a span
    spans = torch.tensor([[i // 3 if (i // 3) % 2 else -1 for i in range(seq)]])
    mask = attention_mask(
        document_positions(documents) if blocked else torch.arange(seq),
        documents=documents if blocked else None,
        spans=spans if spanned else None,
        window=window,
    )
    places = list(range(seq))
    expected = brute_force(
        places,
        places,
        spans[0].tolist() if spanned else None,
        spans[0].tolist(),
        documents[0].tolist() if blocked else None,
        window,
    )
    if mask is None:
        mask = causal_mask(seq)
    assert torch.equal(mask.reshape(seq, seq), expected)


def test_causal_and_cache_masks_agree():
    assert attention_mask(torch.arange(7)) is None
    assert torch.equal(attention_mask(torch.arange(7)[None], n_keys=7)[0, 0], causal_mask(7))
    mask = attention_mask(torch.tensor([[2, 3], [0, 1]]), n_keys=5)[:, 0].int().tolist()
    assert mask == [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]]


def test_cached_spans_and_rings():
    positions = torch.tensor([[4, 5]])
    key_spans = torch.tensor([[0, 0, -1, 3, 3, 3, -1]])
    spans = key_spans[:, 4:6]
    for window in (0, 2, 4):
        mask = attention_mask(positions, n_keys=6, spans=spans, key_spans=key_spans, window=window)
        expected = brute_force(
            [4, 5], range(6), spans[0].tolist(), key_spans[0].tolist(), None, window
        )
        assert torch.equal(mask[0, 0], expected)
    # the same keys in another order, one of them missing
    order = torch.tensor([3, 0, 5, 2, 1])
    ring = torch.cat((order, torch.tensor([-1])))[None]
    of_ring = torch.cat((key_spans[0, order], torch.tensor([-1])))[None]
    mask = ring_mask(positions, ring, 4, spans, of_ring)
    expected = brute_force(
        [4, 5], ring[0].tolist(), spans[0].tolist(), of_ring[0].tolist(), None, 4
    )
    assert torch.equal(mask[0, 0], expected)
