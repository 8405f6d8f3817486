"""First weights: each scheme's table, measured."""

import math

import pytest
import torch

from toolmem.models import Transformer


def make(scheme, **options):
    torch.manual_seed(0)
    return Transformer(
        300, 128, 3, 4, initialization=scheme, bias=True, norm="layer", conv_width=4, **options
    )


def std(parameter):
    return float(parameter.detach().std())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("scheme", "matrix", "wide", "shrink", "embedding"),
    [
        ("scaled", 128**-0.5, 512**-0.5, 6**-0.5, 1.0),
        ("gpt2", 0.02, 0.02, 6**-0.5, 0.02),
        ("llama", 0.02, 0.02, 1.0, 0.02),
    ],
)
def test_table(scheme, matrix, wide, shrink, embedding, tied):
    model = make(scheme, tie_embeddings=tied)
    block = model.blocks[1]
    if tied and scheme == "scaled":
        embedding = 128**-0.5
    for parameter, expected in (
        (block.mixer.qkv.weight, matrix),
        (block.mixer.out.weight, matrix * shrink),
        (block.feed_forward.up.weight, matrix),
        (block.feed_forward.down.weight, wide * shrink),
        (model.embedding.weight, embedding),
        (model.head.weight, embedding if tied else matrix),
    ):
        assert math.isclose(std(parameter), expected, rel_tol=0.05)
    assert not block.mixer.qkv.bias.any()
    assert not block.mixer.conv.taps.any()
    assert (block.mixer_norm.weight == 1).all()


def test_llama_is_truncated():
    weight = make("llama").blocks[0].feed_forward.up.weight.detach()
    assert 0.05 < float(weight.abs().max()) <= 0.06


def test_same_seed_same_weights():
    for a, b in zip(make("scaled").parameters(), make("scaled").parameters(), strict=True):
        assert torch.equal(a, b)
