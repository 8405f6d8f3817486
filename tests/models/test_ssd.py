"""The scan by matrix products equals the recurrence written plainly, gradients too."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from toolmem.models import ssd
from toolmem.models.flop_formulas import formula_of
from toolmem.models.ssd import ssd_scan, ssd_sequential


def inputs(b, s, h, p, g, n, dtype=torch.float64, steps=1.0, seed=0):
    torch.manual_seed(seed)
    x, dt = torch.randn(b, s, h, p, dtype=dtype), torch.rand(b, s, h, dtype=dtype) * steps
    A = -4 * torch.rand(h, dtype=dtype) - 0.1
    B, C = torch.randn(b, s, g, n, dtype=dtype), torch.randn(b, s, g, n, dtype=dtype)
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C)]


def test_the_recurrence_is_the_formula():
    """Against sums over all earlier tokens: y_t = sum over s of C_t B_s exp(A sum of dt) dt_s x_s."""
    x, dt, A, B, C = (tensor.detach() for tensor in inputs(1, 6, 4, 3, 2, 5))
    y, last = ssd_sequential(x, dt, A, B, C)
    for head in range(4):
        group = head // 2
        state = torch.zeros(5, 3).double()
        for t in range(6):
            total = torch.zeros(3).double()
            for s in range(t + 1):
                decay = torch.exp(A[head] * dt[0, s + 1 : t + 1, head].sum())
                share = (C[0, t, group] @ B[0, s, group]) * decay * dt[0, s, head]
                total += share * x[0, s, head]
            torch.testing.assert_close(y[0, t, head], total)
        for s in range(6):
            decay = torch.exp(A[head] * dt[0, s + 1 :, head].sum()) * dt[0, s, head]
            state += decay * torch.outer(B[0, s, group], x[0, s, head])
        torch.testing.assert_close(last[0, head], state)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 30])
def test_chunked_equals_sequential(length, with_starts, with_initial, groups):
    tensors = inputs(2, length, 4, 3, groups, 5)
    starts = torch.rand(2, length) < 0.15 if with_starts else None
    initial = torch.randn(2, 4, 5, 3).double().requires_grad_() if with_initial else None
    expected = ssd_sequential(*tensors, starts, initial)
    got = ssd_scan(*tensors, starts, initial, chunk_size=8)
    weights = [torch.randn_like(tensor) for tensor in expected]
    wanted = [*tensors, initial] if with_initial else tensors
    grads = [torch.autograd.grad(result, wanted, weights) for result in (expected, got)]
    for one, other in zip((*expected, *grads[0]), (*got, *grads[1]), strict=True):
        torch.testing.assert_close(other, one, atol=1e-10, rtol=1e-10)


def test_gradients_are_those_of_finite_differences():
    starts = torch.tensor([[False] * 3 + [True] + [False] * 2])

    def scan(x, dt, A, B, C, initial):
        return ssd_scan(x, dt, A, B, C, starts, initial, chunk_size=4)

    tensors = [*inputs(1, 6, 2, 2, 1, 3), torch.randn(1, 2, 3, 2).double().requires_grad_()]
    torch.autograd.gradcheck(scan, tensors)


@pytest.mark.parametrize("steps", [1e-4, 1.0, 1e3])
def test_float32_is_safe_for_any_step(steps):
    """Steps of 1,000 forget all at once; steps of 0.0001 hardly anything in 300 tokens."""
    tensors = inputs(2, 300, 4, 8, 1, 16, torch.float32, steps)
    exact = ssd_sequential(*(tensor.double() for tensor in tensors))
    y, last = ssd_scan(*tensors)
    scale = exact[0].abs().max()
    torch.testing.assert_close(y.double() / scale, exact[0] / scale, atol=1e-5, rtol=0)
    torch.testing.assert_close(last.double() / scale, exact[1] / scale, atol=1e-5, rtol=0)
    grads = torch.autograd.grad(y.square().mean(), tensors)
    exact_grads = torch.autograd.grad(exact[0].square().mean(), tensors)
    for grad, one in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad / one.abs().max(), one / one.abs().max(), atol=1e-4, rtol=0)


def test_a_resetting_token_does_not_blur_its_neighbours():
    """After a step that forgets all, small steps are as exact as without it: sums of exponents are
    kept in float64.
    """
    x, dt, A, B, C = (t.detach() for t in inputs(1, 64, 1, 4, 1, 8, torch.float32, 1e-3))
    dt[0, 5] = 1e5
    exact, _ = ssd_sequential(*(t.double() for t in (x, dt, A, B, C)))
    y, _ = ssd_scan(x, dt, A, B, C)
    torch.testing.assert_close(y[:, 6:].double(), exact[:, 6:], atol=0, rtol=1e-4)


def test_it_is_a_well_behaved_operator():
    """Its fake form, its schema and its gradient, by torch's own checks."""
    starts = torch.rand(2, 20) < 0.2
    initial = torch.randn(2, 4, 5, 3).double().requires_grad_()
    for optional in ((None, None), (starts, initial)):
        operator = torch.ops.toolmem.ssd_scan.default
        torch.library.opcheck(operator, (*inputs(2, 20, 4, 3, 2, 5), *optional, 8))


def test_flops_are_those_of_the_products_that_are_run():
    """The operator's formula gives what torch counts for the products that it is made of."""
    tensors = [tensor.detach() for tensor in inputs(3, 21, 4, 3, 2, 5)]
    with FlopCounterMode(display=False) as counter:
        y, last, edges = ssd._ssd_scan._init_fn(*tensors, None, None, 8)
    forward = formula_of(torch.ops.toolmem.ssd_scan)
    assert (
        forward(*tensors, None, None, 8, out_val=(y, last, edges)) == counter.get_total_flops() > 0
    )
    with FlopCounterMode(display=False) as counter:
        grads = ssd._ssd_scan_backward._init_fn(y, last, *tensors, None, edges, 8)
    backward = formula_of(torch.ops.toolmem.ssd_scan_backward)
    counted = backward(y, last, *tensors, None, edges, 8, out_val=grads)
    assert counted == counter.get_total_flops() > 0
