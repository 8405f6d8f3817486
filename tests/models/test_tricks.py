"""Each trick of the Transformer against its paper's formula, written plainly in float64.

The reference reads the model's weights and options and nothing of its code: token by token, head by
head. docs/tricks.md says where each formula is from.
"""

import math

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.models.layers import FeedForward

SEQ, VOCAB, DIM = 11, 30, 16


def make(**options):
    torch.manual_seed(0)
    keys = {"n_heads": 2, "max_seq_len": 32, "n_layers": 3} | options
    model = Transformer(VOCAB, DIM, **keys)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


def rms_norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def short_convolution(x, module):
    """Canon: y_t = x_t + sum_j w_j x_{t-j}, zeros before the first token."""
    taps = module.taps.view(module.width, -1)
    rows = []
    for t in range(len(x)):
        rows.append(x[t] + sum(taps[j] * x[t - j] for j in range(module.width) if t >= j))
    return torch.stack(rows)


def turned(vector, place, width, base):
    """RoPE on the first ``width`` numbers, pairs (i, i + width / 2)."""
    out = vector.clone()
    for i in range(width // 2):
        angle = place * base ** (-2 * i / width)
        a, b = vector[i], vector[i + width // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + width // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def capped(x, cap):
    return cap * torch.tanh(x / cap) if cap else x


def sees(args, layer, spans, query, key):
    """May this query look at this key, in this layer?"""
    pattern = args["window"] if isinstance(args["window"], list) else [args["window"]]
    window = pattern[layer % len(pattern)]
    if window and abs(query - key) >= window:
        return False
    both_ways = args["attention_mask"] == "prefix" and spans[query] >= 0
    return key <= query or (both_ways and spans[query] == spans[key])


def attention(args, mixer, x, layer, spans, first_values):
    """One layer's attention, and its values before mixing (the first layer's serve them all)."""
    n, h = len(x), args["n_heads"]
    k = args["n_kv_heads"] or h
    d = args["dim"] // h
    heads = (x @ mixer.qkv.weight.T).view(n, h + 2 * k, d)
    queries, keys, values = heads[:, :h], heads[:, h : h + k], heads[:, h + k :]
    own_values = values
    if args["qk_norm"]:
        queries, keys = rms_norm(queries, mixer.q_norm), rms_norm(keys, mixer.k_norm)
    positions = args["position"] == "rope"
    if args["nope_every"] and (layer + 1) % args["nope_every"] == 0:
        positions = False
    if positions:
        width = max(2, 2 * round(d * args["rope_fraction"] / 2))
        queries, keys = (
            torch.stack(
                [
                    torch.stack([turned(one, t, width, args["rope_base"]) for one in row])
                    for t, row in enumerate(part)
                ]
            )
            for part in (queries, keys)
        )
    if args["value_residual"] and first_values is not None:
        values = mixer.value_mix[0] * first_values + mixer.value_mix[1] * values
    out = torch.zeros(n, h, d, dtype=x.dtype)
    for t in range(n):
        seen = [j for j in range(n) if sees(args, layer, spans, t, j)]
        for head in range(h):
            group = head * k // h
            scores = torch.stack([queries[t, head] @ keys[j, group] for j in seen]) / math.sqrt(d)
            scores = capped(scores, args["attention_softcap"])
            weights = scores.exp() / scores.exp().sum()
            out[t, head] = sum(w * values[j, group] for w, j in zip(weights, seen, strict=True))
    return out.reshape(n, -1) @ mixer.out.weight.T, own_values


def feed_forward(kind, module, x):
    x = x @ module.up.weight.T
    if kind == "swiglu":  # SiLU(W x) * V x
        gate, value = x.chunk(2, -1)
        x = gate / (1 + (-gate).exp()) * value
    elif kind == "relu2":  # max(0, x)^2
        x = torch.where(x > 0, x * x, 0)
    return x @ module.down.weight.T


def plain_forward(model, row, spans):
    args = model.init_args
    x = model.embedding.weight[row]
    if args["embedding_scale"]:
        x = x * math.sqrt(args["dim"])
    if args["embedding_norm"]:
        x = rms_norm(x, model.embedding_norm)
    first_values = None
    for layer, block in enumerate(model.blocks):
        y = rms_norm(x, block.mixer_norm)
        if args["residual_conv"]:
            y = short_convolution(y, block.mixer_conv)
        y, values = attention(args, block.mixer, y, layer, spans, first_values)
        first_values = values if first_values is None else first_values
        if args["sandwich_norm"]:
            y = rms_norm(y, block.mixer_post_norm)
        x = x + y
        y = rms_norm(x, block.feed_forward_norm)
        if args["residual_conv"]:
            y = short_convolution(y, block.feed_forward_conv)
        y = feed_forward(args["feed_forward"], block.feed_forward, y)
        if args["sandwich_norm"]:
            y = rms_norm(y, block.feed_forward_post_norm)
        x = x + y
    head = model.embedding if args["tie_embeddings"] else model.head
    return capped(rms_norm(x, model.norm) @ head.weight.T, args["logit_softcap"])


TRICKS = {
    "qk_norm": {"qk_norm": True},
    "logit_softcap": {"logit_softcap": 1.5},
    "attention_softcap": {"attention_softcap": 0.7},
    "embedding_norm": {"embedding_norm": True},
    "embedding_scale": {"embedding_scale": True},
    "tie_embeddings": {"tie_embeddings": True},
    "relu2": {"feed_forward": "relu2"},
    "swiglu": {"feed_forward": "swiglu"},
    "sandwich_norm": {"sandwich_norm": True},
    "value_residual": {"value_residual": True},
    "rope_fraction": {"rope_fraction": 0.5},
    "nope_every": {"nope_every": 2},
    "window": {"window": [4, 0]},
    "n_kv_heads": {"n_heads": 4, "n_kv_heads": 2},
    "residual_conv": {"residual_conv": 3},
    "prefix": {"attention_mask": "prefix"},
    "all": {
        "n_heads": 4,
        "n_kv_heads": 1,
        "qk_norm": True,
        "logit_softcap": 2.0,
        "attention_softcap": 1.0,
        "embedding_norm": True,
        "embedding_scale": True,
        "tie_embeddings": True,
        "feed_forward": "relu2",
        "sandwich_norm": True,
        "value_residual": True,
        "rope_fraction": 0.5,
        "nope_every": 3,
        "window": [5, 0],
        "residual_conv": 2,
        "attention_mask": "prefix",
    },
}


def in_float64(model):
    model = model.double()
    if model.rotary:  # the tables themselves, for they are kept in float32
        width, base = model.rotary_cos.shape[-1], model.init_args["rope_base"]
        pairs = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.arange(32, dtype=torch.float64)[:, None] * pairs
        cos, sin = angles.cos(), angles.sin()
        model.rotary_cos = torch.cat((cos, cos), -1)[:, None]
        model.rotary_sin = torch.cat((-sin, sin), -1)[:, None]
    return model


def rows():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, SEQ), generator=generator)
    spans = torch.tensor([[0] * 5 + [-1] * 3 + [2] * 3, [-1] * 2 + [1] * 4 + [-1] * 5])
    return tokens, spans


@pytest.mark.parametrize("options", TRICKS.values(), ids=TRICKS)
@torch.no_grad()
def test_equals_the_formula(options):
    model = in_float64(make(**options))
    tokens, spans = rows()
    found = model(tokens, spans=spans)
    for row, span, logits in zip(tokens, spans, found, strict=True):
        expected = plain_forward(model, row, span.tolist())
        torch.testing.assert_close(logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", sorted(set(TRICKS) - {"swiglu", "tie_embeddings"}))
@torch.no_grad()
def test_each_trick_does_something(name):
    """Else the test above could compare a plain model with itself."""
    tokens, spans = rows()
    with_it = make(**TRICKS[name])
    without = make()
    state = without.state_dict()
    same = {
        k: v for k, v in with_it.state_dict().items() if k in state and v.shape == state[k].shape
    }
    without.load_state_dict(same, strict=False)
    assert not torch.allclose(with_it(tokens, spans=spans), without(tokens, spans=spans), atol=1e-3)


@pytest.mark.parametrize("cap", [0.5, 4.0])
def test_a_softcap_is_a_bound_with_slope_one_at_zero(cap):
    model = make(logit_softcap=cap)
    hidden = torch.randn(100, DIM)
    raw = model.head(100 * hidden)
    assert model.logits(100 * hidden).abs().max() <= cap < raw.abs().max()
    small = 1e-3 * hidden
    torch.testing.assert_close(model.logits(small), model.head(small), atol=1e-6, rtol=1e-3)


def test_parameters_that_tricks_add_on_paper():
    def total(**options):
        return sum(make(**options).parameter_counts().values())

    plain = total()
    assert total(tie_embeddings=True) == plain - VOCAB * DIM
    assert total(qk_norm=True) == plain + 3 * 2 * 8
    assert total(embedding_norm=True) == plain + DIM
    assert total(sandwich_norm=True) == plain + 3 * 2 * DIM
    assert total(value_residual=True) == plain + 3 * 2
    assert total(residual_conv=4) == plain + 3 * 2 * 4 * DIM
    assert total(n_kv_heads=1) == plain - 3 * 2 * 8 * DIM
    assert total(feed_forward="relu2") == plain - 3 * DIM * 4 * DIM
    for free in ({"logit_softcap": 1.0}, {"attention_softcap": 1.0}, {"window": 4}):
        assert total(**free) == plain
    for free in ({"nope_every": 2}, {"rope_fraction": 0.5}, {"attention_mask": "prefix"}):
        assert total(**free) == plain


def test_relu2_against_torch():
    layer = FeedForward(6, 9, "relu2")
    x = torch.randn(4, 6)
    expected = torch.relu(layer.up(x)).pow(2) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_fraction": 0.0},
        {"rope_fraction": 1.5},
        {"nope_every": -1},
        {"window": []},
        {"window": [-1]},
        {"logit_softcap": -1.0},
        {"attention_softcap": -1.0},
        {"residual_conv": -1},
        {"attention_mask": "full"},
    ],
)
def test_what_cannot_be_is_refused_by_name(options):
    with pytest.raises(ToolmemError, match=next(iter(options))):
        make(**options)
