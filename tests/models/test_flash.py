"""flash-attn, played by plain maths: it is given what it takes, and what comes out is the reference's."""

import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from test_attention_kernels import OPTIONS, WAYS, model_of

from toolmem.errors import ToolmemError
from toolmem.models import Hybrid, flash


def plainly(q, k, v, ends, scale, window, softcap):
    """One row, (s, h, d) and (n, k, d): query i stands at key ends - s + i, and sees up to there."""
    seq, heads = q.shape[:2]
    share = heads // k.shape[1]
    y = torch.zeros_like(q)
    for i in range(seq):
        last = ends - seq + i
        first = 0 if window == (-1, -1) else max(0, last - window[0])
        for head in range(heads):
            scores = (k[first : last + 1, head // share] @ q[i, head]) * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            y[i, head] = scores.softmax(0) @ v[first : last + 1, head // share]
    return y


class Played(ModuleType):
    """The functions of flash-attn 2.6 that are called, with its names of arguments."""

    __version__ = "2.6.3"

    def __init__(self):
        super().__init__("flash_attn")
        self.calls = []

    def check(self, name, q, k, v, softmax_scale, causal, window_size, softcap):
        assert causal
        assert window_size == (-1, -1) or (window_size[0] >= 0 and window_size[1] == 0)
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape
        self.calls.append((name, softmax_scale, window_size, softcap))

    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
    ):
        self.check("whole", q, k, v, softmax_scale, causal, window_size, softcap)
        assert q.shape[:2] == k.shape[:2]
        some = (softmax_scale, window_size, softcap)
        rows = [plainly(*row, q.shape[1], *some) for row in zip(q, k, v, strict=True)]
        return torch.stack(rows)

    def flash_attn_varlen_func(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        self.check("documents", q, k, v, softmax_scale, causal, window_size, softcap)
        assert q.ndim == 3 and cu_seqlens_q.dtype == torch.int32
        ends = cu_seqlens_q.tolist()
        assert ends == cu_seqlens_k.tolist() and ends[0] == 0 and ends[-1] == len(q) == len(k)
        some = (softmax_scale, window_size, softcap)
        parts = []
        for start, stop in itertools.pairwise(ends):
            assert 0 < stop - start <= min(max_seqlen_q, max_seqlen_k)
            one = slice(start, stop)
            parts.append(plainly(q[one], k[one], v[one], stop - start, *some))
        return torch.cat(parts)

    def flash_attn_with_kvcache(
        self, q, k_cache, v_cache, cache_seqlens=None, softmax_scale=None, causal=False,
        window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        self.check("cache", q, k_cache, v_cache, softmax_scale, causal, window_size, softcap)
        assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == q.shape[:1]
        assert int(cache_seqlens.max()) <= k_cache.shape[1]
        some = (softmax_scale, window_size, softcap)
        rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
        return torch.stack([plainly(*row, *some) for row in rows])


@pytest.fixture
def played(monkeypatch):
    module = Played()
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.fixture
def here(monkeypatch):
    """What flash-attn does not take, for the maths of it to be looked at on a CPU."""
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["plain", "gqa", "window", "softcap", "window and softcap"])
@torch.no_grad()
def test_the_reference_by_flash(name, way, played, here):
    model = model_of(OPTIONS[name])
    model.use_attention("plain")
    expected = WAYS[way](model)
    model.use_attention("flash")
    torch.testing.assert_close(WAYS[way](model), expected, atol=1e-5, rtol=0)
    names = {"whole rows": {"whole"}, "documents": {"documents"}}.get(way, {"whole", "cache"})
    assert {call[0] for call in played.calls} <= names | ({"cache"} if "window" in name else set())
    windows = {"window": {(4, 0), (-1, -1)}, "window and softcap": {(3, 0)}}.get(name, {(-1, -1)})
    assert {call[2] for call in played.calls} == windows
    assert {call[3] for call in played.calls} == {2.0 if "softcap" in name else 0.0}
    head_dim = 8 if name == "gqa" else 16
    assert {call[1] for call in played.calls} == {1 / math.sqrt(head_dim)}


def test_what_it_does_not_take(played, monkeypatch):
    x = torch.zeros(1, 4, dtype=torch.int64)
    model = model_of({})
    model.use_attention("flash")
    with pytest.raises(ToolmemError, match="runs on CUDA, and the model is on cpu: take sdpa"):
        model(x)
    monkeypatch.setattr(flash, "DEVICE", "cpu")
    with pytest.raises(ToolmemError, match=r"bfloat16 or float16, not in float32: .*precision"):
        model(x)
    monkeypatch.setattr(flash, "DTYPES", (torch.float32,))
    with pytest.raises(ToolmemError, match="look both ways"):
        model_of(OPTIONS["prefix"]).use_attention("flash")
    latent = model_of(OPTIONS["latent"])
    latent.use_attention("flash")
    with pytest.raises(ToolmemError, match="latent attention"):
        latent(x)
    wide = model_of({"dim": 600, "n_heads": 2})
    wide.use_attention("flash")
    with pytest.raises(ToolmemError, match="heads of 300 numbers, only up to 256"):
        wide(x)
    tree = (torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ToolmemError, match="trees of drafts"):
        model.hidden(x, cache=model.new_cache(1, 8), tree=tree)


def test_an_old_one_is_refused(played):
    type(played).__version__ = "2.5.9"
    try:
        with pytest.raises(ToolmemError, match=r"2\.6 or newer, not 2\.5\.9"):
            model_of({}).use_attention("flash")
    finally:
        type(played).__version__ = "2.6.3"


def test_models_without_attention_have_no_use_for_it(played):
    model = Hybrid(30, 16, 1, ["mingru"], max_seq_len=16)
    model.use_attention("flash")
    assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, 30)
