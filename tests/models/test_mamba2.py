"""Mamba-2 equals transformers', with any groups; what it shares with Mamba-1 is tested in test_mamba.py."""

import sys
import types

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models.mamba2 import GatedRMSNorm, Mamba2, Mamba2Mixer, mamba_ssm_ssd_scan
from toolmem.models.ssd import ssd_sequential


def from_transformers(model):
    """transformers' weights by our names."""
    state = {
        "embedding.weight": model.backbone.embeddings.weight,
        "head.weight": model.lm_head.weight,
        "norm.weight": model.backbone.norm_f.weight,
    }
    for index, layer in enumerate(model.backbone.layers):
        mixer, prefix = layer.mixer, f"blocks.{index}.mixer"
        taps = mixer.conv1d.weight[:, 0].flip(1).T.clone()
        taps[0] -= 1
        state |= {
            f"{prefix}_norm.weight": layer.norm.weight,
            f"{prefix}.conv.taps": taps.flatten(),
            f"{prefix}.conv_bias": mixer.conv1d.bias,
            f"{prefix}.D": mixer.D,
            f"{prefix}.A_log": mixer.A_log,
            f"{prefix}.dt_bias": mixer.dt_bias,
            f"{prefix}.norm.weight": mixer.norm.weight,
            f"{prefix}.in_proj.weight": mixer.in_proj.weight,
            f"{prefix}.out.weight": mixer.out_proj.weight,
        }
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_parity_with_transformers(groups):
    """The same weights give transformers' logits, and its gradients."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=50, hidden_size=24, state_size=6, num_hidden_layers=2, expand=2, head_dim=8,
        num_heads=6, n_groups=groups, chunk_size=16, conv_kernel=4, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours = Mamba2(
        50, 24, 2, state_dim=6, head_dim=8, n_groups=groups, chunk_size=11, max_seq_len=128
    ).eval()
    ours.load_state_dict(from_transformers(theirs))
    tokens = torch.randint(50, (2, 70))
    expected, got = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    weights = torch.randn_like(got)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
        for one, other in (("A_log", "A_log"), ("dt_bias", "dt_bias"), ("D", "D")):
            torch.testing.assert_close(
                getattr(mine.mixer, one).grad,
                getattr(layer.mixer, other).grad,
                atol=1e-3,
                rtol=1e-3,
            )
        torch.testing.assert_close(
            mine.mixer.in_proj.weight.grad, layer.mixer.in_proj.weight.grad, atol=1e-3, rtol=1e-3
        )


def test_the_size_of_chunks_changes_nothing():
    torch.manual_seed(0)
    model = Mamba2(40, 16, 1, state_dim=6, head_dim=8).double()
    tokens = torch.randint(40, (2, 50))
    mixer = model.blocks[0].mixer
    results = []
    for mixer.chunk_size in (1, 7, 50, 64):
        results.append(model(tokens))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=1e-10, rtol=0)


def test_gated_norm_on_paper():
    norm = GatedRMSNorm(6, 2, 1e-5).double()
    norm.weight.data = torch.arange(6.0).double()
    x, gate = torch.randn(2, 3, 6).double(), torch.randn(2, 3, 6).double()
    gated = (x * gate / (1 + torch.exp(-gate))).view(2, 3, 2, 3)
    root = (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (gated / root).view(2, 3, 6) * torch.arange(6.0).double()
    torch.testing.assert_close(norm(x, gate), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "head_dim 5 does not divide expand \\* dim = 32"),
        ({"head_dim": 8, "n_groups": 3}, "n_groups 3 does not divide the 4 heads"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"dt_max": 1e-4}, "dt_min is 0.001"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ToolmemError, match=message):
        Mamba2Mixer(16, **({"head_dim": 8} | options))


def test_the_cuda_kernels_are_called_as_their_authors_say(monkeypatch):
    """A stand-in of the kernels' signature and layout: states (b, h, p, n), documents by index."""

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
        cu_seqlens=None, dt_softplus=False, return_final_states=False,
    ):  # fmt: skip
        assert initial_states.shape == (2, 4, 3, 5) and seq_idx.dtype == torch.int32
        assert not dt_softplus and chunk_size == 7
        B, C = (tensor.repeat_interleave(2, dim=2) for tensor in (B, C))
        state, outputs, before = initial_states, [], torch.zeros(2)
        for t in range(9):
            state = state * (seq_idx[:, t] == before)[:, None, None, None]
            before = seq_idx[:, t]
            new = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            state = torch.exp(dt[:, t] * A)[..., None, None] * state + new
            outputs.append((state * C[:, t, :, None]).sum(-1))
        y = torch.stack(outputs, 1)
        return (y, state) if return_final_states else y

    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("mamba_ssm.ops.triton.ssd_combined")
    module.mamba_chunk_scan_combined = mamba_chunk_scan_combined
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x, dt, A = torch.rand(2, 9, 4, 3), torch.rand(2, 9, 4), -torch.rand(4)
    B, C, initial = torch.rand(2, 9, 2, 5), torch.rand(2, 9, 2, 5), torch.rand(2, 4, 5, 3)
    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 4] = starts[1, 0] = True
    for got, expected in zip(
        mamba_ssm_ssd_scan(x, dt, A, B, C, starts, initial, 7),
        ssd_sequential(x, dt, A, B, C, starts, initial),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
