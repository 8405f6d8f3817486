"""First weights: each scheme's table, measured."""

import math

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models import MoETransformer, Transformer
from toolmem.models.initialization import SCHEMES

DIM, HIDDEN, VOCAB, LAYERS = 128, 512, 300, 3
BRANCHES = 2 * LAYERS


def make(scheme, **options):
    torch.manual_seed(0)
    return Transformer(
        VOCAB, DIM, LAYERS, 4, initialization=scheme, bias=True, norm="layer", conv_width=4,
        feed_forward="gelu", **options,
    )  # fmt: skip


def std(parameter):
    return float(parameter.detach().std())


def xavier(inputs, outputs):
    return math.sqrt(2 / (inputs + outputs))


# standard deviations of: queries' to values' matrix, attention's end, the feed-forward's first matrix and
# its end, the embedding (untied, tied), the untied head
SMALL = math.sqrt(2 / (5 * DIM))
END = BRANCHES**-0.5
TABLE = {
    "scaled": (DIM**-0.5, END * DIM**-0.5, DIM**-0.5, END * HIDDEN**-0.5, 1, DIM**-0.5, DIM**-0.5),
    "gpt2": (0.02, END * 0.02, 0.02, END * 0.02, 0.02, 0.02, 0.02),
    "llama": (0.02,) * 7,
    "xavier": (
        xavier(DIM, 3 * DIM), xavier(DIM, DIM), xavier(DIM, HIDDEN), xavier(HIDDEN, DIM), 1, DIM**-0.5,
        xavier(DIM, VOCAB),
    ),
    "kaiming": (
        math.sqrt(2 / DIM), math.sqrt(2 / DIM), math.sqrt(2 / DIM), math.sqrt(2 / HIDDEN), 1, DIM**-0.5,
        DIM**-0.5,
    ),
    "orthogonal": (
        DIM**-0.5, END * DIM**-0.5, DIM**-0.5, END * HIDDEN**-0.5, 1, DIM**-0.5, DIM**-0.5,
    ),
    "small_init": (SMALL,) * 7,
    "zero_residual": (DIM**-0.5, 0, DIM**-0.5, 0, 1, DIM**-0.5, DIM**-0.5),
}  # fmt: skip


def test_every_scheme_has_a_table_here_and_in_its_docstring():
    assert TABLE.keys() | {"mup"} == SCHEMES.keys()  # muP's: test_mup.py
    for scheme in SCHEMES.values():
        assert "| parameters" in (scheme.__doc__ or "")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", TABLE)
def test_table(scheme, tied):
    model = make(scheme, tie_embeddings=tied)
    block = model.blocks[1]
    qkv, out, up, down, embedding, tied_embedding, head = TABLE[scheme]
    table = tied_embedding if tied else embedding
    for parameter, expected in (
        (block.mixer.qkv.weight, qkv),
        (block.mixer.out.weight, out),
        (block.feed_forward.up.weight, up),
        (block.feed_forward.down.weight, down),
        (model.embedding.weight, table),
        (model.head.weight, table if tied else head),
    ):
        assert math.isclose(std(parameter), expected, rel_tol=0.05)
    assert not block.mixer.qkv.bias.any()
    assert not block.mixer.conv.taps.any()
    assert (block.mixer_norm.weight == 1).all()


def test_llama_is_truncated():
    weight = make("llama").blocks[0].feed_forward.up.weight.detach()
    assert 0.05 < float(weight.abs().max()) <= 0.06


def test_orthogonal_matrices_have_one_singular_value():
    """Also every expert's by itself, and ends of branches shrunk."""
    torch.manual_seed(0)
    model = MoETransformer(
        40, 32, 2, 2, hidden_dim=64, n_experts=3, feed_forward="gelu", initialization="orthogonal"
    )
    block = model.blocks[0]
    for weight, value in (
        (block.mixer.qkv.weight, math.sqrt(3)),
        (block.mixer.out.weight, 4**-0.5),
        (block.feed_forward.up.weight, math.sqrt(2)),
        (block.feed_forward.down.weight, 4**-0.5),
    ):
        values = torch.linalg.svdvals(weight.detach())
        torch.testing.assert_close(values, torch.full_like(values, value))


@torch.no_grad()
def test_with_silent_branches_the_model_is_its_head_of_the_embedding():
    model = make("zero_residual").eval()
    tokens = torch.arange(9)[None]
    wanted = model.head(model.norm(model.embedding(tokens)))
    assert torch.equal(model(tokens), wanted)
    assert not torch.equal(make("scaled").eval()(tokens), wanted)


def test_learned_positions():
    for scheme, expected in (("scaled", DIM**-0.5), ("gpt2", 0.02), ("small_init", SMALL)):
        table = make(scheme, position="learned").position_embedding.weight
        assert math.isclose(std(table), expected, rel_tol=0.05)


def test_same_seed_same_weights():
    for a, b in zip(make("scaled").parameters(), make("scaled").parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_scheme_is_refused_by_name():
    with pytest.raises(ToolmemError, match=r"'he'; choose scaled, gpt2, .*mup"):
        make("he")
