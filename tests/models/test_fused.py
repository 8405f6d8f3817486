"""Decoding by C equals the model's own forward pass, token by token."""

import numpy as np
import pytest
import torch
from torch import nn

from toolmem.generation.paging import Pager
from toolmem.models import Mamba2, Transformer, kernels
from toolmem.models.fused import FusedDecoder

OPTIONS = {
    "swiglu": {},
    "grouped": {"n_kv_heads": 1, "tie_embeddings": True},
    "silu and convolution": {"feed_forward": "silu", "conv_width": 4},
    "gelu and biases": {"feed_forward": "gelu", "bias": True},
    "relu2": {"feed_forward": "relu2", "hidden_dim": 37},
    "learned": {"position": "learned"},
    "none": {"position": "none", "embedding_norm": True},
    "partly rotary": {"rope_fraction": 0.5, "embedding_scale": True},
    "capped": {"attention_softcap": 2.0},
    "two taps": {"conv_width": 2},
    "heads of 12": {"head_dim": 12, "conv_width": 4},
    "heads of 6": {"head_dim": 6, "n_kv_heads": 1},
    "heads of 34": {"head_dim": 34},
    "biased queries": {"qkv_bias": True, "n_kv_heads": 1},
    "slower turns": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
}


def model_of(**options):
    torch.manual_seed(0)
    options = {"dim": 40, "n_layers": 2, "n_heads": 2, "head_dim": 24, "max_seq_len": 60, **options}
    model = Transformer(50, **options).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def decoder(model):
    pager = Pager(model, max_active=4, page_size=4)
    return pager, FusedDecoder.of(model, pager.state)


@pytest.fixture(autouse=True)
def _compiled():
    if not kernels.available():
        pytest.skip("no C compiler here: the engine decodes by torch's operations")


@pytest.mark.parametrize("name", OPTIONS)
@torch.no_grad()
def test_equals_the_models_own_forward(name):
    model = model_of(**OPTIONS[name])
    pager, fused = decoder(model)
    assert fused is not None
    generator = np.random.default_rng(0)
    lanes = [pager.new() for _ in range(3)]
    texts = [[], [], []]
    for _ in range(6):
        rows = np.array([pager.activate(lane) for lane in lanes])
        counts = generator.integers(1, 6, 3)
        pager.prepare(rows, counts)
        chunks = [generator.integers(0, 50, n) for n in counts]
        own = np.repeat(np.arange(3), counts)
        column = np.concatenate([np.arange(n) for n in counts])
        hidden = fused.step(
            np.concatenate(chunks),
            pager.pages[rows[own], :-1],
            pager.lengths[rows[own]] + column,
            pager.slots[rows[own]] if fused.conv else None,
        )
        pager.lengths[rows] += counts
        for lane in range(3):
            texts[lane].extend(chunks[lane].tolist())
            whole = model.hidden(torch.tensor([texts[lane]]))[0, -int(counts[lane]) :]
            torch.testing.assert_close(hidden[own == lane], whole, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_weights_that_have_moved_are_found():
    model = model_of()
    pager, fused = decoder(model)
    lane = pager.new()
    rows = np.array([pager.activate(lane)])

    def read():
        pager.lengths[rows] = 0
        pager.prepare(rows, np.array([1]))
        return fused.step(np.array([7]), pager.pages[rows, :1], pager.lengths[rows], None)

    for change in ("in place", "another tensor"):
        read()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                if change == "in place":
                    layer.weight.mul_(1.5)
                else:
                    layer.weight = nn.Parameter(layer.weight * 0.5)
        torch.testing.assert_close(
            read(), model.hidden(torch.tensor([[7]]))[0], atol=1e-5, rtol=1e-4
        )


@torch.no_grad()
def test_another_last_norm_is_the_models_own():
    model = model_of()
    model.norm = nn.LayerNorm(40)
    pager, fused = decoder(model)
    rows = np.array([pager.activate(pager.new())])
    pager.prepare(rows, np.array([1]))
    hidden = fused.step(np.array([7]), pager.pages[rows, :1], pager.lengths[rows], None)
    torch.testing.assert_close(hidden, model.hidden(torch.tensor([[7]]))[0], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_convolutions_go_back_to_where_a_draft_was_right():
    model = model_of(conv_width=4)
    pager, fused = decoder(model)
    rows = np.array([pager.activate(pager.new()) for _ in range(2)])
    text = np.random.default_rng(0).integers(0, 50, (2, 12))

    def read(chunk, kept=None):
        n = chunk.shape[1]
        pager.prepare(rows, np.array([n, n]))
        own = np.repeat(rows, n)
        lengths = np.repeat(pager.lengths[rows], n) + np.tile(np.arange(n), 2)
        places = pager.slots[own]
        hidden = fused.step(chunk.reshape(-1), pager.pages[own, :-1], lengths, places, kept)
        pager.lengths[rows] += n
        return hidden.view(2, n, -1)

    read(text[:, :2])
    wrong = text[:, 2:9].copy()
    wrong[0, 3:], wrong[1, 1:] = 49, 49
    kept = fused.room_to_keep(14)
    read(wrong, kept)
    for row, right in zip(rows, (3, 1), strict=True):
        fused.go_back(int(pager.slots[row]), kept, 7 * int(row == rows[1]) + right - 1)
        pager.lengths[row] = 2 + right
    hidden = read(np.stack((text[0, 5:8], text[1, 3:6])))
    for lane, stop in ((0, 8), (1, 6)):
        whole = model.hidden(torch.from_numpy(text[lane : lane + 1, :stop]))[0, -3:]
        torch.testing.assert_close(hidden[lane], whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"window": 5},
        {"window": [5, 0]},
        {"norm": "layer"},
        {"residual_conv": 2},
        {"sandwich_norm": True},
        {"value_residual": True},
        {"attention_mask": "prefix"},
        {"attention": "mla"},
    ],
    ids=str,
)
def test_what_it_cannot_do_it_leaves_alone(options):
    assert decoder(model_of(**options))[1] is None


def test_others_are_left_alone():
    torch.manual_seed(0)
    assert decoder(Mamba2(50, 16, 2, state_dim=8, head_dim=8, max_seq_len=60))[1] is None
    assert decoder(model_of().double())[1] is None

    class Other(Transformer):
        def hidden(self, tokens, **options):
            return super().hidden(tokens, **options) + 1

    assert decoder(Other(50, 16, 2, 2, max_seq_len=60))[1] is None
    hooked = model_of()
    hooked.blocks[0].register_forward_hook(lambda *_: None)
    assert decoder(hooked)[1] is None


def test_a_page_that_is_not_there_is_an_error():
    _, fused = decoder(model_of())
    for pages, length in (([[10**9]], 0), ([[1]], 4)):
        with pytest.raises(AssertionError, match="page"):
            fused.step(np.array([1]), np.array(pages), np.array([length]), None)
