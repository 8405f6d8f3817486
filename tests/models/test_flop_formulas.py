"""Formulas of single operations, against the same written out in plain matmuls and counted by torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from toolmem.models.flop_formulas import FREE_OPERATIONS, aten, causal_flash_pairs, formula_of
from toolmem.models.flops import FlopCounter
from toolmem.models.linear_attention import chunked_memory
from toolmem.models.recurrences import linear_scan, sequential_scan
from toolmem.models.scans import selective_scan, selective_scan_sequential


def counted(function, *inputs):
    """(forward, backward) of a function by our counter; nothing may be unknown."""
    with FlopCounter() as counter:
        y = function(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        if y.requires_grad:
            y.sum().backward()
    assert not counter.tally.unknown
    return counter.tally.forward, counter.tally.backward


def by_torch(function, *inputs):
    """(forward, backward) as torch counts them, which knows matmuls."""
    with FlopCounterMode(display=False) as forward:
        y = function(*inputs)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def leaf(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_cost_what_their_cells_do_one_by_one(kind, gates, layers):
    """b s gates W (D + W) multiply-adds in the first layer, b s gates W (W + W) in the second.

    Backward twice that, but that a GRU, which runs token by token, needs no gradient of its first state.
    """
    b, s, d, w = 3, 7, 5, 8
    layer, x = kind(d, w, num_layers=layers, batch_first=True), leaf(b, s, d)
    cells = [
        (nn.LSTMCell if gates == 4 else nn.GRUCell)(d if i == 0 else w, w) for i in range(layers)
    ]

    def unrolled(x):
        for cell in cells:
            state, outputs = None, []
            for t in range(s):
                state = cell(x[:, t], state)
                outputs.append(state[0] if gates == 4 else state)
            x = torch.stack(outputs, 1)
        return x

    forward, backward = counted(layer, x)
    assert forward == 2 * b * s * gates * w * sum((d if i == 0 else w) + w for i in range(layers))
    assert forward == by_torch(unrolled, x)[0]
    unneeded = 2 * b * gates * w * w * layers if kind is nn.GRU else 0
    assert backward == 2 * forward - unneeded


def test_attention_of_the_cpu_costs_what_its_products_do():
    """Scores 2 b h s n d and means 2 b h s n v; backward the scores again and four products more.

    torch's own counter sees nothing of it.
    """
    b, h, s, d = 2, 4, 9, 8
    q, k, v = leaf(b, h, s, d), leaf(b, h, s, d), leaf(b, h, s, d)

    def plain(q, k, v):
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    forward, backward = counted(F.scaled_dot_product_attention, q, k, v)
    once = 2 * b * h * s * s * d
    assert (forward, backward) == (2 * once, 5 * once)
    in_plain = by_torch(plain, q, k, v)
    assert in_plain == (forward, backward - once)
    shared = leaf(b, 2, s, d), leaf(b, 2, s, d)
    grouped = counted(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), q, *shared
    )
    assert grouped == (forward, backward)


def test_blocks_that_the_causal_kernel_passes_over():
    """1,024 tokens, queries by 256 and keys by 512: two blocks of queries look at 512 keys, two at all."""
    assert causal_flash_pairs(512, 512) == 512 * 512
    assert causal_flash_pairs(1024, 1024) == 512 * 512 + 512 * 1024
    assert causal_flash_pairs(1500, 1500) == 512 * 512 + 512 * 1024 + 476 * 1500
    with FlopCounter() as counter:
        x = torch.zeros(1, 1, 1024, 4)
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert counter.tally.forward == 4 * 4 * (512 * 512 + 512 * 1024)


def test_products_of_small_integers():
    """A product of 20 x 16 by 16 x 24, whatever the numbers are made of: 2 x 20 x 16 x 24."""
    a = torch.ones(20, 16, dtype=torch.int8)
    assert counted(torch._int_mm, a, torch.ones(16, 24, dtype=torch.int8)) == (15_360, 0)
    packed = torch.ones(24, 16, dtype=torch.int8)
    scales = torch.ones(24, dtype=torch.bfloat16)
    x = torch.ones(20, 16, dtype=torch.bfloat16)
    assert counted(torch._weight_int8pack_mm, x, packed, scales) == (15_360, 0)
    assert counted(torch.mm, torch.ones(20, 16), torch.ones(16, 24)) == (15_360, 0)


def test_quantized_linear_layers():
    engine = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        layer = torch.ao.nn.quantized.dynamic.Linear(16, 24)
        assert counted(layer, torch.ones(20, 16)) == (15_360, 0)
    finally:
        torch.backends.quantized.engine = engine


@pytest.mark.parametrize(
    ("function", "shapes", "flops"),
    [
        (torch.mv, [(5, 7), (7,)], 70),
        (torch.addmv, [(5,), (5, 7), (7,)], 70),
        (torch.dot, [(7,), (7,)], 14),
        (torch.addr, [(5, 7), (5,), (7,)], 70),
        (torch.addbmm, [(5, 6), (3, 5, 7), (3, 7, 6)], 1260),
        (torch.baddbmm, [(3, 5, 6), (3, 5, 7), (3, 7, 6)], 1260),
        (torch.einsum, ["bij,bjk->bik", (3, 5, 7), (3, 7, 6)], 1260),
    ],
)
def test_products_with_vectors_and_sums_of_products(function, shapes, flops):
    inputs = [torch.ones(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    assert counted(function, *inputs) == (flops, 0)


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolutions(groups):
    """Each of 2 x 16 x 10 outputs meets 8 / groups channels of 3 taps; each gradient as much again."""
    x, filters = leaf(2, 8, 10), leaf(16, 8 // groups, 3)
    once = 2 * 2 * 16 * 10 * (8 // groups) * 3
    forward = counted(lambda x, w: F.conv1d(x, w, padding=1, groups=groups), x, filters)
    assert forward == (once, 2 * once)


@pytest.mark.parametrize(("unitriangular", "each"), [(True, 4), (False, 5)])
def test_triangular_systems(unitriangular, each):
    """Of n = 5 rows, row i subtracts i earlier ones: n (n - 1) / 2 multiply-adds a column; n divisions."""
    a, b = torch.eye(5).expand(3, 5, 5), torch.ones(3, 5, 6)
    flops, _ = counted(
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False, unitriangular=unitriangular),
        a,
        b,
    )
    assert flops == 3 * 6 * 5 * each


def elementwise(function, *inputs):
    """Numbers that a plain recurrence makes by arithmetic: an operation on a number is one FLOP."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Numbers(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            found = func(*args, **(kwargs or {}))
            if torch.Tag.pointwise in func.tags and isinstance(found, torch.Tensor):
                twice = func._overloadpacket is aten.addcmul
                self.total += found.numel() * (2 if twice else 1)
            elif formula := formula_of(func._overloadpacket):
                self.total += formula(*args, **(kwargs or {}), out_val=found)
            return found

    with Numbers() as numbers, torch.no_grad():
        function(*inputs)
    return numbers.total


def test_a_linear_scan_costs_a_product_and_a_sum_for_each_number():
    """b s c = 2 x 6 x 5 numbers: 120 FLOPs; backward 180, the decay's gradient being one product more."""
    decay, values = leaf(2, 6, 5), leaf(2, 6, 5)
    assert counted(linear_scan, decay, values) == (120, 180)
    assert elementwise(sequential_scan, decay, values) == 120


def test_a_selective_scan_costs_what_the_recurrence_does_written_plainly():
    """b s d = 2 x 6 x 4 and n = 3 states: 7 operations a number of the state and 1 a channel, 48 x 22."""
    x, dt, B, C = leaf(2, 6, 4), leaf(2, 6, 4).abs(), leaf(2, 6, 3), leaf(2, 6, 3)
    inputs = x, dt, -torch.ones(3, 4), B, C
    assert counted(selective_scan, *inputs) == (1056, 2112)
    assert elementwise(selective_scan_sequential, *inputs) == 1056


@pytest.mark.parametrize("delta", [False, True])
def test_chunks_of_linear_attention_execute_the_products_that_are_run(delta):
    """What is executed is what torch counts, and the triangular system of the delta rule."""
    q, k, v = leaf(2, 8, 3, 4), leaf(2, 8, 3, 4), leaf(2, 8, 3, 4)
    rates = -torch.ones(2, 8, 3), torch.ones(2, 8, 3)

    def run(q, k, v):
        return chunked_memory(q, k, v, *rates, delta=delta, chunk_size=4)[0]

    forward, backward = counted(run, q, k, v)
    with FlopCounterMode(display=False) as plain_forward, torch.no_grad():
        run(q, k, v)
    with FlopCounterMode(display=False) as plain:
        run(q, k, v).sum().backward()
    solved = (
        2 * 3 * 2 * (4 * 3) * (4 + 4) if delta else 0
    )  # rows, heads, chunks, n (n - 1), columns
    assert forward == plain_forward.get_total_flops() + solved
    assert forward + backward == plain.get_total_flops() + 2 * solved


def test_free_operations_exist_and_have_no_formula():
    """A name that is misspelt would free nothing; one with a formula would hide it."""
    for name in FREE_OPERATIONS:
        assert hasattr(aten, name), name
        assert formula_of(getattr(aten, name)) is None, name
