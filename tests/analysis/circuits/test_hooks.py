"""Hook points: right values against the forward pass written plainly, on every architecture, and no trace."""

from __future__ import annotations

import math

import pytest
import torch
from circuits_toys import HEAD, VOCAB, induction, repeats

from toolmem.analysis.circuits import hook_points, record, recording, tapped
from toolmem.errors import ToolmemError
from toolmem.models import RNN, Hybrid, LinearAttention, Mamba, Mamba2, MoETransformer, Transformer

SMALL = {"vocab_size": 11, "dim": 8, "n_layers": 2, "max_seq_len": 32}
ATTENTION = {f"mixer.{name}" for name in ("queries", "keys", "values", "scores", "weights")}
MODELS = {
    "transformer": lambda: Transformer(**SMALL, n_heads=4, n_kv_heads=2, conv_width=3, window=[4, 0]),
    "every option": lambda: Transformer(
        **SMALL, n_heads=2, sandwich_norm=True, residual_conv=3, qk_norm=True, value_residual=True,
        attention_softcap=5.0, logit_softcap=7.0, embedding_norm=True, norm="layer", bias=True,
        attention_mask="prefix", tie_embeddings=True, embedding_scale=True,
    ),
    "latent": lambda: Transformer(**SMALL, n_heads=2, attention="mla"),
    "experts": lambda: MoETransformer(
        **SMALL, n_heads=2, n_experts=4, dense_layers=1, n_shared_experts=1
    ),
    "mamba": lambda: Mamba(**SMALL),
    "mamba2": lambda: Mamba2(**SMALL, head_dim=4),
    "rnn": lambda: RNN(**SMALL, cell="mingru"),
    "linear attention": lambda: LinearAttention(**SMALL, n_heads=2),
    "hybrid": lambda: Hybrid(
        **SMALL, pattern=["mamba1", "attention"], mixers={"attention": {"n_heads": 2}},
        feed_forward=["none", "silu"],
    ),
}  # fmt: skip
# heads in both layers; attention in these layers; neurons in these layers
HAS = {
    "transformer": ({0, 1}, {0, 1}, {0, 1}),
    "every option": ({0, 1}, {0, 1}, {0, 1}),
    "latent": ({0, 1}, {0, 1}, {0, 1}),
    "experts": ({0, 1}, {0, 1}, {0}),
    "mamba": (set(), set(), set()),
    "mamba2": ({0, 1}, set(), set()),
    "rnn": (set(), set(), {0, 1}),
    "linear attention": ({0, 1}, set(), {0, 1}),
    "hybrid": ({1}, {1}, {1}),
}


def made(name: str):
    """A model with every weight drawn, in float64, and a batch of tokens."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, torch.randint(SMALL["vocab_size"], (2, 9))


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_has_the_points_that_make_sense(name):
    model, tokens = made(name)
    points = hook_points(model)
    heads, attention, neurons = HAS[name]
    for layer in (0, 1):
        here = {
            p.removeprefix(f"blocks.{layer}.") for p in points if p.startswith(f"blocks.{layer}.")
        }
        assert {"input", "output", "mixer.input", "mixer.output"} <= here
        assert here & ATTENTION == (ATTENTION if layer in attention else set())
        assert ("mixer.heads" in here) == (layer in heads)
        assert ("feed_forward.hidden" in here) == (layer in neurons)
    found = record(model, tokens, points)
    assert list(found) and set(found) == set(points)
    sizes = {"batch": 2, "seq": 9, "key": 9, "dim": 8, "vocab": 11}
    for point, axes in points.items():
        assert found[point].ndim == len(axes), point
        for axis, size in zip(axes, found[point].shape, strict=True):
            assert sizes.get(axis, size) == size, point


@pytest.mark.parametrize("name", MODELS)
def test_the_stream_is_the_sum_of_what_is_added_to_it(name):
    model, tokens = made(name)
    points = hook_points(model)
    found = record(model, tokens, points)
    stream = found["embedding"]
    for layer in (0, 1):
        assert torch.equal(found[f"blocks.{layer}.input"], stream)
        for branch in ("mixer", "feed_forward"):
            if (point := f"blocks.{layer}.{branch}.output") in points:
                stream = stream + found[point]
        torch.testing.assert_close(found[f"blocks.{layer}.output"], stream, rtol=0, atol=1e-12)
    assert torch.equal(found["norm"], model.norm(found["blocks.1.output"]))
    torch.testing.assert_close(found["logits"], model(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_put_back_changes_nothing(name):
    model, tokens = made(name)
    points = hook_points(model)
    found = record(model, tokens, points)
    for point in points:
        with (
            plain_attention(model),
            recording(model, ["logits"]) as again,
            tapped(model, {point: lambda x, p=point: found[p]}),
        ):
            model(tokens)
        assert torch.equal(again["logits"], found["logits"]), point


def plain_attention(model):
    return tapped(model, {p: lambda x: None for p in hook_points(model) if p.endswith("weights")})


@pytest.mark.parametrize("name", MODELS)
def test_what_is_changed_at_a_point_is_seen_after_it_and_not_before(name):
    model, tokens = made(name)
    points = list(hook_points(model))
    found = record(model, tokens, points)
    for number, point in enumerate(points):
        with torch.no_grad(), tapped(model, {point: lambda x: x + torch.randn_like(x)}):
            changed = record(model, tokens, points)
        assert not torch.equal(changed[point], found[point]), point
        same = {"embedding": ["blocks.0.input"], "norm": []}.get(point, [])
        for earlier in points[:number]:
            twins = {earlier, point} == {"embedding", "blocks.0.input"}
            # keys are not made of queries, but stand after them in the list
            assert twins or torch.equal(changed[earlier], found[earlier]), (point, earlier)
        assert all(not torch.equal(changed[twin], found[twin]) for twin in same)
        if "mixer.scores" not in point:  # a shift of all that softmax is given may be nothing
            assert not torch.equal(changed["logits"], found["logits"]), point


def test_values_against_attention_written_plainly():
    model = induction()
    tokens = repeats(2)
    points = hook_points(model)
    found = record(model, tokens, points)
    with torch.no_grad():
        x = model.embedding.weight[tokens] + model.position_embedding.weight[: tokens.shape[1]]
        assert torch.equal(found["embedding"], x)
        for layer, block in enumerate(model.blocks):
            y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * block.mixer_norm.weight
            torch.testing.assert_close(found[f"blocks.{layer}.mixer.input"], y, rtol=0, atol=1e-12)
            q, k, v = (y @ block.mixer.qkv.weight.T).unflatten(-1, (3, 2, HEAD)).unbind(-3)
            added = torch.zeros_like(x)
            for h in (0, 1):
                scores = q[:, :, h] @ k[:, :, h].mT / math.sqrt(HEAD)
                later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
                scores = scores.masked_fill(later, -math.inf)
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                z = weights @ v[:, :, h]
                added += z @ block.mixer.out.weight[:, h * HEAD : (h + 1) * HEAD].T
                pairs = {
                    "queries": q[:, :, h], "keys": k[:, :, h], "values": v[:, :, h],
                    "scores": scores, "weights": weights, "heads": z,
                }  # fmt: skip
                for part, value in pairs.items():
                    seen = found[f"blocks.{layer}.mixer.{part}"][:, h]
                    torch.testing.assert_close(seen, value, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(
                found[f"blocks.{layer}.mixer.output"], added, rtol=0, atol=1e-10
            )
            x = x + added
            y = (
                x
                / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                * block.feed_forward_norm.weight
            )
            up = y @ block.feed_forward.up.weight.T
            hidden = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
            seen = found[f"blocks.{layer}.feed_forward.hidden"]
            torch.testing.assert_close(seen, hidden, rtol=1e-9, atol=1e-12)
            x = x + hidden @ block.feed_forward.down.weight.T
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
        torch.testing.assert_close(found["logits"], y @ model.head.weight.T, rtol=0, atol=1e-9)


def hooks_of(model) -> list:
    return [
        *(m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks),
        *(m for m in model.modules() if {"attend", "weights", "scores", "logits"} & set(vars(m))),
    ]


def test_nothing_stays_behind_not_even_after_an_error():
    model, tokens = induction(), repeats(1)
    points = hook_points(model)
    plain = model(tokens)
    with (
        pytest.raises(RuntimeError, match="in the middle"),
        tapped(model, dict.fromkeys(points, fail)),
    ):
        model(tokens)
    assert hooks_of(model) == [] and model.attention_kernel == "auto"
    with recording(model, points), recording(model, points):
        assert hooks_of(model)
        with (
            pytest.raises(ToolmemError),
            tapped(model, {"logits": fail, "blocks.0.mixer.wieghts": fail}),
        ):
            pass
        model(tokens)
    assert hooks_of(model) == [] and model.attention_kernel == "auto"
    assert torch.equal(model(tokens), plain)


def fail(x):
    raise RuntimeError("in the middle")


def test_nested_taps_the_outer_first():
    model, tokens = induction(), repeats(1)
    for point in hook_points(model):
        order = []
        with tapped(model, {point: lambda x, order=order: order.append("outer")}):
            with tapped(model, {point: lambda x, order=order: order.append("inner")}):
                model(tokens)
            model(tokens)
        assert order == ["outer", "inner", "outer"], point


def test_what_is_no_point_is_named():
    with pytest.raises(
        ToolmemError, match=r"blocks\.0\.mixer\.weights.*Mamba.*blocks\.0\.mixer\.input"
    ):
        record(made("mamba")[0], torch.zeros(1, 3, dtype=torch.int64), ["blocks.0.mixer.weights"])
    with pytest.raises(ToolmemError, match=r"blocks\.7\.output.*embedding"):
        record(induction(), torch.zeros(1, 3, dtype=torch.int64), ["blocks.7.output"])


def test_the_toy_model_says_what_followed():
    tokens = repeats(4)
    said = induction()(tokens).argmax(-1)
    assert torch.equal(said[:, 10:-1], tokens[:, 11:]) and VOCAB == 20
