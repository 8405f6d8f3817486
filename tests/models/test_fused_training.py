"""Training by C equals the model's own forward pass and autograd's gradients."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from toolmem.errors import ToolmemError
from toolmem.models import Transformer, kernels
from toolmem.models import fused_training as fused
from toolmem.models.context import Extras
from toolmem.models.fused_training import FusedBlocks
from toolmem.models.kernels import build

SHAPES = [(8, 1), (12, 2), (16, 2), (16, 3), (20, 2), (24, 2), (40, 2)]
OPTIONS = {
    "swiglu": {"feed_forward": "swiglu"},
    "gelu": {"feed_forward": "gelu"},
    "relu2": {"feed_forward": "relu2", "hidden_dim": 37},
    "no convolution": {"conv_width": 0},
    "two taps": {"conv_width": 2},
    "five taps": {"conv_width": 5},
    "convolved branches": {"residual_conv": 4},
    "other taps": {"conv_width": 0, "residual_conv": 3},
    "grouped": {"n_heads": 4, "n_kv_heads": 2},
    "one key": {"n_heads": 3, "n_kv_heads": 1, "head_dim": 6},
    "odd heads": {"position": "none", "head_dim": 5},
    "no positions": {"position": "none"},
    "learned": {"position": "learned"},
    "partly rotary": {"rope_fraction": 0.5, "embedding_norm": True},
    "some without positions": {"nope_every": 2},
    "slower turns": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "untied": {"tie_embeddings": False, "embedding_scale": False, "norm_eps": 1e-2},
}


@pytest.fixture(autouse=True)
def _compiled():
    if not kernels.available():
        pytest.skip("no C compiler here: training runs by torch's operations")


def model_of(**options):
    torch.manual_seed(0)
    base = {"dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 80, "feed_forward": "silu"}
    base |= {"conv_width": 4, "tie_embeddings": True, "embedding_scale": True}
    model = Transformer(50, **(base | options))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def spy(monkeypatch):
    """How often the C code was called."""
    calls = []
    run = FusedBlocks._run

    def noted(self, *args):
        calls.append(self)
        return run(self, *args)

    monkeypatch.setattr(FusedBlocks, "_run", noted)
    return calls


def gradients(model, hidden, tokens, weights):
    model.zero_grad()
    logits = model.logits(hidden(tokens))
    (logits * weights).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def check(model, batch, seq, tolerance=2e-5):
    """Logits and gradients against the plain pass in float64; where no gradient comes, rows get shorter."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (batch, seq), generator=generator)
    weights = torch.randn(batch, seq, 50, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, seq + 1, (batch,), generator=generator)
    weights *= (torch.arange(seq) < lengths[:, None])[:, :, None]
    logits, found = gradients(model, FusedBlocks(model, True), tokens, weights.float())
    exact = copy.deepcopy(model).double()
    expected, wanted = gradients(exact, exact.hidden, tokens, weights)
    assert (logits - expected).norm() <= tolerance * expected.norm()
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm() + 1e-12, name


@pytest.mark.parametrize(("dim", "layers"), SHAPES)
def test_equals_the_plain_pass(dim, layers):
    check(model_of(dim=dim, n_layers=layers), 33, 70)


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_plain_pass_with(name):
    check(model_of(**OPTIONS[name]), 5, 23)


@pytest.mark.parametrize("seq", [1, 2, 3, 7])
def test_short_rows(seq):
    check(model_of(residual_conv=4), 3, seq)
    check(model_of(residual_conv=7, conv_width=6), 18, seq)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    head_dim=st.integers(1, 9).map(lambda half: 2 * half),
    dim=st.integers(4, 33),
    kv_heads=st.integers(1, 3),
    share=st.integers(1, 3),
    hidden=st.integers(1, 40),
    batch=st.integers(1, 35),
    seq=st.integers(1, 30),
    kind=st.sampled_from(["silu", "gelu", "relu2", "swiglu"]),
    conv=st.integers(0, 5),
)
def test_any_shape(head_dim, dim, kv_heads, share, hidden, batch, seq, kind, conv):
    options = {"n_heads": kv_heads * share, "n_kv_heads": kv_heads, "head_dim": head_dim}
    options |= {"dim": dim, "hidden_dim": hidden, "feed_forward": kind, "conv_width": conv}
    check(model_of(n_layers=1, **options), batch, seq, tolerance=1e-4)


def test_large_numbers():
    """Weights of attention that are nearly one, gates that are shut: nothing overflows."""
    for kind in ("silu", "swiglu", "gelu", "relu2"):
        model = model_of(feed_forward=kind)
        for block in model.blocks:
            block.mixer.qkv.weight.data *= 15
            block.feed_forward.up.weight.data *= 20
        # small differences of large scores: float32 itself is no better
        check(model, 4, 20, tolerance=5e-3)


def test_twenty_steps_of_training():
    plain = model_of()
    fast = copy.deepcopy(plain)
    hiddens = [plain.hidden, FusedBlocks(fast, True)]
    optimizers = [torch.optim.SGD(m.parameters(), 0.02, momentum=0.9) for m in (plain, fast)]
    first = None
    for step in range(20):
        tokens = torch.randint(0, 50, (19, 31), generator=torch.Generator().manual_seed(step % 4))
        losses = []
        for model, hidden, optimizer in zip((plain, fast), hiddens, optimizers, strict=True):
            logits = model.logits(hidden(tokens[:, :-1])).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        first = first or losses[0]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] < first - 0.5
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_add_up_over_passes_whose_graphs_live_at_once():
    model = model_of()
    hidden = FusedBlocks(model, True)
    tokens = torch.randint(0, 50, (2, 20, 12))
    wanted = gradients(model, model.hidden, tokens.flatten(0, 1), torch.ones(()))[1]
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    model.zero_grad()
    first, second = (model.logits(hidden(part)).sum() for part in tokens)
    first.backward()
    second.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-3)


def test_a_graph_that_is_kept_gives_its_gradient_again():
    model = model_of()
    y = FusedBlocks(model, True)(torch.randint(0, 50, (9, 9))).square().sum()
    weight = model.blocks[0].mixer.qkv.weight
    first = torch.autograd.grad(y, weight, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y, weight)[0], first)


def test_a_weight_that_has_changed_before_the_backward_pass_is_noticed():
    model = model_of()
    y = FusedBlocks(model, True)(torch.randint(0, 50, (9, 9))).sum()
    with torch.no_grad():
        model.blocks[0].mixer.qkv.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_weights_that_have_moved_are_found():
    model = model_of()
    hidden = FusedBlocks(model, True)
    tokens = torch.randint(0, 50, (9, 9))
    y = hidden(tokens)
    before = torch.autograd.grad(y.sum(), model.norm.weight, retain_graph=True)[0]
    up = model.blocks[0].feed_forward.up
    up.weight.data = 2 * up.weight.data
    # the graph made before goes on with the weights that there are: no worse than reading freed memory
    y.sum().backward()
    torch.testing.assert_close(hidden(tokens), model.hidden(tokens), rtol=1e-4, atol=1e-5)
    model.norm.weight = nn.Parameter(3 * model.norm.weight.data)
    torch.testing.assert_close(hidden(tokens), model.hidden(tokens), rtol=1e-4, atol=1e-5)
    model.double()
    found = FusedBlocks(model)
    assert torch.equal(found(tokens), model.hidden(tokens))
    assert before.isfinite().all()


def test_frozen_weights_get_no_gradient():
    model = model_of(tie_embeddings=False)
    model.blocks[0].requires_grad_(False)
    model.embedding.requires_grad_(False)
    FusedBlocks(model, True)(torch.randint(0, 50, (9, 9))).sum().backward()
    assert model.blocks[0].mixer.qkv.weight.grad is None
    assert model.blocks[1].mixer.qkv.weight.grad is not None


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_again(threads):
    model = model_of()
    tokens = torch.randint(0, 50, (70, 20))
    weights = torch.randn(70, 20, 50)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runs = [gradients(model, FusedBlocks(model, True), tokens, weights) for _ in range(3)]
        check(model, 70, 20)
    finally:
        torch.set_num_threads(before)
    for logits, found in runs[1:]:
        assert torch.equal(logits, runs[0][0])
        assert all(torch.equal(found[name], runs[0][1][name]) for name in found)


def test_a_row_does_not_depend_on_its_neighbours():
    model = model_of()
    hidden = FusedBlocks(model, True)
    tokens = torch.randint(0, 50, (40, 20))
    together = hidden(tokens)
    assert torch.equal(hidden(tokens[7:8]), together[7:8])
    # causal: nor do tokens on those after them
    assert torch.equal(hidden(tokens[:, :11]), together[:, :11])


REFUSED = {
    "norm": {"norm": "layer"},
    "bias": {"bias": True},
    "qk_norm": {"qk_norm": True},
    "window": {"window": 5},
    "prefix": {"attention_mask": "prefix"},
    "softcap": {"attention_softcap": 5.0},
    "values": {"value_residual": True},
    "sandwich": {"sandwich_norm": True},
    "dropout": {"dropout": 0.1},
    "mla": {"attention": "mla"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_models_take_their_own_pass(name, monkeypatch):
    calls = spy(monkeypatch)
    model = model_of(**REFUSED[name])
    tokens = torch.randint(0, 50, (9, 9))
    torch.manual_seed(0)
    found = FusedBlocks(model)(tokens)
    torch.manual_seed(0)
    assert torch.equal(found, model.hidden(tokens))
    assert not calls
    with pytest.raises(ToolmemError, match=r"model\.fused is true"):
        FusedBlocks(model, True)


def test_passes_of_another_kind_take_the_models_own(monkeypatch):
    calls = spy(monkeypatch)
    model = model_of()
    hidden = FusedBlocks(model, True)
    tokens = torch.randint(0, 50, (9, 9))
    hidden(tokens)
    assert len(calls) == 1
    with torch.no_grad():
        hidden(tokens)
    with FlopCounterMode(display=False) as counter:
        hidden(tokens)
    assert counter.get_total_flops() > 0
    handle = model.blocks[0].mixer.out.register_forward_hook(lambda *_: None)
    hidden(tokens)
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    hidden(tokens)
    handle.remove()
    torch.func.vjp(lambda weight: hidden(tokens), model.embedding.weight)
    assert len(calls) == 1
    with pytest.raises(ToolmemError, match="documents"):
        hidden(tokens, documents=torch.zeros(9, 9, dtype=torch.int32))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ToolmemError, match=r"trainer\.precision"),
    ):
        hidden(tokens)
    hidden(tokens, extras=Extras())
    assert len(calls) == 2


def test_auto_leaves_to_torch_what_torch_does_faster(monkeypatch):
    calls = spy(monkeypatch)
    hidden = FusedBlocks(model_of())
    hidden(torch.randint(0, 50, (fused.FEWEST_ROWS - 1, 9)))
    assert not calls
    hidden(torch.randint(0, 50, (fused.FEWEST_ROWS, 9)))
    assert len(calls) == 1
    monkeypatch.setattr(fused, "WIDEST", 15)
    hidden(torch.randint(0, 50, (fused.FEWEST_ROWS, 9)))
    assert len(calls) == 1


def test_other_weights_take_the_models_own(monkeypatch):
    calls = spy(monkeypatch)
    tokens = torch.randint(0, 50, (9, 9))
    FusedBlocks(model_of().double())(tokens).sum().backward()
    assert not calls
    model = model_of()
    model.use_attention("plain")
    FusedBlocks(model)(tokens)
    model = model_of()
    model.blocks[1].feed_forward.up = nn.Sequential(model.blocks[1].feed_forward.up)
    FusedBlocks(model)(tokens)
    assert not calls


def test_without_a_compiler(monkeypatch):
    calls = spy(monkeypatch)
    monkeypatch.setattr(fused, "library", lambda: None)
    model = model_of()
    tokens = torch.randint(0, 50, (9, 9))
    assert torch.equal(FusedBlocks(model)(tokens), model.hidden(tokens))
    assert not calls
    with pytest.raises(ToolmemError, match="no C compiler"):
        FusedBlocks(model, True)
    build.library.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    try:
        assert build.library() is None
    finally:
        build.library.cache_clear()


def test_a_copy_trains_the_copy():
    model = model_of()
    hidden = FusedBlocks(model, True)
    hidden(torch.randint(0, 50, (9, 9)))
    both = copy.deepcopy({"model": model, "hidden": hidden})
    assert both["hidden"].model is both["model"]
    both["hidden"](torch.randint(0, 50, (9, 9))).sum().backward()
    assert both["model"].blocks[0].mixer.qkv.weight.grad is not None
    assert model.blocks[0].mixer.qkv.weight.grad is None
