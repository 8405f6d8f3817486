"""A mixture of experts equals a loop over tokens, balances its load, and counts what it drops."""

import pytest
import torch
import torch.nn.functional as F

from toolmem.errors import ToolmemError
from toolmem.models import MoETransformer
from toolmem.models.context import Context, Extras
from toolmem.models.grouped import grouped_product, is_fused
from toolmem.models.layers import FeedForward
from toolmem.models.moe import MixtureOfExperts, dispatch

DIM, HIDDEN = 6, 10


def expert_output(moe, x, expert):
    """One expert's feed-forward on one token, written out."""
    h = moe.up.weight[expert] @ x
    if moe.kind == "swiglu":
        gate, value = h.chunk(2)
        h = gate * torch.sigmoid(gate) * value
    elif moe.kind == "relu2":
        h = h.clamp(min=0) ** 2
    else:
        h = F.gelu(h)
    return moe.down.weight[expert] @ h


def by_token(moe, x):
    """The layer, token by token and expert by expert; and how many pairs were dropped."""
    router = moe.router
    flat, outputs, dropped = x.flatten(0, 1), [], 0
    capacity = moe.capacity(len(flat)) if moe.training else 0
    taken = [0] * moe.n_experts
    choices = []
    for token in flat:
        logits = router.weight @ token
        scores = logits.softmax(0) if router.score == "softmax" else torch.sigmoid(logits)
        order = sorted(range(len(scores)), key=lambda i: -float(scores[i] + router.bias[i]))
        chosen = order[: moe.top_k]
        weights = scores[chosen]
        if router.normalize_weights:
            weights = weights / weights.sum()
        choices.append((token, chosen, weights * router.weight_scale))
    for token, chosen, weights in choices:
        y = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights, strict=True):
            if capacity and taken[expert] >= capacity:
                dropped += 1
                continue
            taken[expert] += 1
            y = y + weight * expert_output(moe, token, expert)
        if moe.shared is not None:
            y = y + moe.shared(token)
        outputs.append(y)
    return torch.stack(outputs).view(x.shape), dropped


VARIANTS = {
    "softmax": {},
    "sigmoid, shared, scaled": {"score": "sigmoid", "n_shared_experts": 2, "weight_scale": 2.5},
    "one of many": {"top_k": 1, "normalize_weights": False, "kind": "relu2"},
    "all": {"top_k": 5, "kind": "gelu"},
    "capacity": {"capacity_factor": 0.7},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_equals_a_loop_over_tokens_forward_and_backward(name):
    torch.manual_seed(0)
    moe = MixtureOfExperts(DIM, HIDDEN, n_experts=5, **({"top_k": 2} | VARIANTS[name]))
    moe.router.bias.copy_(0.2 * torch.randn(5))
    x = torch.randn(3, 8, DIM)
    weights = torch.randn(3, 8, DIM)
    context = Context(torch.arange(8), extras=Extras())
    results = []
    for run in (lambda v: moe(v, context), lambda v: by_token(moe, v)[0]):
        given = x.clone().requires_grad_()
        moe.zero_grad()
        y = run(given)
        (y * weights).sum().backward()
        grads = [None if p.grad is None else p.grad.clone() for p in moe.parameters()]
        results.append((y.detach(), given.grad, *grads))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    dropped = by_token(moe, x)[1]
    if name == "capacity":
        assert dropped > 0
        share = float(context.extras.metrics["moe/dropped_fraction"])
        assert share == pytest.approx(dropped / 48)
        moe.eval()  # nothing is dropped outside of training
        torch.testing.assert_close(moe(x), by_token(moe, x)[0], atol=1e-5, rtol=1e-4)
        assert by_token(moe, x)[1] == 0
    else:
        assert dropped == 0


def test_one_expert_is_the_dense_feed_forward():
    torch.manual_seed(0)
    moe = MixtureOfExperts(DIM, HIDDEN, n_experts=1, top_k=1)
    dense = FeedForward(DIM, HIDDEN, "swiglu")
    dense.up.weight.data = moe.up.weight.data[0]
    dense.down.weight.data = moe.down.weight.data[0]
    x = torch.randn(2, 7, DIM)
    torch.testing.assert_close(moe(x), dense(x), atol=1e-6, rtol=0)


def test_dispatch_sorts_and_drops_the_last_comers():
    experts = torch.tensor([[1, 0], [1, 2], [0, 1], [1, 2]])
    order, rows, ends = dispatch(experts, 4)
    assert experts.flatten()[order].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert ends.tolist() == [2, 6, 8, 8]
    assert order[rows].tolist() == list(range(8))
    order, rows, ends = dispatch(experts, 4, capacity=2)
    assert ends.tolist() == [2, 4, 6, 6]
    assert order[:6].tolist() == [1, 4, 0, 2, 3, 7] and sorted(order[6:].tolist()) == [5, 6]
    assert order[rows].tolist() == list(range(8))


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 0, 0], [9, 0, 0, 0], [2, 2, 2, 1]])
@pytest.mark.parametrize(
    ("dtype", "width", "out", "fused"),
    [(torch.float64, 4, 3, False), (torch.float32, 4, 8, True), (torch.float32, 6, 8, False)],
)
def test_grouped_products_are_products_by_group(sizes, dtype, width, out, fused):
    torch.manual_seed(0)
    ends = torch.tensor(sizes).cumsum(0).int()
    total = 9
    x = torch.randn(total, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(4, out, width, dtype=dtype, requires_grad=True)
    assert is_fused(x, weight) == (fused and hasattr(torch, "_grouped_mm"))
    start = 0
    pieces = []
    for group, size in enumerate(sizes):
        pieces.append(x[start : start + size] @ weight[group].T)
        start += size
    pieces.append(torch.zeros(total - start, out, dtype=dtype))  # rows of no group
    expected = torch.cat(pieces)
    got = grouped_product(x, weight, ends)
    torch.testing.assert_close(got, expected)
    side = torch.randn_like(expected)
    ours = torch.autograd.grad((got * side).sum(), (x, weight))
    theirs = torch.autograd.grad((expected * side).sum(), (x, weight))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def skewed(bias_update_rate, steps=200):
    """Load of four experts on tokens that all look like the first one's, after some steps."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(
        DIM, HIDDEN, 4, 1, normalize_weights=False, bias_update_rate=bias_update_rate
    )
    with torch.no_grad():
        moe.router.weight.copy_(0.1 * torch.randn(4, DIM))
        moe.router.weight[0, 0] += 1.0
    generator = torch.Generator().manual_seed(1)
    loads = []
    for _ in range(steps):
        x = torch.randn(1, 64, DIM, generator=generator)
        x[..., 0] = 1.0
        context = Context(torch.arange(64), extras=Extras())
        moe(x, context)
        loads.append(float(context.extras.metrics["moe/load_max_over_mean"]))
        moe.router.after_optimizer_step(lambda load: load)
    return sum(loads[-20:]) / 20


def test_the_bias_evens_the_load():
    assert skewed(0.0) > 3.0
    assert skewed(0.01) < 1.8


def test_the_bias_moves_by_the_load_of_all_ranks_and_stays_in_checkpoints():
    moe = MixtureOfExperts(DIM, HIDDEN, 4, 2, bias_update_rate=0.5)
    moe.router.load.copy_(torch.tensor([9, 1, 5, 5]))
    moe.router.after_optimizer_step(lambda load: load + torch.tensor([0, 8, 0, 0]))
    # 28 choices in all, 7 each when even: experts 0 and 1 had 9
    assert moe.router.bias.tolist() == [-0.5, -0.5, 0.5, 0.5]
    assert not moe.router.load.any()
    again = MixtureOfExperts(DIM, HIDDEN, 4, 2)
    again.load_state_dict(moe.state_dict())
    assert torch.equal(again.router.bias, moe.router.bias)


def test_losses_are_the_papers():
    torch.manual_seed(0)
    moe = MixtureOfExperts(DIM, HIDDEN, 4, 2, balance_loss=0.3, z_loss=0.7)
    x = torch.randn(2, 9, DIM)
    context = Context(torch.arange(9), extras=Extras())
    moe(x, context)
    logits = x.flatten(0, 1).double() @ moe.router.weight.double().T
    p = logits.softmax(-1)
    chosen = torch.zeros(4, dtype=torch.float64)
    for token in p:
        for expert in token.topk(2).indices:
            chosen[expert] += 1
    balance = 4 * (chosen / chosen.sum() * p.mean(0)).sum()
    size = torch.log(logits.exp().sum(-1)).square().mean()
    losses = context.extras.losses
    assert float(losses["moe/balance_loss"]) == pytest.approx(0.3 * float(balance), rel=1e-5)
    assert float(losses["moe/z_loss"]) == pytest.approx(0.7 * float(size), rel=1e-5)
    entropy = -(p * p.log()).sum(-1).mean()
    assert float(context.extras.metrics["moe/router_entropy"]) == pytest.approx(
        float(entropy), rel=1e-5
    )
    assert losses["moe/balance_loss"].requires_grad
    moe.eval()
    quiet = Context(torch.arange(9), extras=Extras())
    moe(x, quiet)
    assert not quiet.extras.losses


def test_active_parameters_are_those_of_the_chosen_experts():
    model = MoETransformer(
        30, 8, 3, 2, hidden_dim=16, n_experts=6, top_k=2, n_shared_experts=1, dense_layers=1
    )
    expert = 3 * 8 * 16
    total = sum(p.numel() for p in model.parameters())
    assert model.active_parameters() == total - 2 * (6 - 2) * expert
    assert model.parameter_counts()["router"] == 2 * 6 * 8
    assert isinstance(model.blocks[0].feed_forward, FeedForward)
    assert model.blocks[0].feed_forward.down.in_features == 3 * 16


@pytest.mark.slow
def test_compiled_equals_eager():
    torch.manual_seed(0)
    model = MoETransformer(20, 8, 1, 2, hidden_dim=8, n_experts=4)
    compiled = torch.compile(model.hidden, dynamic=True)
    for seq in (9, 17):
        row = torch.randint(20, (2, seq))
        torch.testing.assert_close(compiled(row), model.hidden(row), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k is 9"),
        ({"n_experts": 0}, "n_experts is 0"),
        ({"score": "max"}, "score: unknown 'max'"),
        ({"top_k": 1}, "normalize_weights: false"),
        ({"balance_loss": -1.0}, "balance_loss is -1"),
        ({"capacity_factor": -1.0}, "capacity_factor is -1"),
        ({"dense_layers": 2}, "dense_layers is 2"),
        ({"weight_scale": 0.0}, "weight_scale is 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ToolmemError, match=message):
        MoETransformer(20, 8, 2, 2, **options)
