"""Every kernel of attention gives what the reference gives: whole rows, with a cache, over pages."""

import sys

import numpy as np
import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Engine
from toolmem.generation.paging import Pager
from toolmem.models import Transformer, flash, flex, kernels
from toolmem.models.attention import HeadMixing
from toolmem.models.attention_kernels import SHORTEST_ROW, kernel_for, own_kernels

VOCAB = 30
OPTIONS = {
    "plain": {},
    "gqa": {"n_heads": 4, "n_kv_heads": 2, "qk_norm": True},
    "window": {"window": [5, 0], "conv_width": 2},
    "softcap": {"attention_softcap": 2.0},
    "window and softcap": {"window": 4, "attention_softcap": 2.0},
    "latent": {"attention": "mla"},
    "prefix": {"attention_mask": "prefix"},
    "prefix and window": {"attention_mask": "prefix", "window": [4, 0]},
}


def model_of(options):
    torch.manual_seed(0)
    defaults = {"dim": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64}
    model = Transformer(VOCAB, **(defaults | options)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def texts(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=generator) for n in lengths]


def whole_rows(model, documents):
    """Rows of 24; spans where the model looks both ways."""
    x = torch.stack(texts([24, 24]))
    spans = torch.full_like(x, -1)
    spans[0, :9], spans[1, 4:11], spans[1, 16:20] = 0, 0, 1
    ids = torch.tensor([[0] * 24, [0] * 10 + [1] * 14]) if documents else None
    return model(x, spans=spans, documents=ids)


# Tokens of three lanes in each chunk; 0: the lane waits.
CHUNKS = [(7, 3, 11), (1, 5, 1), (2, 0, 1), (1, 1, 1), (9, 1, 2), (1, 1, 1)]


def chunks():
    """What lanes are fed, padded, with spans in which the first chunk is one prompt."""
    lanes = [text.split([c[i] for c in CHUNKS]) for i, text in enumerate(texts([21, 11, 17]))]
    for number, counts in enumerate(CHUNKS):
        padded = torch.zeros(3, max(counts), dtype=torch.int64)
        for lane, parts in enumerate(lanes):
            padded[lane, : counts[lane]] = parts[number]
        spans = torch.full_like(padded, 0 if number in (0, 4) else -1) + number
        yield padded, torch.tensor(counts), spans if number in (0, 4) else spans - number


def by_cache(model):
    cache = model.new_cache(3, 40)
    found = []
    for tokens, counts, spans in chunks():
        same = bool((counts == tokens.shape[1]).all())
        given = None if same else counts
        found += real(model(tokens, cache=cache, counts=given, spans=spans), counts)
    return torch.cat(found)


def by_pages(model):
    pager = Pager(model, max_active=3, page_size=4, memory_limit=2**20)
    lanes = [pager.new() for _ in range(3)]
    rows = np.array([pager.activate(lane) for lane in lanes])
    found = []
    for tokens, counts, spans in chunks():
        here = np.flatnonzero(counts.numpy())
        some = counts.numpy()[here]
        pager.prepare(rows[here], some)
        order = np.argsort(-(-(pager.lengths[rows[here]] + some) // 4), kind="stable")
        here, some = here[order], some[order]
        same = (some == tokens.shape[1]).all()
        logits = model(
            tokens[here],
            cache=pager.cache(rows[here], some),
            counts=None if same else torch.from_numpy(some),
            spans=spans[here],
        )
        pager.lengths[rows[here]] += some
        back = torch.empty(3, *logits.shape[1:])
        back[here] = logits
        found += real(back, counts)
    return torch.cat(found)


def real(logits, counts):
    return [logits[lane, :n] for lane, n in enumerate(counts.tolist())]


WAYS = {
    "whole rows": lambda model: whole_rows(model, False),
    "documents": lambda model: whole_rows(model, True),
    "cache": by_cache,
    "pages": by_pages,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_all_kernels_agree(name, way):
    model = model_of(OPTIONS[name])
    model.use_attention("plain")
    expected = WAYS[way](model)
    assert expected.isfinite().all()
    for kernel in ("auto", "sdpa", "flex"):
        model.use_attention(kernel)
        torch.testing.assert_close(WAYS[way](model), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel", ["sdpa", "flex", "plain"])
@torch.no_grad()
def test_what_was_chosen_runs_and_nothing_else(kernel, way, monkeypatch):
    """Every layer of every pass, the C kernels being of sdpa alone."""
    ran = set()

    def spy(owner, name, label):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            ran.add(label)
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    spy(torch.nn.functional, "scaled_dot_product_attention", "sdpa")
    spy(flex, "attend", "flex")
    spy(HeadMixing, "weights", "plain")
    spy(kernels, "paged_attention", "sdpa")
    model = model_of(OPTIONS["window"])
    model.use_attention(kernel)
    WAYS[way](model)
    assert ran == {kernel}


@pytest.mark.parametrize("kernel", ["flex", "plain"])
def test_the_engine_runs_it(kernel, monkeypatch):
    """Without the C kernels, also where the choice changes under it."""
    tokenizer = ByteTokenizer()
    torch.manual_seed(0)
    model = Transformer(260, 16, 2, 2, max_seq_len=64).eval()
    prompts = [
        [tokenizer.role_ids["user"], *range(n), tokenizer.role_ids["assistant"]] for n in (3, 9)
    ]
    with Engine(model, tokenizer, max_lanes=2) as engine:
        expected = [one.tokens for one in engine.generate(prompts, max_new_tokens=8)]
        engine.scheduler.forget()
        model.use_attention(kernel)
        monkeypatch.setattr(
            "toolmem.models.fused.FusedDecoder.step", lambda *_: pytest.fail("decoded by C")
        )
        monkeypatch.setattr(
            kernels, "paged_attention", lambda *_: pytest.fail("attention over pages by C")
        )
        assert [one.tokens for one in engine.generate(prompts, max_new_tokens=8)] == expected


def test_auto():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernel_for("auto", gpu, SHORTEST_ROW, masked=True) == "flex"
    assert kernel_for("auto", gpu, SHORTEST_ROW - 1, masked=True) == "sdpa"
    assert kernel_for("auto", gpu, SHORTEST_ROW, masked=False) == "sdpa"
    assert kernel_for("auto", cpu, 4096, masked=True) == "sdpa"
    for kernel in ("sdpa", "flex", "flash", "plain"):
        assert kernel_for(kernel, cpu, 4, masked=False) == kernel
    assert [own_kernels(k) for k in ("auto", "sdpa", "flex", "flash", "plain")] == [1, 1, 0, 0, 0]


def test_refusals(monkeypatch):
    model = model_of({})
    with pytest.raises(ToolmemError, match="unknown 'eager'; choose from auto, sdpa, flex, flash"):
        model.use_attention("eager")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ToolmemError, match=r"needs the package flash-attn .*toolmem\[flash\]"):
        model.use_attention("flash")
    assert model.attention_kernel == "auto"
    model.attention_kernel = "flash"
    with pytest.raises(ToolmemError, match="needs the package flash-attn"):
        model(torch.zeros(1, 4, dtype=torch.int64))
    assert "take sdpa, flex or plain" in str(flash.cannot("that"))
