"""Multi-head latent attention: against transformers' DeepSeek-V3, against plain maths, and its cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.models.attention import rotary_tables
from toolmem.models.context import Context
from toolmem.models.mla import LatentAttention

OPTIONS = {
    "plain": {},
    "query rank": {"mla_q_rank": 6},
    "conv": {"conv_width": 3, "residual_conv": 2},
    "no positions": {"position": "none"},
    "learned": {"position": "learned", "norm": "layer", "bias": True},
    "window, softcap, nope": {"window": [4, 0], "attention_softcap": 2.0, "nope_every": 2},
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    keys = {"n_heads": 2, "max_seq_len": 48, "attention": "mla", "mla_kv_rank": 6} | options
    model = Transformer(40, 16, 2, **keys).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def tokens(batch=2, seq=13, seed=1):
    return torch.randint(40, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("q_rank", [10, None])
def test_equals_deepseek_v3(q_rank):
    import transformers
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs

    config = transformers.DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=q_rank,
        kv_lora_rank=12,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=8,
        rope_interleave=False,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    other = theirs.DeepseekV3Attention(config, layer_idx=0).eval()
    for parameter in other.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter) + (parameter.ndim == 1)
    eps = other.kv_a_layernorm.variance_epsilon
    ours = LatentAttention(32, 4, 8, 12, 6, q_rank or 0, norm_eps=eps).eval()
    queries = other.q_proj if q_rank is None else other.q_a_proj
    state = {
        "compress.weight": torch.cat((queries.weight, other.kv_a_proj_with_mqa.weight)),
        "kv_norm.weight": other.kv_a_layernorm.weight,
        "keys_values.weight": other.kv_b_proj.weight,
        "out.weight": other.o_proj.weight,
    }
    if q_rank is not None:
        state["q_norm.weight"] = other.q_a_layernorm.weight
        state["queries.weight"] = other.q_b_proj.weight
    ours.load_state_dict(state)
    x = torch.randn(2, 11, 32)
    places = torch.arange(11)[None]
    rotary = theirs.DeepseekV3RotaryEmbedding(config)(x, places)
    mask = torch.full((11, 11), float("-inf")).triu(1)[None, None]
    with torch.no_grad():
        expected = other(x, position_embeddings=rotary, attention_mask=mask)[0]
        base = config.rope_parameters["rope_theta"]
        cos, sin = rotary_tables(6, 11, base)
        found = ours(x, Context(torch.arange(11), rotary=(cos, sin)))
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


def plain_attention(layer, x, rope_base):
    """The paper's equations (37) to (47), token by token and head by head, in float64."""
    n, h, d, r = len(x), layer.n_heads, layer.head_dim, layer.rope_dim
    w = layer.compress.weight
    w_q, w_c, w_kr = w.split(layer.widths)

    def norm(vector, module):
        return vector / (vector.square().mean() + module.eps).sqrt() * module.weight

    def turn(vector, place):
        out = vector.clone()
        for i in range(r // 2):
            angle = place * rope_base ** (-2 * i / r)
            a, b = vector[i], vector[i + r // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + r // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    latents = [norm(w_c @ one, layer.kv_norm) for one in x]
    position_keys = [turn(w_kr @ one, place) for place, one in enumerate(x)]
    rows = []
    for t in range(n):
        query = w_q @ x[t]
        if layer.q_norm is not None:
            query = layer.queries.weight @ norm(query, layer.q_norm)
        heads = []
        for head in range(h):
            own = query[head * (d + r) : (head + 1) * (d + r)]
            w_uk = layer.keys_values.weight[head * 2 * d : head * 2 * d + d]
            w_uv = layer.keys_values.weight[head * 2 * d + d : head * 2 * d + 2 * d]
            scores = [
                (own[:d] @ (w_uk @ latents[j]) + turn(own[d:], t) @ position_keys[j])
                / math.sqrt(d + r)
                for j in range(t + 1)
            ]
            weights = torch.stack(scores).softmax(0)
            heads.append(sum(weights[j] * (w_uv @ latents[j]) for j in range(t + 1)))
        rows.append(layer.out.weight @ torch.cat(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("q_rank", [0, 5])
def test_both_forms_equal_the_paper_in_float64(q_rank):
    torch.manual_seed(0)
    layer = LatentAttention(16, 2, 6, 7, 4, q_rank).double().eval()
    layer.kv_norm.weight.data += 0.3 * torch.randn(7)
    x = torch.randn(9, 16, dtype=torch.float64)
    angles = torch.arange(9.0)[:, None].double() * 100.0 ** (
        -torch.arange(0, 4, 2, dtype=torch.float64) / 4
    )
    cos, sin = angles.cos(), angles.sin()
    rotary = (torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    context = Context(torch.arange(9), rotary=rotary)
    with torch.no_grad():
        expected = plain_attention(layer, x, 100.0)
        torch.testing.assert_close(layer(x[None], context)[0], expected, atol=1e-12, rtol=0)
        queries, kept = layer.compressed(x[None], context)
        found = layer.absorbed(queries, kept, None)[0]
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@st.composite
def splits(draw):
    """Lengths of ragged lanes, and for each the sizes of the chunks it comes in (0: it waits)."""
    lanes, n_chunks = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    sizes = st.lists(st.integers(0, 7), min_size=n_chunks, max_size=n_chunks)
    return [draw(sizes) for _ in range(lanes)]


def decode(model, texts, sizes):
    """Logits of ragged lanes fed in chunks of these sizes."""
    cache = model.new_cache(len(sizes), max(1, max(sum(one) for one in sizes)))
    found, position = [[] for _ in sizes], [0] * len(sizes)
    for chunk in zip(*sizes, strict=True):
        width = max(1, *chunk)
        rows = torch.full((len(sizes), width), 39)
        for lane, n in enumerate(chunk):
            rows[lane, :n] = texts[lane][position[lane] : position[lane] + n]
        counts = None if all(n == width for n in chunk) else torch.tensor(chunk)
        logits = model(rows, cache=cache, counts=counts)
        for lane, n in enumerate(chunk):
            found[lane].append(logits[lane, :n])
            position[lane] += n
    return [torch.cat(pieces) for pieces in found]


@pytest.mark.parametrize("name", OPTIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(sizes=splits())
@torch.no_grad()
def test_any_split_gives_the_full_forward(name, sizes):
    model = make(**OPTIONS[name])
    texts = [tokens(1, sum(one), seed=lane)[0] for lane, one in enumerate(sizes)]
    for text, logits in zip(texts, decode(model, texts, sizes), strict=True):
        if len(text):
            torch.testing.assert_close(logits, model(text[None])[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_lanes_are_reordered_and_go_to_the_host_and_back():
    model = make(conv_width=3)
    x = tokens(3, 8)
    cache = model.new_cache(3, 8)
    model(x, cache=cache)
    cache.reserve(12)
    kept = cache.detach(torch.tensor([2]))
    cache.gather(torch.tensor([1, 0]))
    cache.restore(kept)
    more = tokens(3, 4, seed=5)
    found = model(more, cache=cache)
    whole = torch.cat((x[[1, 0, 2]], more), dim=1)
    torch.testing.assert_close(found, model(whole)[:, 8:], atol=1e-4, rtol=0)


@torch.no_grad()
def test_documents_give_what_rows_of_their_own_give():
    model = make(conv_width=3, mla_q_rank=6)
    x, lengths = tokens(1, 20), [3, 1, 16]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    packed = model(x, documents=documents)[0].split(lengths)
    for part, row in zip(packed, x[0].split(lengths), strict=True):
        torch.testing.assert_close(part, model(row[None])[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_prefix_spans_are_cached_as_they_are_trained():
    model = make(attention_mask="prefix")
    x = tokens(1, 10)
    spans = torch.tensor([[0] * 4 + [-1] * 3 + [1] * 3])
    whole = model(x, spans=spans)
    cache = model.new_cache(1, 10)
    chunks = [(0, 4), (4, 5), (5, 7), (7, 10)]
    pieces = [model(x[:, a:b], cache=cache, spans=spans[:, a:b]) for a, b in chunks]
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-4, rtol=0)
    assert not torch.allclose(whole, model(x), atol=1e-4)


def test_cache_bytes_on_paper():
    """DeepSeek-V2's sizes: 4.5 head_dim numbers a token and layer, 2 n_heads head_dim without."""
    sizes = {"vocab_size": 10, "dim": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 8}
    latent = Transformer(**sizes, attention="mla")
    heads = Transformer(**sizes)
    lanes, slots, layers, bytes_each = 2, 8 + 1, 3, 4
    per_token = 4 * 16 + 16 // 2
    assert per_token == 4.5 * 16
    assert latent.new_cache(2, 8).size_in_bytes() == lanes * slots * layers * per_token * bytes_each
    assert heads.new_cache(2, 8).size_in_bytes() == lanes * slots * layers * 2 * 64 * bytes_each
    assert per_token < 2 * 64
    # as large as 2.25 groups of keys and values, whatever the number of heads
    wide = Transformer(10, 256, 1, 16, head_dim=16, attention="mla", max_seq_len=8)
    assert wide.new_cache(1, 8).size_in_bytes() == slots * per_token * bytes_each


def test_parameters_on_paper():
    model = Transformer(
        40, 16, 2, 2, attention="mla", mla_kv_rank=6, mla_q_rank=5, mla_rope_dim=4, conv_width=3
    )
    first = 5 + 6 + 4
    each = 16 * first + 3 * first + 5 * 2 * (8 + 4) + 6 * 2 * 2 * 8 + 16 * 16
    counts = model.parameter_counts()
    assert counts["attention"] == 2 * each
    assert counts["norm"] == 2 * (2 * 16 + 5 + 6) + 16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_kv_heads": 1}, ["n_kv_heads", "attention: mla"]),
        ({"qk_norm": True}, ["qk_norm"]),
        ({"value_residual": True}, ["value_residual"]),
        ({"rope_fraction": 0.5}, ["rope_fraction"]),
        ({"mla_kv_rank": 0}, ["kv_rank is 0"]),
        ({"mla_q_rank": -1}, ["q_rank -1"]),
        ({"mla_rope_dim": 3}, ["rope_dim is 3", "even"]),
        ({"mla_rope_dim": 0}, ["mla_rope_dim", "position: none"]),
        ({"attention": "gqa"}, ["mla_", "attention: mla"]),
        ({"attention": "linear"}, ["attention", "gqa"]),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ToolmemError) as error:
        make(**change)
    assert all(word in str(error.value) for word in words)


def test_trains_in_bf16_autocast():
    model = make(mla_q_rank=6)
    x = tokens()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
        cache = model.new_cache(2, 13)
        model(x[:, :6], cache=cache)
        step = model(x[:, 6:], cache=cache)
    torch.testing.assert_close(low.float(), model(x), atol=0.15, rtol=0.1)
    torch.testing.assert_close(step.float(), model(x)[:, 6:], atol=0.15, rtol=0.1)
    low.float().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    model = make(mla_q_rank=6, conv_width=3)
    hidden = torch.compile(model.hidden, dynamic=True, fullgraph=True)
    for batch, seq in ((2, 13), (3, 40)):
        x = tokens(batch, seq)
        torch.testing.assert_close(hidden(x), model.hidden(x), atol=1e-5, rtol=0)
