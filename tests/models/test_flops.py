"""FLOPs of every architecture against formulas worked out on paper, in integers.

In all of them, unless said otherwise: V = 40 tokens, dim D = 16, 2 layers, feed-forward width F = 24, rows of
n = 12 tokens, of which a causal one has P = n (n + 1) / 2 = 78 pairs. A matrix of a by b costs 2ab a token
forward and twice that backward. A swiglu feed-forward has 3 matrices: 6DF = 2,304. The head costs 2DV =
1,280. "Token" is the sum over one layer.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolmem.models import (
    RNN,
    Hybrid,
    LanguageModel,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
from toolmem.models.context import Extras
from toolmem.models.flops import FlopCounter, register_flops
from toolmem.models.layers import Block, RMSNorm
from toolmem.models.model_flops import ModelFlops, full_row, seen_pairs, span_pairs

V, D, N, HEAD = 40, 16, 12, 1280
RAGGED = (12, 7, 1, 5)


def make(kind, **options):
    torch.manual_seed(0)
    common = {"n_layers": 2, "max_seq_len": 16}
    if "feed_forward" not in options and kind not in (Mamba, Mamba2):
        common["hidden_dim"] = 24
    return kind(V, D, **(common | options))


def row_costs(model, **how):
    """Exact FLOPs of one full row: forward, and a training step's."""
    flops = ModelFlops(model, **how)
    body, head = flops.body(1, N), flops.head()
    assert not flops.unknown
    forward = body.exact(N, full_row, backward=False) + N * head.forward
    return forward, body.exact(N, full_row) + N * (head.forward + head.gradient)


def seen(lengths, window=0):
    """Pairs that see each other, one by one."""
    return sum(
        not window or query - key < window
        for length in lengths
        for query in range(length)
        for key in range(query + 1)
    )


def check(model, forward, training, *, token, token_backward=None, pairs=()):
    """A full row against figures on paper, and a ragged batch against the same formula row by row.

    Args:
        model: whose costs are checked.
        forward: exact FLOPs of the forward pass of a full row.
        training: of a training step of one.
        token: for each token, without the head.
        token_backward: the same of the backward pass; twice it when None.
        pairs: (FLOPs for each pair, window) of attention.
    """
    assert row_costs(model) == (forward, training)
    assert row_costs(model, run=True) == (forward, training)
    flops = ModelFlops(model)
    both = token + (2 * token if token_backward is None else token_backward)
    expected = sum(RAGGED) * both + sum(3 * one * seen(RAGGED, window) for one, window in pairs)
    body = flops.body(len(RAGGED), N)
    lengths = torch.tensor(RAGGED)
    assert body.exact(sum(RAGGED), lambda window, seq: seen_pairs(lengths, window)) == expected
    assert body.executed() + len(RAGGED) * N * 3 * HEAD == executed_by_a_real_step(model)
    assert row_costs(model.to("meta")) == (forward, training)


def executed_by_a_real_step(model):
    tokens = torch.randint(V, (len(RAGGED), N), generator=torch.Generator().manual_seed(1))
    with FlopCounter() as counter:
        extras = Extras()
        logits = model.logits(model.hidden(tokens, extras=extras))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        (loss + sum(extras.losses.values())).backward()
    assert not counter.tally.unknown
    return counter.tally.total


def test_transformer_with_grouped_heads():
    """4 query heads, 2 key/value heads of d = 4: qkv 2D(4 + 2 + 2)d = 1,024, out 2D(4d) = 512.

    Token: 1,024 + 512 + 2,304 = 3,840. A pair: 4 heads, 2d for the score and 2d for the mean: 64.
    Forward: 12 (2 x 3,840 + 1,280) + 2 x 78 x 64 = 107,520 + 9,984 = 117,504; training 3 times that.
    """
    model = make(Transformer, n_heads=4, n_kv_heads=2)
    check(model, 117_504, 352_512, token=2 * 3840, pairs=[(2 * 64, 0)])


def test_options_that_multiply_nothing_cost_nothing():
    """As grouped heads with all 4 of their own keys: qkv 2D(12)d = 1,536, token 4,352.

    12 (2 x 4,352 + 1,280) + 9,984 = 129,792.
    """
    model = make(
        Transformer,
        n_heads=4,
        qk_norm=True,
        sandwich_norm=True,
        value_residual=True,
        conv_width=3,
        residual_conv=2,
        tie_embeddings=True,
        embedding_norm=True,
        logit_softcap=30.0,
        rope_fraction=0.5,
        dropout=0.1,
    )
    check(model, 129_792, 3 * 129_792, token=2 * 4352, pairs=[(2 * 64, 0)])


def test_attention_with_a_softcap_is_two_products():
    """The same pairs as by the kernel; the machine multiplies whole squares, and no score again."""
    model = make(Transformer, n_heads=4, attention_softcap=20.0)
    check(model, 129_792, 3 * 129_792, token=2 * 4352, pairs=[(2 * 64, 0)])
    body = ModelFlops(make(Transformer, n_heads=4, attention_softcap=20.0)).body(1, N)
    assert body.executed() == 3 * (N * 2 * 4352 + 2 * N * N * 64)


def test_window():
    """A window of 5 in the first of two layers: pairs 5 + 4 + ... = 12 x 5 - (4 + 3 + 2 + 1) = 50.

    12 (2 x 4,352 + 1,280) + (50 + 78) 64 = 119,808 + 8,192 = 128,000.
    """
    model = make(Transformer, n_heads=4, window=[5, 0])
    check(model, 128_000, 384_000, token=2 * 4352, pairs=[(64, 5), (64, 0)])


def test_prefix_mask():
    """Spans of 4 and 3 tokens are seen both ways: 4 x 3 / 2 + 3 x 2 / 2 = 9 pairs more, 87 in all.

    12 x 2 x 4,352 + 2 x 87 x 64 = 104,448 + 11,136 = 115,584 without the head; training 346,752. With a
    window of 3 the span of 4 has 3 + 2 pairs more, that of 3 has 3, and the row 12 x 3 - 3 = 33: 41 in all,
    104,448 + 2 x 41 x 64 = 109,696.
    """
    spans = torch.full((1, N), -1)
    spans[0, 0:4], spans[0, 7:10] = 0, 1
    for window, expected in ((0, 115_584), (3, 109_696)):
        model = make(Transformer, n_heads=4, attention_mask="prefix", window=window)
        body = ModelFlops(model).body(1, N, spans=True)

        def pairs(window, seq):
            return full_row(window, seq) + span_pairs(spans, window)

        assert body.exact(N, pairs, backward=False) == expected
        assert body.exact(N, pairs) == 3 * expected


def test_latent_attention():
    """4 heads of d = 4, latent r = 8, positions R = 2: in 2D(4(d + R) + r + R) = 1,088, keys and values
    2r(4 x 2d) = 512, out 2D(4d) = 512. Token: 1,088 + 512 + 512 + 2,304 = 4,416.

    A pair: 4 heads, 2(d + R) for the score and 2d for the mean: 80.
    Forward: 12 (2 x 4,416 + 1,280) + 2 x 78 x 80 = 121,344 + 12,480 = 133,824.

    Queries from a latent of 6: in 2D(6 + r + R) = 512, queries 2 x 6 x 24 = 288. Token: 4,128; forward
    133,824 - 12 x 2 x 288 = 126,912.
    """
    options = {"n_heads": 4, "attention": "mla", "mla_kv_rank": 8, "mla_rope_dim": 2}
    check(make(Transformer, **options), 133_824, 401_472, token=2 * 4416, pairs=[(2 * 80, 0)])
    model = make(Transformer, **options, mla_q_rank=6)
    check(model, 126_912, 380_736, token=2 * 4128, pairs=[(2 * 80, 0)])


@pytest.mark.parametrize(("form", "join"), [("sequential", 1024), ("parallel", 0)])
def test_multi_token_prediction(form, join):
    """Two modules: each a block of 4,352 a token and 64 a pair, and in sequence a join 2(2D)D = 1,024.

    The first runs on 11 tokens and their 66 pairs, the second on 10 and 55. To the body, 12 x 2 x 4,352 +
    2 x 78 x 64 = 114,432, they add 21 (4,352 + 1,024) + 121 x 64 = 120,640, or without joins 99,136. In a
    row of n tokens they run on n - 1 and n - 2, if that many are left.
    """
    model = make(Transformer, n_heads=4, multi_token=2, multi_token_form=form)
    expected = 114_432 + 21 * (4352 + join) + 121 * 64
    body = ModelFlops(model).body(1, N)
    assert body.exact(N, full_row, backward=False) == expected
    assert body.exact(N, full_row) == 3 * expected
    assert expected == {1024: 235_072, 0: 213_568}[join]

    def pairs(window, seq):
        return seen([max(0, length - (N - seq)) for length in RAGGED], window)

    flops = 0
    for length in RAGGED:
        flops += length * 2 * 4352 + 2 * 64 * length * (length + 1) // 2
        for left in (max(0, length - 1), max(0, length - 2)):
            flops += left * (4352 + join) + 64 * left * (left + 1) // 2
    assert ModelFlops(model).body(len(RAGGED), N).exact(sum(RAGGED), pairs) == 3 * flops


def test_mixture_of_experts():
    """2 heads of 8: qkv 2D(3D) = 1,536, out 512; a pair 4 x 16 = 64. Experts 2 of 4, width 16: the router
    2D x 4 = 128, experts 2 x 6D x 16 = 3,072. Token: 5,248.

    Forward: 12 (2 x 5,248 + 1,280) + 2 x 78 x 64 = 141,312 + 9,984 = 151,296. A shared expert adds 6D x 16
    = 1,536 a token and layer: 188,160. Experts that are not chosen cost nothing: 8 of them cost 128 more,
    for the router, a token and layer: 191,232.
    """
    options = {"n_heads": 2, "n_experts": 4, "hidden_dim": 16}
    check(make(MoETransformer, **options), 151_296, 453_888, token=2 * 5248, pairs=[(2 * 64, 0)])
    model = make(MoETransformer, **options, n_shared_experts=1, balance_loss=0.1, z_loss=0.1)
    assert row_costs(model) == (188_160, 564_480)
    model = make(MoETransformer, **options | {"n_experts": 8}, n_shared_experts=1)
    assert row_costs(model) == (191_232, 573_696)


def test_mamba():
    """I = 32 inner channels, n = 4 states, rank 1 of step sizes: in 2D(2I) = 2,048, to steps, B and C
    2I(1 + 2n) = 576, steps 2 x 1 x I = 64, out 2ID = 1,024; scan I(7n + 1) = 928. Token: 4,640.

    Forward: 12 (2 x 4,640 + 1,280) = 126,720.
    """
    check(make(Mamba, state_dim=4), 126_720, 380_160, token=2 * 4640)


def test_mamba2():
    """I = 32 inner channels, 4 heads of p = 8, n = 8 states, one group: in 2D(2I + 2n + 4) = 2,688, out
    2ID = 1,024; scan 4(5np + p + 2) = 1,320; feed-forward 2,304. Token: 7,336.

    Forward: 12 (2 x 7,336 + 1,280) = 191,424, in chunks of whatever size.
    """
    sizes = {"state_dim": 8, "head_dim": 8, "hidden_dim": 24}
    for chunk_size in (5, 64):
        model = make(Mamba2, **sizes, chunk_size=chunk_size)
        check(model, 191_424, 574_272, token=2 * 7336)


@pytest.mark.parametrize(
    ("cell", "forward", "token"),
    [("lstm", 181_248, 6912), ("gru", 156_672, 5888)],
)
def test_recurrent_cells_of_torch(cell, forward, token):
    """LSTM: 4 gates of W = 16 read x and the state, 2 x 4W(D + W) = 4,096; out 2WD = 512; feed-forward
    2,304. Token: 6,912; forward 12 (2 x 6,912 + 1,280) = 181,248. GRU: 3 gates, 3,072; token 5,888;
    forward 156,672.
    """
    check(make(RNN, cell=cell), forward, 3 * forward, token=2 * token)


@pytest.mark.parametrize(
    ("cell", "forward", "token"),
    [("mingru", 108_288, 3840), ("minlstm", 120_576, 4352), ("rglru", 111_360, 3968)],
)
def test_recurrent_cells_of_linear_scans(cell, forward, token):
    """minGRU: gate and value 2D(2W) = 1,024, out 512, feed-forward 2,304. Token: 3,840 in matrices, and
    the scan 2W = 32, backward 3W = 48. Forward: 12 (2 x 3,872 + 1,280) = 108,288; backward
    2 x 12 (2 x 3,840 + 1,280) + 12 x 2 x 48 = 216,192.

    minLSTM: two gates and value 2D(3W) = 1,536; 4,352 in matrices, forward 120,576, backward 240,768.
    RG-LRU: branch and input 2D(2W) = 1,024, two gates of 8 blocks of 2 by 2, 2 x 2 x 8 x 4 = 128; 3,968 in
    matrices, forward 111,360, backward 222,336.
    """
    backward = {"mingru": 216_192, "minlstm": 240_768, "rglru": 222_336}[cell]
    check(
        make(RNN, cell=cell),
        forward,
        forward + backward,
        token=2 * (token + 32),
        token_backward=2 * (2 * token + 48),
    )


@pytest.mark.parametrize(
    ("rule", "forward", "token"), [("gated", 150_960, 5650), ("gated_delta", 157_488, 5922)]
)
def test_linear_attention(rule, forward, token):
    """2 heads of k = v = 8: queries, keys, values and gate 2D(4D) = 2,048, rates 2D x 4 = 128, out 512,
    feed-forward 2,304: 4,992. The memory: gated 2(5kv + v + 1) = 658, by the delta rule 2(7kv + 2v + 1) =
    930. Token: 5,650 or 5,922; forward 12 (2 x 5,650 + 1,280) = 150,960 or 157,488, in any chunks.
    """
    for chunk_size in (5, 64):
        model = make(LinearAttention, n_heads=2, rule=rule, chunk_size=chunk_size)
        check(model, forward, 3 * forward, token=2 * token)


def test_griffin():
    """Two layers of RG-LRU (3,968 in matrices and 32 by scan, backward 48) and one of attention with 2
    query heads and one key/value head of 8: qkv 2D(4 x 8) = 1,024, out 512, feed-forward 2,304, token
    3,840; a pair in a window of 5 costs 64, and there are 50.

    Forward: 12 (2 x 4,000 + 3,840 + 1,280) + 50 x 64 = 157,440 + 3,200 = 160,640. Backward: 2 x 12 (2 x
    3,968 + 3,840 + 1,280) + 12 x 2 x 48 + 2 x 3,200 = 320,896.
    """
    local = {"class_path": "attention", "n_heads": 2, "n_kv_heads": 1, "window": 5}
    model = make(Hybrid, n_layers=3, pattern=["rglru", "rglru", "local"], mixers={"local": local})
    check(
        model,
        160_640,
        481_536,
        token=2 * 4000 + 3840,
        token_backward=2 * (2 * 3968 + 48) + 2 * 3840,
        pairs=[(64, 5)],
    )


def test_jamba():
    """Mamba-1's mixer (4,640) with a feed-forward (2,304); then attention (2 heads of 8: 1,536 + 512, 64 a
    pair) with experts (128 + 3,072). Token, both layers: 6,944 + 5,248 = 12,192.

    Forward: 12 (12,192 + 1,280) + 78 x 64 = 161,664 + 4,992 = 166,656.
    """
    model = make(
        Hybrid,
        pattern=["mamba1", "attention"],
        mixers={"mamba1": {"state_dim": 4}, "attention": {"n_heads": 2}},
        feed_forward=["swiglu", "moe"],
        feed_forwards={"moe": {"n_experts": 4, "top_k": 2, "hidden_dim": 16}},
        hidden_dim=24,
    )
    check(model, 166_656, 499_968, token=12_192, pairs=[(64, 0)])


def test_what_does_not_learn_has_no_gradient():
    """Of grouped heads' 117,504 forward: with the body frozen only the head's weights have a gradient,
    another 12 x 1,280 = 15,360.
    """
    model = make(Transformer, n_heads=4, n_kv_heads=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    assert row_costs(model) == (117_504, 117_504 + 15_360)


def test_counting_leaves_no_trace():
    """Neither in buffers, nor in random numbers, nor in gradients."""
    model = make(MoETransformer, n_heads=2, n_experts=4, hidden_dim=16, dropout=0.1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    for run in (False, True):
        ModelFlops(model, run=run).body(2, N)
        assert torch.equal(torch.get_rng_state(), state)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert all(parameter.grad is None for parameter in model.parameters())
    assert model.attention_kernel == "auto"


@pytest.mark.parametrize("name", ["transformer", "window", "multi_token", "mamba2", "gated_delta"])
def test_shapes_that_are_reckoned_cost_what_they_would_if_counted(name):
    kind, options = {
        "transformer": (Transformer, {"n_heads": 2}),
        "window": (Transformer, {"n_heads": 2, "window": [5, 0]}),
        "multi_token": (Transformer, {"n_heads": 2, "multi_token": 2}),
        "mamba2": (Mamba2, {"state_dim": 8, "head_dim": 8, "chunk_size": 4}),
        "gated_delta": (LinearAttention, {"n_heads": 2, "chunk_size": 4}),
    }[name]
    model = make(kind, **options)
    flops = ModelFlops(model, run=True)
    for rows, seq in ((2, 16), (3, 4), (2, 9), (5, 7), (1, 12), (2, 3), (1, 2)):
        expected, got = ModelFlops(model, run=True).body(rows, seq), flops.body(rows, seq)
        assert got.exact(rows * seq, full_row) == expected.exact(rows * seq, full_row)
        assert got.executed() == expected.executed()
    # a window that no row fills is another kernel, and chunks end where they end
    assert (flops._rules[False, False] is not None) == (name in ("transformer", "multi_token"))


class Toy(LanguageModel):
    """One block whose feed-forward is ``part``."""

    def __init__(self, part):
        block = Block(D, part, None)
        super().__init__([block], RMSNorm(D), vocab_size=V, dim=D, max_seq_len=16)


class Part(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, context, cache=None):
        return self.function(x)


@torch.library.custom_op("toolmem_tests::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@doubled.register_fake
def _(x):
    return torch.empty_like(x)


def _doubled_backward(ctx, grad):
    return doubled(grad)


doubled.register_autograd(_doubled_backward)


class Filtered(torch.autograd.Function):
    """Its operations are free forward, and without a formula backward."""

    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, grad):
        return torch.fft.ifft(torch.fft.fft(grad)).real


@pytest.mark.parametrize("run", [False, True])
@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: torch.fft.fft(x).real, {"aten::_fft_r2c", "aten::_fft_c2c"}),
        (doubled, {"toolmem_tests::doubled"}),
        (Filtered.apply, {"aten::_fft_r2c", "aten::_fft_c2c"}),
    ],
)
def test_what_has_no_formula_is_named(function, names, run):
    flops = ModelFlops(Toy(Part(function)), run=run)
    body = flops.body(1, N)
    assert set(flops.unknown) & names and set(flops.unknown) <= names
    assert set(body.unknown) == set(flops.unknown)


def test_a_function_says_what_it_costs():
    """A scan in a Python function of its own: 5 FLOPs a number forward, 7 backward, 12 x 16 numbers."""
    scan = register_flops(lambda x: 5 * x.numel())(lambda x: x.cumsum(1))
    assert torch.equal(scan(torch.ones(1, 3)), torch.tensor([[1.0, 2.0, 3.0]]))
    flops = ModelFlops(Toy(Part(scan)))
    body = flops.body(1, N)
    assert not flops.unknown
    assert (body.forward, body.backward) == (5 * N * D, 10 * N * D)


def test_an_operation_is_told_what_it_costs_and_the_counter_asks_it():
    def of_tripled(x, *, out_val):
        return 3 * x.numel() + out_val.shape[0]

    library = torch.library.Library("toolmem_tests", "FRAGMENT")
    library.define("tripled(Tensor x) -> Tensor")
    library.impl("tripled", lambda x: 3 * x, "CPU")
    register_flops(of_tripled)(torch.ops.toolmem_tests.tripled)
    with FlopCounter() as counter, torch.no_grad():
        torch.ops.toolmem_tests.tripled(torch.ones(4, 5))
    assert (counter.tally.forward, counter.tally.unknown) == (64, {})


def test_nothing_counts_after_a_counter():
    """Composite operations, which come whole in inference mode, are entered once more."""
    from toolmem.models import flops

    model = make(Transformer, n_heads=4, n_kv_heads=2).eval()
    with torch.inference_mode(), FlopCounter() as counter:
        model(torch.zeros(1, N, dtype=torch.int64))
        assert flops._counting is counter
    assert flops._counting is None
    assert counter.tally.forward == N * (2 * 3840 + HEAD) + 2 * N * N * 64


def test_groups_are_those_of_parameters():
    """Grouped heads' matrices a layer: attention 1,536, feed-forward 2,304."""
    body = ModelFlops(make(Transformer, n_heads=4, n_kv_heads=2)).body(1, N)
    matrices = {name: flops for name, flops in body.groups.items() if flops}
    assert matrices == {"attention": N * 2 * 1536, "feed_forward": N * 2 * 2304}
    assert [pair.group for pair in body.pairs] == ["attention"]
