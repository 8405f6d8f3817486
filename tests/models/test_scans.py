"""The selective scan by chunks equals the recurrence written plainly, gradients too."""

import pytest
import torch

from toolmem.models import scans
from toolmem.models.scans import prefix_scan_, selective_scan, selective_scan_sequential


def inputs(b, s, d, n, dtype=torch.float64, steps=1.0, seed=0):
    torch.manual_seed(seed)
    x, dt = torch.randn(b, s, d, dtype=dtype), torch.rand(b, s, d, dtype=dtype) * steps
    A = -4 * torch.rand(n, d, dtype=dtype) - 0.1
    B, C = torch.randn(b, s, n, dtype=dtype), torch.randn(b, s, n, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]


def assert_same(tensors, starts, initial, chunked=selective_scan):
    """Values and gradients of both forms, in float64."""
    expected = selective_scan_sequential(*tensors, starts, initial)
    got = chunked(*tensors, starts, initial)
    weights = [torch.randn_like(tensor) for tensor in expected]
    wanted = tensors if initial is None else [*tensors, initial]
    grads = [torch.autograd.grad(result, wanted, weights) for result in (expected, got)]
    for one, other in zip((*expected, *grads[0]), (*got, *grads[1]), strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 32, 33])
def test_parallel_prefix_on_paper(length, reverse):
    torch.manual_seed(0)
    decay, values = torch.rand(2, length, 3).double(), torch.randn(2, length, 3).double()
    expected, running = torch.empty_like(values), torch.zeros(2, 3).double()
    for t in reversed(range(length)) if reverse else range(length):
        running = decay[:, t] * running + values[:, t]
        expected[:, t] = running
    prefix_scan_(decay, values, reverse)
    torch.testing.assert_close(values, expected)


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 75])
def test_chunked_equals_sequential(length, with_starts, with_initial):
    tensors = inputs(3, length, 5, 4)
    starts = torch.rand(3, length) < 0.15 if with_starts else None
    initial = torch.randn(3, 4, 5).double().requires_grad_() if with_initial else None
    assert_same(tensors, starts, initial)


def test_rows_that_take_turns(monkeypatch):
    monkeypatch.setattr(scans, "CPU_NUMBERS", 2 * 32 * 4 * 5)  # two rows of five, at a time
    initial = torch.randn(5, 4, 5).double().requires_grad_()
    assert_same(inputs(5, 70, 5, 4), torch.rand(5, 70) < 0.1, initial)


def test_gradients_are_those_of_finite_differences():
    def scan(x, dt, A, B, C, initial):
        return selective_scan(
            x, dt, A, B, C, torch.tensor([[False] * 3 + [True] + [False] * 2]), initial
        )

    tensors = [*inputs(1, 6, 2, 3), torch.randn(1, 3, 2).double().requires_grad_()]
    torch.autograd.gradcheck(scan, tensors)


@pytest.mark.parametrize("steps", [1e-4, 1.0, 1e3])
def test_float32_is_safe_for_any_step(steps):
    """Steps of 1,000 forget all at once; steps of 0.0001 hardly anything in 300 tokens."""
    tensors = inputs(2, 300, 4, 16, torch.float32, steps)
    exact = selective_scan_sequential(*(tensor.double() for tensor in tensors))
    y, last = selective_scan(*tensors)
    scale = exact[0].abs().max()
    torch.testing.assert_close(y.double() / scale, exact[0] / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(last.double() / scale, exact[1] / scale, atol=1e-5, rtol=0)
    grads = torch.autograd.grad(y.square().mean(), tensors)
    exact_grads = torch.autograd.grad(exact[0].square().mean(), tensors)
    for grad, one in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad / one.abs().max(), one / one.abs().max(), atol=1e-4, rtol=0)


def test_a_step_of_zero_leaves_the_state():
    x, dt, A, B, C = (tensor.detach() for tensor in inputs(2, 40, 3, 4))
    dt[0, 25:] = 0
    _, last = selective_scan(x, dt, A, B, C)
    _, short = selective_scan(x[:, :25], dt[:, :25], A, B[:, :25], C[:, :25])
    torch.testing.assert_close(last[0], short[0], atol=1e-14, rtol=0)


def test_it_is_a_well_behaved_operator():
    """Its fake form, its schema and its gradient, by torch's own checks."""
    starts = torch.rand(2, 40) < 0.2
    initial = torch.randn(2, 4, 3).double().requires_grad_()
    for optional in ((None, None), (starts, initial)):
        operator = torch.ops.toolmem.selective_scan.default
        torch.library.opcheck(operator, (*inputs(2, 40, 3, 4), *optional))
