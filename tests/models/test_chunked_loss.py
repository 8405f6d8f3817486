import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from toolmem.models.chunked_loss import summed_cross_entropy


def inputs(dtype=torch.float64, rows=23, vocab=31, dim=7):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, dim, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(vocab, dim, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=generator)
    return states.requires_grad_(), weight.requires_grad_(), targets


def plain(states, weight, targets, softcap=0.0):
    logits = F.linear(states, weight)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
def test_losses_and_gradients_are_those_of_all_at_once_in_float64(chunk, softcap):
    states, weight, targets = inputs()
    total, losses = summed_cross_entropy(states, weight, targets, chunk, softcap)
    expected = plain(states, weight, targets, softcap)
    torch.testing.assert_close(losses, expected.detach(), atol=1e-13, rtol=1e-13)
    torch.testing.assert_close(total, expected.sum(), atol=1e-12, rtol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(3 * total, (states, weight)),
        torch.autograd.grad(3 * expected.sum(), (states, weight)),
        atol=1e-12, rtol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("frozen", ["states", "weight"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    states, weight, targets = inputs()
    (states if frozen == "states" else weight).requires_grad_(False)
    kept = weight if frozen == "states" else states
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if "mm" in str(operation) or "linear" in str(operation):
                products.append(operation)
            return operation(*args, **(kwargs or {}))

    with Products():
        total, _ = summed_cross_entropy(states, weight, targets, 23)
    assert len(products) == 2  # logits, and one gradient
    total.backward()
    expected = torch.autograd.grad(plain(states, weight, targets).sum(), kept)[0]
    torch.testing.assert_close(kept.grad, expected, atol=1e-12, rtol=1e-12)


def test_without_gradients_there_are_only_losses():
    states, weight, targets = inputs()
    with torch.no_grad():
        total, losses = summed_cross_entropy(states, weight, targets, 4)
    assert not total.requires_grad
    torch.testing.assert_close(losses, plain(states, weight, targets).detach())


def test_under_autocast_products_are_bfloat16_and_the_rest_float32():
    states, weight, targets = inputs(torch.float32, rows=64)
    with torch.autocast("cpu", torch.bfloat16):
        total, losses = summed_cross_entropy(states, weight, targets, 16)
        expected = plain(states, weight, targets)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected.float(), atol=2e-2, rtol=1e-2)
    found = torch.autograd.grad(total, (states, weight))
    exact = torch.autograd.grad(plain(states, weight, targets).sum(), (states, weight))
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        assert ((one - other).norm() / other.norm()).item() < 1e-2


def test_no_more_logits_than_a_chunk_s_are_ever_there():
    states, weight, targets = inputs(torch.float32, rows=40, vocab=1000)
    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            for one in out if isinstance(out, tuple | list) else [out]:
                if isinstance(one, torch.Tensor) and one.shape[-1:] == (1000,):
                    largest[0] = max(largest[0], one.shape[0])
            return out

    with Sizes():
        summed_cross_entropy(states, weight, targets, 8)[0].backward()
    assert largest[0] == 8


def test_no_rows_are_no_loss():
    states, weight, targets = inputs()
    total, losses = summed_cross_entropy(states[:0], weight, targets[:0], 8)
    total.backward()
    assert total == 0 and not len(losses) and not weight.grad.any()
