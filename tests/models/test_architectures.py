"""What every architecture promises: any split, any order, packed rows, checkpoints, gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem import checkpoints
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)

VOCAB, DIM, ROOM = 40, 16, 48
HEADS = {"n_heads": 2}
MAMBA2 = {"state_dim": 8, "head_dim": 8, "chunk_size": 5}
GRIFFIN = {
    "pattern": ["rglru", "rglru", "local"],
    "mixers": {"local": {"class_path": "attention", "n_heads": 2, "n_kv_heads": 1, "window": 5}},
}
JAMBA = {
    "pattern": ["mamba1", "attention"],
    "mixers": {"mamba1": {"state_dim": 4}, "attention": HEADS},
    "feed_forward": ["swiglu", "moe"],
    "feed_forwards": {"moe": {"n_experts": 4, "top_k": 2, "hidden_dim": 16}},
}
ARCHITECTURES = {
    "transformer": (Transformer, HEADS),
    "canon": (Transformer, HEADS | {"conv_width": 4, "residual_conv": 4}),
    "mla": (
        Transformer,
        HEADS | {"attention": "mla", "mla_kv_rank": 6, "mla_rope_dim": 4, "conv_width": 3},
    ),
    "moe": (MoETransformer, HEADS | {"n_experts": 4, "top_k": 2, "hidden_dim": 16}),
    "mamba": (Mamba, {"state_dim": 4}),
    "mamba2": (Mamba2, MAMBA2 | {"hidden_dim": 24}),
    **{
        cell: (RNN, {"cell": cell, "conv_width": 3, "residual_conv": 2})
        for cell in ("lstm", "gru", "mingru", "minlstm", "rglru")
    },
    **{rule: (LinearAttention, HEADS | {"rule": rule}) for rule in ("gated", "gated_delta")},
    "griffin": (Hybrid, GRIFFIN | {"n_layers": 3}),
    "jamba": (Hybrid, JAMBA),
    "mamba2 and attention": (
        Hybrid,
        {
            "pattern": ["mamba2", "attention"],
            "mixers": {"mamba2": MAMBA2, "attention": HEADS | {"conv_width": 3}},
            "feed_forward": ["none", "relu2"],
            "residual_conv": 2,
        },
    ),
}


def make(name):
    torch.manual_seed(0)
    cls, options = ARCHITECTURES[name]
    model = cls(VOCAB, DIM, **{"n_layers": 2, "max_seq_len": ROOM, **options}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


MODELS = {}


def model_of(name):
    if name not in MODELS:
        MODELS[name] = make(name)
    return MODELS[name]


def text(n, seed=0):
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def feed(model, cache, parts):
    """Run ragged parts through the cache; the real logits of each lane."""
    counts = torch.tensor([len(part) for part in parts])
    chunk = torch.full((len(parts), max(1, int(counts.max()))), VOCAB - 1)
    for lane, part in enumerate(parts):
        chunk[lane, : len(part)] = part
    even = bool((counts == chunk.shape[1]).all())
    logits = model(chunk, cache=cache, counts=None if even else counts)
    return [logits[lane, : len(part)] for lane, part in enumerate(parts)]


@st.composite
def splits(draw):
    """For each lane the sizes of the chunks it comes in (0: it waits)."""
    n_chunks = draw(st.integers(1, 5))
    sizes = st.lists(st.integers(0, 9), min_size=n_chunks, max_size=n_chunks)
    return [draw(sizes) for _ in range(draw(st.integers(1, 3)))]


@pytest.mark.parametrize("name", ARCHITECTURES)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=splits())
@torch.no_grad()
def test_any_split_gives_the_full_forward(name, sizes):
    model = model_of(name)
    texts = [text(sum(one), seed) for seed, one in enumerate(sizes)]
    cache = model.new_cache(len(sizes), max(1, max(map(sum, sizes))))
    got, position = [[] for _ in sizes], [0] * len(sizes)
    for chunk in zip(*sizes, strict=True):
        parts = [t[p : p + n] for t, p, n in zip(texts, position, chunk, strict=True)]
        for lane, logits in enumerate(feed(model, cache, parts)):
            got[lane].append(logits)
        position = [p + n for p, n in zip(position, chunk, strict=True)]
    assert cache.lengths.tolist() == position
    for one, pieces in zip(texts, got, strict=True):
        if len(one):
            full = model(one[None])[0]
            torch.testing.assert_close(torch.cat(pieces), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_lanes_move_in_any_order_to_the_host_and_back(name):
    model = model_of(name)
    texts = [text(n, seed) for seed, n in enumerate((9, 4, 12, 6))]
    cache = model.new_cache(4, 20)
    feed(model, cache, texts)
    assert cache.size_in_bytes() > 0
    away = cache.detach(torch.tensor([3, 0]))
    cache.gather(torch.tensor([2, 1, 2]))
    feed(model, cache, [text(3, 9), text(1, 8), text(2, 7)])
    cache.restore(away)
    whole = [[2, 9, 3], [1, 8, 1], [2, 7, 2], [3, 0, 0], [0, 0, 0]]
    last = [text(1, 20 + lane) for lane in range(5)]
    got = feed(model, cache, last)
    for logits, (first, seed, n), end in zip(got, whole, last, strict=True):
        row = torch.cat((texts[first], text(n, seed), end))
        torch.testing.assert_close(logits, model(row[None])[0, -1:], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_documents_of_a_row_are_as_far_apart_as_rows(name):
    model = model_of(name)
    lengths = (7, 1, 11, 5)
    texts = [text(n, seed) for seed, n in enumerate(lengths)]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])
    packed = model(torch.cat(texts)[None], documents=documents[None])[0]
    apart = torch.cat([model(one[None])[0] for one in texts])
    torch.testing.assert_close(packed, apart, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_comes_from_the_future_and_gradients_reach_everything(name):
    model = copy.deepcopy(model_of(name)).train()
    row = text(20)[None]
    other = row.clone()
    other[:, 12:] = (other[:, 12:] + 7) % VOCAB
    logits = model(row)
    torch.testing.assert_close(model(other)[:, :12], logits[:, :12], atol=1e-5, rtol=0)
    logits.square().sum().backward()
    # an expert that no token chose has no gradient to speak of: its stack has one all the same
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_counts_add_up_and_checkpoints_rebuild(name):
    model = model_of(name)
    total = sum(p.numel() for p in model.parameters())
    counts = model.parameter_counts()
    assert sum(counts.values()) == total and "other" not in counts
    active = model.active_parameters()
    assert active < total if name in ("moe", "jamba") else active == total
    spec = checkpoints.describe(model, {})["model"]
    again = checkpoints.build_model(spec, "test").eval()
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(text(9)[None]), model(text(9)[None]), atol=0, rtol=0)
