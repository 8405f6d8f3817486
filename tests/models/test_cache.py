"""Decoding through a cache equals the whole forward pass, however the tokens are split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.errors import ToolmemError
from toolmem.models import Transformer

VARIANTS = {
    "plain": {},
    "gqa, conv, qk_norm": {"n_heads": 4, "n_kv_heads": 2, "conv_width": 4, "qk_norm": True},
    "learned": {"position": "learned", "norm": "layer", "feed_forward": "gelu", "bias": True},
    "none, conv": {"position": "none", "conv_width": 3, "tie_embeddings": True},
    "window": {"window": [5, 0], "conv_width": 2},
    "window, gqa": {"window": 3, "n_heads": 4, "n_kv_heads": 2, "rope_fraction": 0.5},
    "residual conv, sandwich": {"residual_conv": 3, "sandwich_norm": True, "nope_every": 2},
    "value residual, softcaps": {
        "value_residual": True,
        "attention_softcap": 3.0,
        "logit_softcap": 5.0,
        "embedding_norm": True,
    },
}


def make(options):
    torch.manual_seed(0)
    model = Transformer(40, 16, 2, **({"n_heads": 2, "max_seq_len": 48} | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


MODELS = {name: make(options) for name, options in VARIANTS.items()}


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (n,), generator=generator) for n in lengths]


def feed(model, cache, parts):
    """Run ragged parts through the cache; the real logits of each lane."""
    counts = torch.tensor([len(part) for part in parts])
    chunk = torch.full((len(parts), max(1, int(counts.max()))), 39)
    for lane, part in enumerate(parts):
        chunk[lane, : len(part)] = part
    uniform = bool((counts == chunk.shape[1]).all())
    logits = model(chunk, cache=cache, counts=None if uniform else counts)
    return [logits[lane, : len(part)] for lane, part in enumerate(parts)]


@st.composite
def splits(draw):
    """Lengths of ragged lanes, and for each the sizes of the chunks it comes in (0: it waits)."""
    lanes = draw(st.integers(1, 4))
    n_chunks = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 8), min_size=n_chunks, max_size=n_chunks)
    return [draw(sizes) for _ in range(lanes)]


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(sizes=splits())
@torch.no_grad()
def test_any_split_gives_the_full_forward(name, sizes):
    model = MODELS[name]
    texts = rows([sum(one) for one in sizes])
    cache = model.new_cache(len(sizes), max(1, max(sum(one) for one in sizes)))
    got = [[] for _ in sizes]
    position = [0] * len(sizes)
    for chunk in zip(*sizes, strict=True):
        parts = [text[p : p + n] for text, p, n in zip(texts, position, chunk, strict=True)]
        for lane, logits in enumerate(feed(model, cache, parts)):
            got[lane].append(logits)
        position = [p + n for p, n in zip(position, chunk, strict=True)]
    assert cache.lengths.tolist() == position
    for text, pieces in zip(texts, got, strict=True):
        if len(text):
            full = model(text[None])[0]
            torch.testing.assert_close(torch.cat(pieces), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_lanes_are_reordered_repeated_and_dropped(name):
    model = MODELS[name]
    texts = rows([9, 4, 12, 6])
    cache = model.new_cache(4, 30)
    feed(model, cache, texts)
    order = [2, 0, 0, 3]
    cache.gather(torch.tensor(order))
    more = rows([5, 5, 2, 5], seed=1)
    for lane, (source, logits) in enumerate(zip(order, feed(model, cache, more), strict=True)):
        whole = torch.cat((texts[source], more[lane]))
        full = model(whole[None])[0, len(texts[source]) :]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=0)
    cache.gather(torch.tensor([1]))
    assert len(cache) == 1
    assert cache.longest == 9 + 5


@torch.no_grad()
def test_growing_keeps_what_lanes_hold():
    model = MODELS["gqa, conv, qk_norm"]
    [text] = rows([20])
    cache = model.new_cache(1, 8)
    first = feed(model, cache, [text[:8]])[0]
    with pytest.raises(ToolmemError, match="max_len 8"):
        feed(model, cache, [text[8:]])
    cache.reserve(20)
    rest = feed(model, cache, [text[8:]])[0]
    torch.testing.assert_close(torch.cat((first, rest)), model(text[None])[0], atol=1e-4, rtol=0)


def test_size_on_paper():
    cache = MODELS["gqa, conv, qk_norm"].new_cache(3, 10)
    keys_and_values = 2 * 3 * 2 * 11 * 4  # lanes, heads, slots and the spill slot, head_dim
    tail = 3 * 3 * (4 + 2 * 2) * 4
    assert cache.size_in_bytes() == 2 * 4 * (keys_and_values + tail)
    half = MODELS["plain"].new_cache(3, 10, dtype=torch.bfloat16)
    assert half.size_in_bytes() * 2 == MODELS["plain"].new_cache(3, 10).size_in_bytes()


def test_refusals():
    model = MODELS["plain"]
    cache = model.new_cache(1, 100)
    with pytest.raises(ToolmemError, match="max_seq_len 48"):
        model(torch.zeros(1, 49, dtype=torch.int64), cache=cache)
    with pytest.raises(ToolmemError, match="documents"):
        model(
            torch.zeros(1, 4, dtype=torch.int64),
            cache=cache,
            documents=torch.zeros(1, 4, dtype=torch.int32),
        )


PREFIX = {
    "prefix": {"attention_mask": "prefix"},
    "prefix, window": {"attention_mask": "prefix", "window": [4, 0], "conv_width": 2},
}


@pytest.mark.parametrize("name", PREFIX)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(turns=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=5), min_size=1, max_size=3))
@torch.no_grad()
def test_prefix_spans_are_cached_as_they_are_trained(name, turns):
    """Every other turn is a span that comes in one chunk; the rest comes token by token."""
    model = make(PREFIX[name])
    texts = rows([sum(one) for one in turns])
    spans = [
        torch.tensor([i if i % 2 == 0 else -1 for i, n in enumerate(one) for _ in range(n)])
        for one in turns
    ]
    for lane, (one, text, span) in enumerate(zip(turns, texts, spans, strict=True)):
        if not len(text):
            continue
        full = model(text[None], spans=span[None].long())[0]
        cache = model.new_cache(1, 40)
        pieces, start = [], 0
        for i, n in enumerate(one):
            for size in [n] if i % 2 == 0 else [1] * n:
                if size:
                    part = slice(start, start + size)
                    pieces.append(
                        model(text[None, part], cache=cache, spans=span[None, part].long())[0]
                    )
                    start += size
        torch.testing.assert_close(torch.cat(pieces), full, atol=1e-4, rtol=0)
        causal = model(text[None])[0]
        alone = all(n < 2 for n in one[::2])
        assert alone or not torch.allclose(full, causal, atol=1e-5), lane


@torch.no_grad()
def test_ragged_prefix_chunks_agree_with_lanes_alone():
    model = make(PREFIX["prefix, window"])
    texts = rows([9, 5])
    spans = [torch.tensor([0] * 4 + [-1] * 2 + [1] * 3), torch.tensor([2] * 3 + [-1] * 2)]
    cache = model.new_cache(2, 20)
    chunk, ids = torch.zeros(2, 9, dtype=torch.long), torch.full((2, 9), 7)
    for lane in range(2):
        chunk[lane, : len(texts[lane])] = texts[lane]
        ids[lane, : len(texts[lane])] = spans[lane]
    logits = model(chunk, cache=cache, counts=torch.tensor([9, 5]), spans=ids)
    more = model(torch.tensor([[3], [4]]), cache=cache, spans=torch.tensor([[-1], [-1]]))
    for lane, last in ((0, 3), (1, 4)):
        text = torch.cat((texts[lane], torch.tensor([last])))
        span = torch.cat((spans[lane], torch.tensor([-1])))
        full = model(text[None], spans=span[None])[0]
        n = len(texts[lane])
        torch.testing.assert_close(logits[lane, :n], full[:n], atol=1e-4, rtol=0)
        torch.testing.assert_close(more[lane, 0], full[n], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_lanes_go_to_the_host_and_come_back(name):
    model = MODELS[name]
    texts = rows([9, 4, 12])
    cache = model.new_cache(3, 14)
    feed(model, cache, texts)
    away = cache.detach(torch.tensor([2, 0]))
    cache.gather(torch.tensor([1]))
    feed(model, cache, [torch.tensor([5, 6])])
    cache.reserve(20)
    cache.restore(away)
    assert cache.lengths.tolist() == [6, 12, 9] and len(away) == 2
    got = feed(model, cache, [torch.tensor([1]), torch.tensor([2]), torch.tensor([3])])
    whole = [[*texts[1], 5, 6, 1], [*texts[2], 2], [*texts[0], 3]]
    for logits, text in zip(got, whole, strict=True):
        full = model(torch.tensor([[int(t) for t in text]]))[0, -1:]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=0)
    assert away.size_in_bytes() > 0
