"""muP: its tables on paper, and the coordinate check, for every architecture that takes it."""

import math

import pytest
import torch

from toolmem.analysis.initialization import WidthScan, rms, scan_widths, slope, train_steps
from toolmem.errors import ToolmemError
from toolmem.models import Mamba, Mamba2, MoETransformer, Transformer
from toolmem.training import AdamW, Muon

BASE, WIDTHS, VOCAB = 64, (64, 128, 256, 512), 32
ENDS = (64, 512)
MUP = {"initialization": "mup", "mup_base_dim": BASE}


def transformer(width, **options):
    """Of heads of 16, the more the wider."""
    return Transformer(VOCAB, width, 2, width // 16, max_seq_len=32, **options)


def wide_heads(width, **options):
    """Of four heads, the wider the wider the model."""
    return Transformer(VOCAB, width, 2, 4, max_seq_len=32, **options)


def mla(width, **options):
    """With latents that grow."""
    options |= {"attention": "mla", "mla_kv_rank": width // 2, "mla_q_rank": width // 2}
    return transformer(width, **options)


def moe(width, **options):
    return MoETransformer(
        VOCAB, width, 2, width // 16, hidden_dim=2 * width, n_experts=4, top_k=2, max_seq_len=32, **options
    )  # fmt: skip


def mamba(width, **options):
    return Mamba(VOCAB, width, 2, state_dim=8, max_seq_len=32, **options)


def mamba2(width, **options):
    return Mamba2(VOCAB, width, 2, state_dim=16, head_dim=16, max_seq_len=32, **options)


MAKERS = [transformer, wide_heads, mla, moe, mamba, mamba2]


def scan(maker, optimizer, widths=WIDTHS, **options):
    return scan_widths(
        lambda width: maker(width, **options), widths,
        optimizer=optimizer, steps=3, seeds=2, rows=2, seq=16,
    )  # fmt: skip


@pytest.mark.parametrize("maker", MAKERS)
def test_coordinate_check(maker):
    """Three steps change every activation as much at width 512 as at 64: the slope is 0, give or take
    0.1. Without muP something grows about as the root of the width, or faster.
    """
    found = scan(maker, AdamW(lr=3e-3), **MUP)
    slopes = found.slopes(found.change)
    assert {"embedding", "blocks.0.mixer", "blocks.1", "norm", "logits"} <= slopes.keys()
    assert {name: s for name, s in slopes.items() if not abs(s) <= 0.1} == {}
    plain = scan(maker, AdamW(lr=3e-3), ENDS)
    assert max(plain.slopes(plain.change).values()) > 0.4


@pytest.mark.parametrize("maker", [transformer, mamba])
def test_coordinate_check_of_muon(maker):
    """As above, by Muon, whose rates follow from the spectral condition."""
    found = scan(maker, Muon(lr=3e-3), widths=WIDTHS[:3], **MUP)
    slopes = found.slopes(found.change)
    assert {name: s for name, s in slopes.items() if not abs(s) <= 0.1} == {}


@pytest.mark.parametrize("scale", [False, True])
def test_coordinate_check_of_a_tied_head(scale):
    """Logits alone go down a little at small widths: first weights, not trained ones, make up a part of
    their change that falls as the root of the width.
    """
    options = {"tie_embeddings": True, "embedding_scale": scale}
    found = scan(transformer, AdamW(lr=3e-3), **options, **MUP)
    slopes = found.slopes(found.change)
    assert -0.25 <= slopes.pop("logits") <= 0.1
    assert {name: s for name, s in slopes.items() if not abs(s) <= 0.1} == {}
    plain = scan(transformer, AdamW(lr=3e-3), ENDS, **options)
    assert plain.slopes(plain.change)["logits"] > 0.25


@pytest.mark.parametrize(
    ("maker", "projection", "first"),
    [(mamba, "x_proj", lambda m: m.dt_rank), (mamba2, "in_proj", lambda m: 2 * m.inner)],
)
def test_b_and_c_of_states_do_not_depend_on_the_width(maker, projection, first):
    """Neither at the start nor in what training changes, though a state does not grow (``mup.py``)."""
    start, change = [], []
    for width in WIDTHS:
        torch.manual_seed(0)
        model = maker(width, **MUP)
        tokens = torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))
        mixer, seen = model.blocks[1].mixer, []
        rows = slice(first(mixer), first(mixer) + 2 * mixer.state_dim)
        getattr(mixer, projection).register_forward_hook(
            lambda module, args, output, seen=seen, rows=rows: seen.append(
                output[..., rows].detach()
            )
        )
        model(tokens)
        train_steps(model, AdamW(lr=3e-3), tokens, 5)
        model(tokens)
        start.append(rms(seen[0]))
        change.append(rms(seen[-1] - seen[0]))
    assert abs(slope(WIDTHS, start)) <= 0.1
    assert abs(slope(WIDTHS, change)) <= 0.1


def test_first_weights_on_paper():
    """r = 4: variances of ``mup``'s table; ends of branches over 4, for 2 layers have 4 branches."""
    torch.manual_seed(0)
    model = moe(256, **MUP)
    block = model.blocks[1]
    heads = block.mixer.n_heads * block.mixer.head_dim
    assert not block.mixer.qkv.weight[:heads].any() and not model.head.weight.any()
    for weight, variance in (
        (block.mixer.qkv.weight[heads:], 1 / 256),
        (block.mixer.out.weight, 1 / 256 / 4),
        (block.feed_forward.up.weight, 1 / 256),
        (block.feed_forward.down.weight, 1 / 512 / 4),
        (block.feed_forward.router.weight, 1 / 4 / 256),
        (model.embedding.weight, 1.0),
    ):
        assert rms(weight.detach()) ** 2 == pytest.approx(variance, rel=0.1)
    tied = transformer(256, tie_embeddings=True, **MUP)
    assert rms(tied.embedding.weight.detach()) ** 2 == pytest.approx(1 / 64, rel=0.1)
    scaled = transformer(256, tie_embeddings=True, embedding_scale=True, **MUP)
    assert rms(scaled.embedding.weight.detach()) ** 2 == pytest.approx(1 / 64 / 4, rel=0.1)


def test_queries_of_latent_attention_start_at_zero():
    for rank in (0, 24):
        model = Transformer(VOCAB, 64, 1, 4, attention="mla", mla_q_rank=rank, **MUP)
        context = model.context(torch.zeros(1, 5, dtype=torch.int64), None, None)
        queries, kept = model.blocks[0].mixer.compressed(torch.randn(1, 5, 64), context)
        assert queries.shape == (1, 5, 4, 24) and not queries.any() and kept.any()


def test_multipliers_on_paper():
    """Attention's logits times 4 / head_dim; a tied head's times 1 / r, or 1 / sqrt(r) when embedded
    tokens are multiplied by sqrt(dim); at r = 1 and heads of 16 both are what they always are.
    """
    assert wide_heads(256, **MUP).blocks[0].mixer.scale == pytest.approx(4 / 64)
    assert transformer(256, **MUP).blocks[0].mixer.scale == pytest.approx(4 / 16)
    for scale, expected in ((False, 1 / 4), (True, 1 / 2)):
        options = {"tie_embeddings": True, "embedding_scale": scale}
        model = transformer(256, **options, **MUP)
        hidden = torch.randn(3, 256)
        wanted = expected * hidden @ model.embedding.weight.T
        torch.testing.assert_close(model.logits(hidden), wanted)
    assert transformer(256, **MUP).logit_scale == 1.0


def rates(model, optimizer):
    """Learning rate and weight decay of every parameter, by name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.build(model).param_groups
        for parameter in group["params"]
    }


def test_rates_on_paper():
    """r = 4. AdamW: 1 / r for every linear map and the head, 1 for the rest. What decay takes off in a
    step is the same at every width. Muon's updates have the norm 0.2 sqrt(larger size): sqrt(r) times too
    large where both sizes grow; the router's shall go as sqrt(1 / r), and goes as sqrt(r).
    """
    model = moe(256, **MUP)
    found = rates(model, AdamW(lr=1.0, weight_decay=0.1))
    block = "blocks.0."
    for name in ("mixer.qkv.weight", "mixer.out.weight", "feed_forward.up.weight"):
        assert found[block + name] == pytest.approx((1 / 4, 0.4))
    for name in ("feed_forward.down.weight", "feed_forward.router.weight"):
        assert found[block + name] == pytest.approx((1 / 4, 0.4))
    assert found["head.weight"] == pytest.approx((1 / 4, 0.4))
    assert found["embedding.weight"] == (1.0, 0.0)
    assert found[block + "mixer_norm.weight"] == (1.0, 0.0)
    for adjust, matrix, router in (
        ("match_rms_adamw", 1 / 2, 1 / 4),
        ("original", 1.0, 1 / 2),
    ):
        found = rates(model, Muon(lr=1.0, adamw_lr=2.0, weight_decay=0.1, adjust_lr=adjust))
        assert found[block + "mixer.qkv.weight"] == pytest.approx((matrix, 0.1 / matrix))
        assert found[block + "feed_forward.down.weight"][0] == pytest.approx(matrix)
        assert found[block + "feed_forward.router.weight"][0] == pytest.approx(router)
        assert found["head.weight"] == pytest.approx((2 / 4, 0.4))
        assert found["embedding.weight"][0] == 2.0
    tied = transformer(256, tie_embeddings=True, embedding_scale=True, **MUP)
    assert rates(tied, AdamW(lr=1.0))["embedding.weight"][0] == pytest.approx(1 / 2)


@pytest.mark.parametrize("maker", MAKERS)
def test_at_the_base_width_all_but_zeros_is_as_scaled(maker):
    torch.manual_seed(0)
    found = dict(maker(BASE, **MUP).named_parameters())
    torch.manual_seed(0)
    model = maker(BASE)
    for name, parameter in model.named_parameters():
        if name == "head.weight" or name.endswith("queries.weight"):
            assert not found[name].any()
            continue
        skip = BASE if name.endswith("qkv.weight") else 0
        assert torch.equal(found[name][skip:], parameter[skip:])
    scales = rates(maker(BASE, **MUP), AdamW(lr=1.0))
    assert {rate for rate, _ in scales.values()} == {1.0}


@pytest.mark.parametrize("maker", [transformer, moe, mamba, mamba2])
@pytest.mark.parametrize(
    "options",
    [{"initialization": "mup"}, {"mup_base_dim": 64}, {"initialization": "mup", "mup_base_dim": 0}],
)
def test_half_of_it_is_refused(maker, options):
    with pytest.raises(ToolmemError, match="mup_base_dim"):
        maker(64, **options)


def test_slopes_are_of_powers():
    widths = [2, 4, 8]
    assert slope(widths, [3 * w**0.5 for w in widths]) == pytest.approx(0.5)
    assert math.isnan(slope(widths, [1.0, 0.0, 1.0]))
    made = WidthScan(widths, start={"a": [1.0, 2.0, 4.0]})
    assert made.slopes(made.start) == {"a": pytest.approx(1.0)}
