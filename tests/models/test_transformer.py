"""The Transformer against public implementations and the same maths in float64."""

import math

import pytest
import torch
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.models.attention import rotary_tables, rotate


def tokens(batch=2, seq=13, vocab=50, seed=1):
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))


def shaken(model, seed=0, std=0.1):
    """The model with gains, biases and taps moved away from where they start."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_equals_llama(n_kv_heads):
    import transformers  # a dev dependency: without it the suite must fail, not pass it over

    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=n_kv_heads,
        intermediate_size=48,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attention_bias=False,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config)
    shaken(theirs)
    ours = Transformer(50, 32, 3, 4, n_kv_heads, hidden_dim=48, max_seq_len=64).eval()
    state = {
        "embedding.weight": theirs.model.embed_tokens.weight,
        "norm.weight": theirs.model.norm.weight,
        "head.weight": theirs.lm_head.weight,
    }
    for i, layer in enumerate(theirs.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = (attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)
        state |= {
            f"blocks.{i}.mixer.qkv.weight": torch.cat(qkv),
            f"blocks.{i}.mixer.out.weight": attention.o_proj.weight,
            f"blocks.{i}.feed_forward.up.weight": torch.cat(
                (mlp.gate_proj.weight, mlp.up_proj.weight)
            ),
            f"blocks.{i}.feed_forward.down.weight": mlp.down_proj.weight,
            f"blocks.{i}.mixer_norm.weight": layer.input_layernorm.weight,
            f"blocks.{i}.feed_forward_norm.weight": layer.post_attention_layernorm.weight,
        }
    ours.load_state_dict(state)
    x = tokens(seq=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=0)


def test_equals_gpt2():
    import transformers  # a dev dependency: without it the suite must fail, not pass it over

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, activation_function="gelu"
    )
    torch.manual_seed(0)
    theirs = shaken(transformers.GPT2LMHeadModel(config))
    ours = Transformer(
        50,
        32,
        2,
        4,
        max_seq_len=64,
        norm="layer",
        position="learned",
        feed_forward="gelu",
        tie_embeddings=True,
        bias=True,
    ).eval()
    gpt2 = theirs.transformer
    state = {
        "embedding.weight": gpt2.wte.weight,
        "head.weight": gpt2.wte.weight,
        "position_embedding.weight": gpt2.wpe.weight,
    }
    pairs = [("norm", gpt2.ln_f)]
    for i, layer in enumerate(gpt2.h):
        pairs += [
            (f"blocks.{i}.mixer_norm", layer.ln_1),
            (f"blocks.{i}.feed_forward_norm", layer.ln_2),
            (f"blocks.{i}.mixer.qkv", layer.attn.c_attn),
            (f"blocks.{i}.mixer.out", layer.attn.c_proj),
            (f"blocks.{i}.feed_forward.up", layer.mlp.c_fc),
            (f"blocks.{i}.feed_forward.down", layer.mlp.c_proj),
        ]
    for name, module in pairs:
        weight = module.weight if module.weight.ndim == 1 else module.weight.T  # Conv1D: (in, out)
        state |= {f"{name}.weight": weight, f"{name}.bias": module.bias}
    ours.load_state_dict(state)
    x = tokens(seq=40)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-5, rtol=0)


def plain_norm(x, norm):
    eps = getattr(norm, "eps", None)
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        y = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight
        return y if norm.bias is None else y + norm.bias
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * norm.weight


def plain_linear(x, linear):
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def plain_forward(model, row, documents=None):
    """Logits of one row, token by token and head by head, as one would write it on paper."""
    args = model.init_args
    n = len(row)
    documents = [0] * n if documents is None else documents
    n_heads, n_kv = args["n_heads"], args["n_kv_heads"] or args["n_heads"]
    d = args["head_dim"] or args["dim"] // n_heads
    positions = [sum(documents[j] == documents[i] for j in range(i)) for i in range(n)]
    x = model.embedding.weight[row]
    if args["embedding_scale"]:
        x = x * math.sqrt(args["dim"])
    if args["position"] == "learned":
        x = x + model.position_embedding.weight[positions]

    def turn(vector, position):
        if args["position"] != "rope":
            return vector
        out = vector.clone()
        for i in range(d // 2):
            angle = position * args["rope_base"] ** (-2 * i / d)
            a, b = vector[i], vector[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for block in model.blocks:
        attention, forward = block.mixer, block.feed_forward
        qkv = plain_linear(plain_norm(x, block.mixer_norm), attention.qkv)
        if attention.conv is not None:
            taps = attention.conv.taps.view(attention.conv.width, -1)
            mixed = qkv.clone()
            for t in range(n):
                for j in range(attention.conv.width):
                    if t >= j and documents[t] == documents[t - j]:
                        mixed[t] = mixed[t] + taps[j] * qkv[t - j]
            qkv = mixed
        heads = qkv.view(n, n_heads + 2 * n_kv, d)
        out = torch.zeros(n, n_heads, d, dtype=x.dtype)
        for h in range(n_heads):
            k_index = n_heads + h * n_kv // n_heads
            for t in range(n):
                seen = [j for j in range(t + 1) if documents[j] == documents[t]]
                query, keys = heads[t, h], [heads[j, k_index] for j in seen]
                if args["qk_norm"]:
                    query = plain_norm(query, attention.q_norm)
                    keys = [plain_norm(key, attention.k_norm) for key in keys]
                query = turn(query, positions[t])
                keys = [turn(key, positions[j]) for key, j in zip(keys, seen, strict=True)]
                scores = torch.stack([query @ key for key in keys]) / math.sqrt(d)
                weights = scores.exp() / scores.exp().sum()
                for weight, j in zip(weights, seen, strict=True):
                    out[t, h] += weight * heads[j, k_index + n_kv]
        x = x + plain_linear(out.reshape(n, -1), attention.out)
        y = plain_linear(plain_norm(x, block.feed_forward_norm), forward.up)
        if args["feed_forward"] == "swiglu":
            gate, value = y[:, : y.shape[1] // 2], y[:, y.shape[1] // 2 :]
            y = gate / (1 + (-gate).exp()) * value
        elif args["feed_forward"] == "silu":
            y = y / (1 + (-y).exp())
        elif args["feed_forward"] == "gelu":
            y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
        else:
            y = torch.where(y > 0, y, 0) ** 2
        x = x + plain_linear(y, forward.down)
    return plain_norm(x, model.norm) @ model.head.weight.T


OPTIONS = {
    "llama": {},
    "gqa": {"n_heads": 4, "n_kv_heads": 2},
    "head_dim": {"head_dim": 6, "n_kv_heads": 1},
    "qk_norm": {"qk_norm": True},
    "conv": {"conv_width": 4, "n_kv_heads": 1},
    "wide conv": {"conv_width": 20},
    "layer norm": {"norm": "layer"},
    "biases": {"norm": "layer", "bias": True},
    "learned": {"position": "learned", "feed_forward": "gelu"},
    "none": {"position": "none", "feed_forward": "relu2"},
    "tied": {"tie_embeddings": True, "embedding_scale": True, "feed_forward": "silu"},
    "rope base": {"rope_base": 500.0, "hidden_dim": 24},
}


@pytest.mark.parametrize("blocked", [False, True], ids=["row", "documents"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_in_plain_float64(options, blocked):
    torch.manual_seed(0)
    keys = {"n_heads": 2, "max_seq_len": 32} | options
    model = shaken(Transformer(30, 16, 2, **keys)).double()
    model.rotary_cos, model.rotary_sin = (
        table.double()
        for table in (rotary_tables64(model) if model.rotary else (torch.ones(1),) * 2)
    )
    x = tokens(batch=2, seq=11, vocab=30)
    documents = torch.tensor([[0] * 4 + [1] * 2 + [2] * 5, [3] * 11]) if blocked else None
    with torch.no_grad():
        ours = model(x, documents=documents)
        for b in range(2):
            ids = None if documents is None else documents[b].tolist()
            expected = plain_forward(model, x[b].tolist(), ids)
            torch.testing.assert_close(ours[b], expected, atol=1e-9, rtol=0)


def rotary_tables64(model):
    d = model.blocks[0].mixer.head_dim
    base = model.init_args["rope_base"]
    angles = torch.arange(32.0, dtype=torch.float64)[:, None] * base ** (
        -torch.arange(0, d, 2, dtype=torch.float64) / d
    )
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def test_rotation_is_relative():
    cos, sin = rotary_tables(8, 64, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    scores = [
        float((rotate(q, (cos[i], sin[i])) * rotate(k, (cos[i - 5], sin[i - 5]))).sum())
        for i in (5, 20, 63)
    ]
    assert max(scores) - min(scores) < 1e-5


def test_documents_give_what_rows_of_their_own_give():
    torch.manual_seed(0)
    model = shaken(Transformer(50, 32, 2, 4, n_kv_heads=2, conv_width=4, max_seq_len=64))
    x = tokens(batch=1, seq=30)
    lengths = [3, 1, 17, 9]
    documents = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    packed = model(x, documents=documents)[0].split(lengths)
    for part, row in zip(packed, x[0].split(lengths), strict=True):
        torch.testing.assert_close(part, model(row[None])[0], atol=1e-5, rtol=0)


def test_convolution_is_identity_at_the_start():
    torch.manual_seed(0)
    with_conv = Transformer(50, 16, 2, 2, conv_width=4)
    without = Transformer(50, 16, 2, 2)
    without.load_state_dict(with_conv.state_dict(), strict=False)
    x = tokens()
    torch.testing.assert_close(with_conv(x), without(x))
    with_conv(x).sum().backward()
    assert with_conv.blocks[0].mixer.conv.taps.grad.abs().min() > 0


def test_parameter_counts_on_paper():
    """The study's sizes: 49,568 parameters at dim 32 and 164,672 at dim 64."""
    counts = Transformer(260, 32, 2, 2).parameter_counts()
    assert counts == {
        "embedding": 260 * 32,
        "attention": 2 * 4 * 32 * 32,
        "feed_forward": 2 * 3 * 32 * 128,
        "norm": 5 * 32,
        "head": 260 * 32,
    }
    assert sum(counts.values()) == 49_568
    assert sum(Transformer(260, 64, 2, 2).parameter_counts().values()) == 164_672
    tied = Transformer(260, 32, 2, 2, tie_embeddings=True, qk_norm=True, conv_width=4)
    counts = tied.parameter_counts()
    assert (counts["head"], counts["embedding"]) == (0, 260 * 32)
    assert counts["attention"] == 2 * (4 * 32 * 32 + 4 * 96)
    assert counts["norm"] == 5 * 32 + 4 * 16
    assert sum(counts.values()) == sum(p.numel() for p in tied.parameters())


def test_dropout_only_in_training():
    torch.manual_seed(0)
    model = Transformer(50, 16, 2, 2, dropout=0.5)
    x = tokens()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_hidden_and_logits_make_the_forward():
    model = Transformer(50, 16, 1, 2)
    x = tokens()
    assert torch.equal(model.logits(model.hidden(x)), model(x))
    assert model.hidden(x).shape == (2, 13, 16)


def test_future_does_not_matter():
    torch.manual_seed(0)
    model = shaken(Transformer(50, 16, 2, 2, conv_width=4))
    x = tokens()
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 50
    torch.testing.assert_close(model(x)[:, :7], model(changed)[:, :7], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 30, "n_heads": 4}, ["dim 30", "n_heads 4"]),
        ({"n_heads": 4, "n_kv_heads": 3}, ["n_heads 4", "n_kv_heads 3"]),
        ({"dim": 30, "n_heads": 2}, ["head_dim 15", "position"]),
        ({"dropout": -0.1}, ["dropout"]),
        ({"dropout": 1.0}, ["dropout"]),
        ({"conv_width": -1}, ["conv_width"]),
        ({"n_layers": 0}, ["n_layers"]),
        ({"vocab_size": 0}, ["vocab_size"]),
        ({"n_kv_heads": 0}, ["n_kv_heads"]),
        ({"hidden_dim": 0}, ["hidden_dim"]),
        ({"norm": "batch"}, ["norm", "rms"]),
        ({"position": "alibi"}, ["position", "rope"]),
        ({"feed_forward": "tanh"}, ["feed_forward", "swiglu"]),
        ({"initialization": "magic"}, ["initialization", "scaled"]),
        ({"norm_eps": 0.0}, ["norm_eps"]),
    ],
)
def test_sizes_that_do_not_go_together(change, words):
    args = {"vocab_size": 50, "dim": 16, "n_layers": 1, "n_heads": 2} | change
    with pytest.raises(ToolmemError) as error:
        Transformer(**args)
    assert all(word in str(error.value) for word in words)


def test_too_long_a_sequence():
    with pytest.raises(ToolmemError, match="max_seq_len 8"):
        Transformer(50, 16, 1, 2, max_seq_len=8)(tokens(seq=9))


def test_trains_in_bf16_autocast():
    torch.manual_seed(0)
    model = Transformer(50, 16, 2, 2, conv_width=4, qk_norm=True)
    documents = torch.tensor([[0] * 6 + [1] * 7] * 2)
    for ids in (None, documents):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(tokens(), documents=ids)
        torch.testing.assert_close(low.float(), model(tokens(), documents=ids), atol=0.1, rtol=0.1)
        low.float().sum().backward()


@pytest.mark.slow
def test_compiles_without_graph_breaks():
    torch.manual_seed(0)
    model = shaken(Transformer(50, 16, 2, 2, conv_width=4, n_kv_heads=1, max_seq_len=64))
    hidden = torch.compile(model.hidden, dynamic=True, fullgraph=True)
    for batch, seq in ((2, 13), (3, 40), (5, 64)):
        x = tokens(batch, seq)
        torch.testing.assert_close(hidden(x), model.hidden(x), atol=1e-5, rtol=0)
    documents = torch.tensor([[0] * 6 + [1] * 7] * 2)
    torch.testing.assert_close(
        hidden(tokens(), documents=documents),
        model.hidden(tokens(), documents=documents),
        atol=1e-5,
        rtol=0,
    )
