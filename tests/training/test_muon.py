import pytest
import torch

from toolmem.training.muon import MuonAdamW, iteration_dtype, orthogonalize

SHAPES = [(64, 32), (32, 64), (96, 32), (32, 32), (17, 5)]


def parameters(shape, n):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(n)]


def copies(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_bit_for_bit_in_bfloat16(adjust, nesterov):
    ours = [p for shape in SHAPES for p in parameters(shape, 3)]
    theirs = copies(ours)
    options = {"lr": 0.02, "momentum": 0.95, "nesterov": nesterov}
    group = {"params": ours, "kind": "muon", "weight_decay": 0.1}
    optimizer = MuonAdamW([group], adjust=adjust, dtype=torch.bfloat16, **options)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn=adjust, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 3, 8, 12)])
def test_a_stack_equals_its_matrices(shape):
    stack = parameters(shape, 1)[0]
    singles = copies(stack.detach().reshape(-1, *shape[-2:]).unbind(0))
    options = {"lr": 0.1, "dtype": torch.float64}
    whole = MuonAdamW([{"params": [stack], "kind": "muon", "weight_decay": 0.1}], **options)
    apart = MuonAdamW([{"params": singles, "kind": "muon", "weight_decay": 0.1}], **options)
    for step in range(3):
        stack.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        for single, grad in zip(singles, stack.grad.reshape(-1, *shape[-2:]), strict=True):
            single.grad = grad.clone()
        whole.step()
        apart.step()
    torch.testing.assert_close(stack.reshape(-1, *shape[-2:]), torch.stack(singles))


def test_orthogonalize_equals_the_polynomial_of_singular_values():
    """The iteration acts on singular values alone, so the SVD computes it independently."""
    matrix = torch.randn(6, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / matrix.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalize(matrix), u @ torch.diag(s) @ v)
    assert s.min() > 0.6 and s.max() < 1.3


def test_iterates_in_float32_on_a_cpu_and_keeps_float64():
    assert iteration_dtype(torch.zeros(1)) == torch.float32
    assert iteration_dtype(torch.zeros(1, dtype=torch.bfloat16)) == torch.float32
    assert iteration_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_large_matrices_are_not_stacked_but_come_out_the_same(monkeypatch):
    ours, theirs = parameters((20, 10), 5), None
    theirs = copies(ours)
    grads = [torch.randn(20, 10, generator=torch.Generator().manual_seed(i)) for i in range(5)]
    for params, limit in ((ours, 2**22), (theirs, 2 * 200)):
        monkeypatch.setattr("toolmem.training.muon.STACK_LIMIT", limit)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        MuonAdamW([{"params": params, "kind": "muon"}], lr=0.1).step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("fused", [True, False])
def test_the_rest_equals_torch_adamw(fused):
    ours = parameters((7,), 2) + parameters((5, 3), 2)
    theirs = copies(ours)
    options = {"betas": (0.9, 0.95), "eps": 1e-8}
    group = {"params": ours, "kind": "adamw", "weight_decay": 0.1}
    optimizer = MuonAdamW([group], 3e-2, fused=fused, **options)
    reference = torch.optim.AdamW(theirs, lr=3e-2, weight_decay=0.1, fused=fused, **options)
    for step in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=torch.Generator().manual_seed(step))
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


def test_state_goes_through_a_file_and_on_exactly(tmp_path):
    def run(steps, state=None):
        matrices, vectors = parameters((6, 4), 2), parameters((5,), 1)
        groups = [
            {"params": matrices, "kind": "muon", "weight_decay": 0.1},
            {"params": vectors, "kind": "adamw"},
        ]
        optimizer = MuonAdamW(groups, lr=0.1, fused=True)
        if state is not None:
            weights, optimizer_state = torch.load(state, weights_only=True)
            for p, w in zip(matrices + vectors, weights, strict=True):
                p.data.copy_(w)
            optimizer.load_state_dict(optimizer_state)
        for step in steps:
            for p in matrices + vectors:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        return [p.detach() for p in matrices + vectors], optimizer.state_dict()

    whole, _ = run(range(6))
    torch.save(run(range(3)), tmp_path / "state.pt")
    resumed, _ = run(range(3, 6), tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_a_vector_is_no_matrix():
    with pytest.raises(ValueError, match="matrices"):
        MuonAdamW([{"params": parameters((5,), 1), "kind": "muon"}])


def test_parameters_without_gradients_are_left_alone():
    with_grad, without = parameters((4, 4), 2)
    before = without.detach().clone()
    with_grad.grad = torch.ones(4, 4)
    optimizer = MuonAdamW([{"params": [with_grad, without], "kind": "muon", "weight_decay": 0.5}])
    optimizer.step()
    assert torch.equal(without, before)
