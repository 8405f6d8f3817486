"""Recurrent mixers: parallel equals recurrent, and each equals its formula or a public implementation.

Caches, packed rows and the rest that every architecture promises are in test_architectures.py.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models import RNN
from toolmem.models.context import Context
from toolmem.models.recurrences import linear_scan, log_space_scan, sequential_scan
from toolmem.models.rnn import GRU, LSTM, RGLRU, MinGRU, MinLSTM, RecurrentState


def whole(seq):
    return Context(torch.arange(seq))


@pytest.mark.parametrize("seq", [1, 2, 3, 7, 8, 64, 101])
@pytest.mark.parametrize("with_initial", [False, True])
def test_the_scan_is_the_recurrence_forward_and_backward(seq, with_initial):
    torch.manual_seed(seq)
    decay = torch.rand(2, seq, 5, dtype=torch.float64)
    decay[0, seq // 2] = 0.0
    decay[1, :2] = 1.0
    tensors = [decay, torch.randn(2, seq, 5, dtype=torch.float64)]
    tensors += [torch.randn(2, 5, dtype=torch.float64)] if with_initial else []
    weights = torch.randn(2, seq, 5, dtype=torch.float64)
    results = []
    for scan in (linear_scan, sequential_scan):
        inputs = [t.clone().requires_grad_() for t in tensors]
        states = scan(*inputs)
        grads = torch.autograd.grad((states * weights).sum(), inputs, allow_unused=True)
        results.append(
            (states, [torch.zeros((), dtype=torch.float64) if g is None else g for g in grads])
        )
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    for a, b in zip(our_grads, their_grads, strict=True):
        if b.ndim:  # the first decay of a row without a state has no gradient, or zeros
            torch.testing.assert_close(a.expand_as(b), b, atol=1e-12, rtol=0)


def test_the_operator_is_well_behaved():
    decay = torch.rand(2, 9, 3, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.toolmem.linear_scan.default, (decay, values))
    assert torch.autograd.gradcheck(linear_scan, (decay, values))


def test_the_papers_log_space_form_agrees_where_it_stands():
    decay = torch.rand(2, 50, 4, dtype=torch.float64)
    values = torch.rand(2, 50, 4, dtype=torch.float64) + 0.1
    ours = linear_scan(decay, values)
    torch.testing.assert_close(log_space_scan(decay.log(), values.log()), ours)


def test_the_scan_is_exact_where_decays_are_extreme():
    decay = torch.rand(1, 500, 3) ** 20
    values = torch.randn(1, 500, 3)
    wide = sequential_scan(decay.double(), values.double()).float()
    torch.testing.assert_close(linear_scan(decay, values), wide, atol=1e-6, rtol=0)


def g(x):
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


def plain_mingru(mixer, x):
    gate, new = (x @ mixer.gates.weight.T).chunk(2, -1)
    h, states = torch.zeros_like(gate[:, 0]), []
    for t in range(x.shape[1]):
        z = torch.sigmoid(gate[:, t])
        h = (1 - z) * h + z * g(new[:, t])
        states.append(h)
    return torch.stack(states, 1) @ mixer.out.weight.T


def plain_minlstm(mixer, x):
    forget, take, new = (x @ mixer.gates.weight.T).chunk(3, -1)
    h, states = torch.zeros_like(forget[:, 0]), []
    for t in range(x.shape[1]):
        f, i = torch.sigmoid(forget[:, t]), torch.sigmoid(take[:, t])
        h = f / (f + i) * h + i / (f + i) * g(new[:, t])
        states.append(h)
    return torch.stack(states, 1) @ mixer.out.weight.T


@pytest.mark.parametrize(("kind", "plain"), [(MinGRU, plain_mingru), (MinLSTM, plain_minlstm)])
def test_min_cells_are_the_papers_recurrence(kind, plain):
    torch.manual_seed(0)
    mixer = kind(6, width=10).double()
    x = 3 * torch.randn(2, 33, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x, whole(33)), plain(mixer, x), atol=1e-9, rtol=0)


@pytest.mark.parametrize(("kind", "cells"), [(LSTM, nn.LSTM), (GRU, nn.GRU)])
def test_torchs_cells_are_torchs(kind, cells):
    torch.manual_seed(0)
    mixer = kind(6, width=8)
    x = torch.randn(2, 12, 6)
    theirs = cells(6, 8, batch_first=True)
    theirs.load_state_dict(mixer.cells.state_dict())
    torch.testing.assert_close(mixer(x, whole(12)), mixer.out(theirs(x)[0]))


def test_torchs_cells_start_open_to_remembering():
    """Under any scheme: torch's uniform weights within 1 / sqrt(width), biases 0, the forget gate's 1."""
    torch.manual_seed(0)
    for cell, kind in (("lstm", LSTM), ("gru", GRU)):
        mixer = RNN(20, 16, 1, cell=cell, initialization="gpt2").blocks[0].mixer
        assert isinstance(mixer, kind)
        for weight in (mixer.cells.weight_ih_l0, mixer.cells.weight_hh_l0):
            assert weight.abs().max() <= 16**-0.5
            assert weight.detach().std().item() == pytest.approx((16 * 3) ** -0.5, rel=0.1)
        biases = mixer.cells.bias_ih_l0 + mixer.cells.bias_hh_l0
        if cell == "lstm":
            assert biases.tolist() == [0.0] * 16 + [1.0] * 16 + [0.0] * 32


def test_rglru_is_transformers_recurrent_gemma():
    from transformers import RecurrentGemmaConfig
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import (
        RecurrentGemmaRecurrentBlock,
    )

    torch.manual_seed(0)
    config = RecurrentGemmaConfig(
        hidden_size=12, lru_width=16, num_attention_heads=4, head_dim=3, conv1d_width=4,
        num_hidden_layers=1, vocab_size=20, hidden_activation="gelu_pytorch_tanh",
    )  # fmt: skip
    theirs = RecurrentGemmaRecurrentBlock(config, layer_idx=0).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    for bias in (theirs.linear_x, theirs.linear_y, theirs.linear_out, theirs.conv_1d):
        nn.init.zeros_(bias.bias)
    ours = RGLRU(12, width=16, n_blocks=4)
    lru = theirs.rg_lru
    with torch.no_grad():
        ours.inputs.weight.copy_(torch.cat((theirs.linear_y.weight, theirs.linear_x.weight)))
        ours.out.weight.copy_(theirs.linear_out.weight)
        taps = theirs.conv_1d.weight[:, 0].flip(1).T.clone()
        taps[0] -= 1
        ours.conv.taps.copy_(taps.flatten())
        gates = torch.cat((lru.recurrent_gate_weight, lru.input_gate_weight)).transpose(1, 2)
        ours.gates.copy_(gates)
        ours.gate_bias.copy_(torch.cat((lru.recurrent_gate_bias, lru.input_gate_bias)).flatten())
        ours.decay.copy_(lru.recurrent_param)
    x = torch.randn(2, 20, 12)
    positions = torch.arange(20)[None].expand(2, -1)
    with torch.no_grad():
        expected, _ = theirs(x, positions, None, use_cache=False)
        got = ours(x, whole(20))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_rglru_starts_with_slow_decays():
    torch.manual_seed(0)
    mixer = RGLRU(4, width=512, decay_min=0.9, decay_max=0.999)
    slowest = torch.exp(-mixer.EXPONENT * F.softplus(mixer.decay))
    assert slowest.min() >= 0.9 - 1e-4 and slowest.max() <= 0.999 + 1e-4
    assert slowest.max() - slowest.min() > 0.08


def test_states_stay_float32_in_bfloat16():
    torch.manual_seed(0)
    model = RNN(20, 8, 1, cell="mingru", hidden_dim=8).eval()
    row = torch.randint(20, (1, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = model.new_cache(1, 30, dtype=torch.bfloat16)
        logits = model(row, cache=cache)
    assert isinstance(cache.layers[0].mixer, RecurrentState)
    assert cache.layers[0].mixer.hidden.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), model(row), atol=0.05, rtol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["mingru", "rglru"])
def test_compiled_equals_eager(cell):
    torch.manual_seed(0)
    model = RNN(20, 8, 1, cell=cell, hidden_dim=8)
    compiled = torch.compile(model.hidden, dynamic=True, fullgraph=True)
    for seq in (9, 17):
        row = torch.randint(20, (2, seq))
        expected, got = model.hidden(row), compiled(row)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        grads = [
            torch.autograd.grad(out.square().sum(), model.embedding.weight)
            for out in (expected, got)
        ]
        torch.testing.assert_close(*grads, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cell": "grru"}, "cell: unknown 'grru'"),
        ({"width": 0}, "width is 0"),
        ({"conv_width": -1}, "conv_width is -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"residual_conv": -2}, "residual_conv is -2"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ToolmemError, match=message):
        RNN(20, 8, 1, **options)
    with pytest.raises(ToolmemError, match="n_blocks 3 does not divide width 8"):
        RGLRU(8, n_blocks=3)
