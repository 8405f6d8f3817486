"""Rounding against a plain loop over Python's own floats, stored bits against counts by hand."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models import MoETransformer, Transformer
from toolmem.models.quantization import as_stored, rounded_to_nearest, rounded_weights
from toolmem.models.quantization.round_to_nearest import from_codes, nearest


def as_half(x: float) -> float:
    """What IEEE half precision keeps of a number, by the standard library."""
    return struct.unpack("e", struct.pack("e", x))[0]


def plain(row: list[float], bits: int, size: int) -> list[float]:
    """One row, group after group."""
    top = 2 ** (bits - 1) - 1
    found = []
    for start in range(0, len(row), size):
        group = row[start : start + size]
        scale = as_half(max(abs(x) for x in group) / top)
        for x in group:
            code = round(x / scale) if scale else 0  # Python, too, rounds ties to even
            found.append(max(-top, min(top, code)) * scale)
    return found


def small(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(
        **({"vocab_size": 13, "dim": 10, "n_layers": 1, "n_heads": 2, "hidden_dim": 12,
            "head_dim": 6, "max_seq_len": 8, "tie_embeddings": True, "conv_width": 3} | changes)
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [None, 1, 4, 10, 64])
def test_equals_a_plain_loop(bits, size):
    weight = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(bits))
    weight[0, 0] = 0.0
    weight[1, 1] *= 1e-7  # a scale below what half precision has: subnormal, or none
    weight[2, 2] *= 1e-9
    codes, scales = nearest(weight, bits, size)
    found = from_codes(codes, scales, size).flatten(0, 1).tolist()
    for row, back in zip(weight.double().flatten(0, 1).tolist(), found, strict=True):
        assert back == plain(row, bits, size or 10)
    assert scales.dtype == torch.float16 and scales.shape == (3, 5, math.ceil(10 / (size or 10)))
    assert codes.abs().max() == 2 ** (bits - 1) - 1


def test_on_paper():
    weight = torch.tensor([[7.0, -3.4, 0.5, 1.5], [0.1, -0.2, 0.2, 0.09]])
    codes, scales = nearest(weight, 4)
    assert codes[0].tolist() == [7, -3, 0, 2]  # the scale is 1; ties go to even
    assert scales[0].item() == 1.0
    codes, _ = nearest(weight, 2)
    assert codes[0].tolist() == [1, 0, 0, 0]
    codes, scales = nearest(weight, 4, group_size=2)
    assert scales.tolist()[0] == [1.0, as_half(1.5 / 7)]


def test_a_better_code_is_never_worse():
    """No other code of the same scale comes nearer."""
    weight = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).double()
    codes, scales = nearest(weight, 3, group_size=4)
    error = (from_codes(codes, scales, 4) - weight).abs()
    for other in range(-3, 4):
        tried = from_codes(torch.full_like(codes, other), scales, 4)
        assert (error <= (tried - weight).abs() + 1e-15).all()


def test_a_model_is_rounded_weight_by_weight_and_left_alone():
    model = small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stored = rounded_to_nearest(model, 4, group_size=4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    rounded = rounded_weights(model)
    assert "embedding.weight" in rounded and not any("norm" in name for name in rounded)
    for name, parameter in stored.model.named_parameters():
        if name in rounded:
            expected = [plain(row, 4, 4) for row in before[name].double().tolist()]
            assert parameter.double().tolist() == expected, name
        else:
            assert torch.equal(parameter, before[name].bfloat16().float()), name
    assert stored.model.head.weight is stored.model.embedding.weight
    tokens = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(2))
    assert not torch.equal(stored.model(tokens), model(tokens))


def test_bits_by_hand():
    """Table 13 x 10; qkv 36 x 10, out 10 x 12, up 24 x 10 (gated), down 10 x 12; kept: 3 norms of 10,
    taps of 3 on 36 channels.
    """
    matrices = 13 * 10 + 36 * 10 + 10 * 12 + 24 * 10 + 10 * 12
    kept = 3 * 10 + 3 * 36
    stored = rounded_to_nearest(small(), 4)
    rows = 13 + 36 + 10 + 24 + 10
    assert stored.bits == {"weights": 4 * matrices, "scales": 16 * rows, "kept": 16 * kept}
    stored = rounded_to_nearest(small(), 2, group_size=4, scale_format="float32")
    groups = 3 * (13 + 36 + 10 + 24) + 3 * 10  # rows of 10 and of 12 in fours
    assert stored.bits == {"weights": 2 * matrices, "scales": 32 * groups, "kept": 16 * kept}
    assert stored.total_bits == 2 * matrices + 32 * groups + 16 * kept
    assert as_stored(small(), "bfloat16").total_bits == 16 * (matrices + kept)
    assert as_stored(small(), "float32").total_bits == 32 * (matrices + kept)
    assert sum(p.numel() for p in small().parameters()) == matrices + kept


def test_an_untied_head_is_stored_too():
    tied, untied = (rounded_to_nearest(small(tie_embeddings=one), 8) for one in (True, False))
    assert untied.total_bits - tied.total_bits == 8 * 13 * 10 + 16 * 13


def test_experts_are_rounded_and_their_bias_is_kept():
    torch.manual_seed(0)
    model = MoETransformer(
        13, dim=8, n_layers=1, n_heads=2, hidden_dim=6, n_experts=4, max_seq_len=8
    )
    model.blocks[0].feed_forward.router.bias += 0.30078125 + 2**-12
    stored = rounded_to_nearest(model, 8)
    up = model.blocks[0].feed_forward.up.weight
    expected = [[plain(row, 8, 8) for row in expert] for expert in up.double().tolist()]
    assert stored.model.blocks[0].feed_forward.up.weight.double().tolist() == expected
    assert (stored.model.blocks[0].feed_forward.router.bias == 0.30078125).all()
    norms = 3 * 8
    assert stored.bits["kept"] == 16 * (norms + 4)


def test_floats_are_what_torch_casts_to():
    model = small()
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        stored = as_stored(model, name).model
        for a, b in zip(model.parameters(), stored.parameters(), strict=True):
            assert torch.equal(a.to(dtype).float(), b)
    same = as_stored(model, "float32").model
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)
    )


def test_what_cannot_be_is_refused():
    with pytest.raises(ToolmemError, match="bits is 9:"):
        rounded_to_nearest(small(), 9)
    with pytest.raises(ToolmemError, match="group_size is 0"):
        rounded_to_nearest(small(), 4, group_size=0)
    with pytest.raises(ToolmemError, match="unknown 'int5'"):
        as_stored(small(), "int5")
    model = small()
    with torch.no_grad():
        model.embedding.weight[0, 0] = math.nan
    with pytest.raises(ToolmemError, match=r"embedding\.weight: .*float16"):
        rounded_to_nearest(model, 4)
