"""Mamba-1 equals transformers'; both Mambas decode, pack and start as they are to."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.errors import ToolmemError
from toolmem.models.mamba import Mamba, Mamba1Mixer, mamba_ssm_selective_scan
from toolmem.models.mamba2 import Mamba2
from toolmem.models.scans import selective_scan_sequential
from toolmem.training import Muon

SMALL2 = {"state_dim": 6, "head_dim": 8, "chunk_size": 4}
VARIANTS = {
    "mamba1": (Mamba, {"state_dim": 4}),
    "mamba1, feed-forward, convs": (
        Mamba,
        {"hidden_dim": 24, "residual_conv": 3, "conv_width": 2, "dt_rank": 3, "bias": True},
    ),
    "mamba1, no conv": (Mamba, {"conv_width": 1, "expand": 1, "norm": "layer"}),
    "mamba2": (Mamba2, SMALL2),
    "mamba2, groups": (Mamba2, SMALL2 | {"n_groups": 2, "chunk_size": 5, "conv_width": 3}),
    "mamba2, feed-forward, convs": (
        Mamba2,
        SMALL2 | {"hidden_dim": 24, "residual_conv": 2, "sandwich_norm": True, "bias": True},
    ),
}


def make(name, **more):
    torch.manual_seed(0)
    kind, options = VARIANTS[name]
    sizes = {"n_layers": 2, "max_seq_len": 64}
    model = kind(40, 16, **(sizes | options | more)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


MODELS = {name: make(name) for name in VARIANTS}


def rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 40, (n,), generator=generator) for n in lengths]


def feed(model, cache, parts):
    """Run ragged parts through the cache; the real logits of each lane."""
    counts = torch.tensor([len(part) for part in parts])
    chunk = torch.full((len(parts), max(1, int(counts.max()))), 39)
    for lane, part in enumerate(parts):
        chunk[lane, : len(part)] = part
    uniform = bool((counts == chunk.shape[1]).all())
    logits = model(chunk, cache=cache, counts=None if uniform else counts)
    return [logits[lane, : len(part)] for lane, part in enumerate(parts)]


@st.composite
def splits(draw):
    """Lengths of ragged lanes, and for each the sizes of the chunks it comes in (0: it waits)."""
    lanes = draw(st.integers(1, 4))
    n_chunks = draw(st.integers(1, 6))
    sizes = st.lists(st.integers(0, 8), min_size=n_chunks, max_size=n_chunks)
    return [draw(sizes) for _ in range(lanes)]


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=splits())
@torch.no_grad()
def test_any_split_gives_the_full_forward(name, sizes):
    model = MODELS[name]
    texts = rows([sum(one) for one in sizes])
    cache = model.new_cache(len(sizes), max(1, max(sum(one) for one in sizes)))
    got = [[] for _ in sizes]
    position = [0] * len(sizes)
    for chunk in zip(*sizes, strict=True):
        parts = [text[p : p + n] for text, p, n in zip(texts, position, chunk, strict=True)]
        for lane, logits in enumerate(feed(model, cache, parts)):
            got[lane].append(logits)
        position = [p + n for p, n in zip(position, chunk, strict=True)]
    for text, pieces in zip(texts, got, strict=True):
        if len(text):
            full = model(text[None])[0]
            torch.testing.assert_close(torch.cat(pieces), full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_token_by_token_gives_the_full_forward(name):
    model = MODELS[name]
    [text] = rows([60])
    cache = model.new_cache(1, 60)
    steps = torch.cat([feed(model, cache, [text[t : t + 1]])[0] for t in range(60)])
    torch.testing.assert_close(steps, model(text[None])[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_lanes_move_to_the_host_and_back_and_change_places(name):
    model = MODELS[name]
    texts = rows([9, 4, 12])
    cache = model.new_cache(3, 14)
    feed(model, cache, texts)
    away = cache.detach(torch.tensor([2, 0]))
    cache.gather(torch.tensor([1, 1]))
    feed(model, cache, [torch.tensor([5, 6]), torch.tensor([7])])
    cache.restore(away)
    got = feed(model, cache, [torch.tensor([n]) for n in (1, 2, 3, 4)])
    whole = [[*texts[1], 5, 6, 1], [*texts[1], 7, 2], [*texts[2], 3], [*texts[0], 4]]
    for logits, text in zip(got, whole, strict=True):
        full = model(torch.tensor([[int(t) for t in text]]))[0, -1:]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_are_as_far_apart_as_rows(name):
    """Values, and gradients: nothing flows over a document's start."""
    model = make(name).double()
    texts = rows([7, 1, 13, 9])
    packed = torch.cat(texts)[None]
    documents = torch.cat([torch.full((len(t),), 3 * i + 1) for i, t in enumerate(texts)])[None]
    together = model(packed, documents=documents)[0]
    alone = torch.cat([model(text[None])[0] for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    weights = torch.randn_like(alone)
    grads = [
        torch.autograd.grad((y * weights).sum(), list(model.parameters()))
        for y in (together, alone)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", ["mamba1", "mamba2, groups"])
def test_a_recipe_decides_a_checkpoint(name):
    model = MODELS[name]
    again = type(model)(**model.init_args)
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    [text] = rows([20])
    torch.testing.assert_close(again.eval()(text[None]), model(text[None]))


@pytest.mark.parametrize("name", VARIANTS)
def test_only_linear_maps_are_matrices(name):
    """Decay rates, step sizes and taps are one-dimensional: Muon and weight decay leave them alone."""
    model = MODELS[name]
    maps = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    matrices = {n for n, p in model.named_parameters() if p.ndim > 1} - {"embedding.weight"}
    assert matrices == maps
    groups = Muon().build(model).param_groups
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in decaying} >= maps
    assert not any(id(p) in decaying for p in model.parameters() if p.ndim == 1)
    counts = model.parameter_counts()
    assert counts["ssm"] > 0 and counts["attention"] == 0


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
@pytest.mark.parametrize("scheme", ["scaled", "gpt2"])
def test_what_the_papers_start_with(kind, scheme):
    torch.manual_seed(0)
    model = kind(40, 64, 1, initialization=scheme)
    mixer = model.blocks[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias.detach())
    assert dt.min() >= 1e-3 and dt.max() <= 0.1001
    # even on a log scale: half of them below the middle, 0.01
    if kind is Mamba:
        assert 0.35 < (dt < 0.01).float().mean() < 0.65
        rates = mixer.A_log.exp().view(16, 128)
        torch.testing.assert_close(rates, torch.arange(1.0, 17)[:, None].expand(16, 128))
        assert mixer.dt_proj.weight.abs().max() <= 4**-0.5
        assert abs(mixer.dt_proj.weight.std() * (3 * 4) ** 0.5 - 1) < 0.15
    else:
        assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    taps = mixer.conv.taps.detach().view(4, -1).clone()
    taps[0] += 1
    assert taps.abs().max() <= 0.5 and abs(taps.std() * 12**0.5 - 1) < 0.1


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_decoding_state_on_paper(kind):
    model = kind(40, 64, 3, state_dim=16)
    channels = 128 if kind is Mamba else 128 + 2 * 16
    floats = 3 * channels + 128 * 16  # the convolution's tail, and the scan's state
    for max_len in (1, 1000):
        assert model.new_cache(2, max_len).size_in_bytes() == 3 * 2 * 4 * floats
    half = model.new_cache(2, 5, dtype=torch.bfloat16)
    assert half.size_in_bytes() == 3 * 2 * (2 * 3 * channels + 4 * 128 * 16)
    assert half.layers[0].mixer.ssm.dtype == torch.float32


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_mixed_precision_keeps_the_scan_in_float32(name):
    model = MODELS[name]
    [text] = rows([40])
    with torch.autocast("cpu", torch.bfloat16):
        y = model(text[None])
        y.float().square().mean().backward()
    exact = model(text[None])
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    half = make(name).to(torch.bfloat16)
    with torch.no_grad():
        assert (half(text[None]).float() - exact).abs().max() < 0.1 * exact.abs().max()
        cache = half.new_cache(1, 50)
        feed(half, cache, [text])
        assert cache.layers[0].mixer.ssm.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mamba1", "mamba2, groups"])
def test_it_compiles_for_any_length(name):
    model = make(name, n_layers=1)
    compiled = torch.compile(model.hidden, dynamic=True, fullgraph=True)
    for length in (40, 33):
        [text] = rows([length])
        y, expected = compiled(text[None]), model.hidden(text[None])
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        grads = [
            torch.autograd.grad(z.square().sum(), list(model.blocks.parameters()))
            for z in (y, expected)
        ]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_parity_with_transformers():
    """The same weights give transformers' logits, and its gradients."""
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=50, hidden_size=24, state_size=5, num_hidden_layers=2, expand=2, conv_kernel=4,
        time_step_rank=3, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = MambaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    ours = Mamba(50, 24, 2, state_dim=5, dt_rank=3, max_seq_len=128).eval()
    ours.load_state_dict(from_transformers(theirs, theirs.backbone.layers))
    tokens = torch.randint(50, (2, 70))
    expected, got = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    weights = torch.randn_like(got)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for mine, layer in zip(ours.blocks, theirs.backbone.layers, strict=True):
        rates = layer.mixer.A_log.grad.T.flatten()
        torch.testing.assert_close(mine.mixer.A_log.grad, rates, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(
            mine.mixer.in_proj.weight.grad, layer.mixer.in_proj.weight.grad, atol=1e-3, rtol=1e-3
        )


def from_transformers(model, layers):
    """transformers' weights by our names."""
    state = {
        "embedding.weight": model.backbone.embeddings.weight,
        "head.weight": model.lm_head.weight,
        "norm.weight": model.backbone.norm_f.weight,
    }
    for index, layer in enumerate(layers):
        mixer, prefix = layer.mixer, f"blocks.{index}.mixer"
        state[f"{prefix}_norm.weight"] = layer.norm.weight
        taps = mixer.conv1d.weight[:, 0].flip(1).T.clone()
        taps[0] -= 1
        state[f"{prefix}.conv.taps"] = taps.flatten()
        state[f"{prefix}.conv_bias"] = mixer.conv1d.bias
        state[f"{prefix}.D"] = mixer.D
        state[f"{prefix}.A_log"] = mixer.A_log.T.flatten()
        state[f"{prefix}.in_proj.weight"] = mixer.in_proj.weight
        state[f"{prefix}.out.weight"] = mixer.out_proj.weight
        if hasattr(mixer, "x_proj"):
            state[f"{prefix}.x_proj.weight"] = mixer.x_proj.weight
            state[f"{prefix}.dt_proj.weight"] = mixer.dt_proj.weight
            state[f"{prefix}.dt_bias"] = mixer.dt_proj.bias
        else:
            state[f"{prefix}.dt_bias"] = mixer.dt_bias
            state[f"{prefix}.norm.weight"] = mixer.norm.weight
    return {name: tensor.detach() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dim": 0}, "state_dim is 0"),
        ({"dt_rank": 0}, "dt_rank is 0"),
        ({"hidden_dim": 0}, "hidden_dim is 0"),
        ({"dt_min": 0.5}, "dt_min is 0.5"),
        ({"kernel": "cuda"}, "kernel: unknown 'cuda'"),
        ({"kernel": "mamba_ssm"}, "not installed"),
        ({"initialization": "no"}, "initialization: unknown"),
    ],
)
def test_refusals(options, message, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToolmemError, match=message):
        Mamba(40, 16, 1, **options)


@pytest.mark.parametrize("kind", [Mamba, Mamba2])
def test_cuda_kernels_are_refused_on_a_cpu(kind, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    model = kind(40, 32, 1, kernel="mamba_ssm")
    with pytest.raises(ToolmemError, match="kernel: mamba_ssm runs on CUDA"):
        model(torch.zeros(1, 4, dtype=torch.int64))


def test_the_cuda_kernel_is_called_as_its_authors_say(monkeypatch):
    """A stand-in of the kernel's signature and layout, channels first, states last."""

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):  # fmt: skip
        assert u.shape == delta.shape == (2, 3, 9) and A.shape == (3, 4) and B.shape == (2, 4, 9)
        assert not delta_softplus and D is z is delta_bias is None
        state, outputs = torch.zeros(2, 3, 4), []
        for t in range(9):
            new = delta[:, :, t, None] * B[:, None, :, t] * u[:, :, t, None]
            state = torch.exp(delta[:, :, t, None] * A) * state + new
            outputs.append((state * C[:, None, :, t]).sum(-1))
        y = torch.stack(outputs, -1)
        return (y, state) if return_last_state else y

    module = types.ModuleType("mamba_ssm.ops.selective_scan_interface")
    module.selective_scan_fn = selective_scan_fn
    monkeypatch.setitem(sys.modules, "mamba_ssm", types.ModuleType("mamba_ssm"))
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops", types.ModuleType("mamba_ssm.ops"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    x, dt, B, C = (torch.rand(2, 9, n) for n in (3, 3, 4, 4))
    A = -torch.rand(4, 3)
    for got, expected in zip(
        mamba_ssm_selective_scan(x, dt, A, B, C, None),
        selective_scan_sequential(x, dt, A, B, C),
        strict=True,
    ):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ToolmemError, match="packed documents"):
        mamba_ssm_selective_scan(x, dt, A, B, C, torch.zeros(2, 9, dtype=torch.bool))


def test_default_sizes():
    assert Mamba1Mixer(8, expand=1).dt_rank == 1
    assert Mamba1Mixer(40).dt_rank == 3
    assert Mamba1Mixer(40).inner == 80
