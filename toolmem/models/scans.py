"""Mamba-1's selective scan: a diagonal linear recurrence with weights that depend on the input.

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t          y_t = C_t h_t

Shapes: b batch, s seq, d channels, n states of a channel. States lie as (n, d), channels last, so that
what belongs to a token and a channel is broadcast along whole cache lines.

``selective_scan`` takes the sequence chunk by chunk, and a chunk by a parallel prefix in place: log2 of
the chunk's length steps, about three operations a number. Every factor is at most 1 (exp of something
negative), nothing is divided by, so that it cannot overflow, whatever the step sizes. What a chunk holds
stays in the processor's cache and is thrown away; going backward it is made again from the state at the
chunk's start, as the CUDA kernel of the paper does (arXiv 2312.00752, section 3.3.2). It is one operator
to torch, so that ``torch.compile`` and the FLOP counter see one call, whatever the length.
"""

# ruff: noqa: N803, N806 (A, B, C and D are the names that the papers give them)
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolmem.models.flops import register_flops


def selective_scan_sequential(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence written plainly, token after token: the reference, and the step of decoding.

    Args:
        x: (b, s, d).
        dt: (b, s, d), step sizes, at least 0; 0 leaves the state as it is.
        A: (n, d), below 0.
        B: (b, s, n).
        C: (b, s, n).
        starts: (b, s) bool, tokens before which the state is forgotten.
        initial: (b, n, d), the state before the first token; zeros when None.

    Returns:
        y (b, s, d), and the state after the last token (b, n, d).
    """
    state = x.new_zeros(x.shape[0], *A.shape) if initial is None else initial
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, None] * A)
        if starts is not None:
            decay = decay.masked_fill(starts[:, t, None, None], 0.0)
        state = torch.addcmul(decay * state, B[:, t, :, None], (dt[:, t] * x[:, t])[:, None])
        outputs.append((C[:, t, None] @ state)[:, 0])
    return torch.stack(outputs, dim=1), state


def prefix_scan_(decay: Tensor, values: Tensor, reverse: bool = False) -> None:
    """In place: values_t += decay_t * values_{t-1} for every t in turn, by a parallel prefix.

    Brent and Kung's (IEEE Trans. Comput. C-31, 1982): up a tree of pairs, and down again.

    Args:
        decay: (b, t, ...); is overwritten. The first of each row is never used for ``values``.
        values: (b, t, ...).
        reverse: from the last to the first: values_t += decay_t * values_{t+1}.
    """
    length = values.shape[1]

    def places(first: int, last: int, step: int) -> slice:
        """first, first + step, ... below ``last``; counted from the end in reverse."""
        if not reverse:
            return slice(first, last, step)
        highest = first + (last - 1 - first) // step * step
        return slice(length - 1 - highest, length - first, step)

    def add(first: int, step: int, half: int, multiply: bool) -> None:
        right, left = places(first, length, step), places(first - half, length - half, step)
        values[:, right].addcmul_(decay[:, right], values[:, left])
        if multiply:
            decay[:, right].mul_(decay[:, left])

    half = 1
    while 2 * half <= length:
        add(2 * half - 1, 2 * half, half, multiply=True)
        half *= 2
    while half:
        if 3 * half <= length:
            add(3 * half - 1, 2 * half, half, multiply=False)
        half //= 2


# Tokens of a chunk. On a CPU a chunk is to fit the cache: of 8 to 128 tokens, 32 took the least time.
# On a GPU a chunk is a handful of launches, and there is room.
CPU_CHUNK, GPU_CHUNK = 32, 256
# Numbers of a chunk that a CPU works on at once: rows of a larger batch take turns.
CPU_NUMBERS = 1 << 20


def _chunk(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def _row_blocks(x: Tensor, n: int) -> Iterator[slice]:
    """Rows of the batch that are worked on together."""
    rows = x.shape[0]
    if x.device.type == "cpu":
        chunk = min(x.shape[1], CPU_CHUNK)
        rows = max(1, CPU_NUMBERS // (chunk * n * x.shape[2]))
    for first in range(0, x.shape[0], rows):
        yield slice(first, min(first + rows, x.shape[0]))


class _Scratch:
    """Memory for a chunk's numbers, used again for every chunk."""

    def __init__(self, count: int, x: Tensor, n: int) -> None:
        rows = next(_row_blocks(x, n))
        numbers = (rows.stop - rows.start) * min(_chunk(x.device), x.shape[1]) * n * x.shape[2]
        self.buffers = x.new_empty(count, numbers)

    def take(self, rows: int, length: int, n: int, d: int) -> list[Tensor]:
        """As contiguous tensors (rows, length, n, d)."""
        return [flat[: rows * length * n * d].view(rows, length, n, d) for flat in self.buffers]


# Where decays end: exp(-80) is 2e-35, as good as 0. Below, torch's exp takes 2 to 20 times as long (at
# -95, where results are denormal, 22 ns a number, not 1; at -inf 2.3).
LOWEST_EXPONENT = -80.0


def _decays(
    out: Tensor,
    dt: Tensor,
    A: Tensor,
    starts: Tensor | None,
) -> None:
    """exp(dt A), (b, t, n, d), into ``out``; 0 where the state is to be forgotten."""
    torch.mul(dt[:, :, None], A, out=out)
    out.clamp_(min=LOWEST_EXPONENT).exp_()
    if starts is not None:
        out *= ~starts[:, :, None, None]


def _row_times(row: Tensor, matrix: Tensor) -> Tensor:
    """(b, t, i) and (b, t, i, j) to (b, t, j). As one bmm: the other way round, matrix by column, it
    takes ten times as long.
    """
    return torch.bmm(row.flatten(0, 1)[:, None], matrix.flatten(0, 1))[:, 0].view(
        *row.shape[:2], -1
    )


@torch.library.custom_op("toolmem::selective_scan", mutates_args=())
def _selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the states at chunks' starts (chunks, b, n, d)."""
    with torch.autocast(x.device.type, enabled=False):
        (b, s, d), n, chunk = x.shape, A.shape[0], _chunk(x.device)
        y = x.new_empty(b, s, d)
        edges = x.new_empty((s + chunk - 1) // chunk, b, n, d)
        last = x.new_zeros(b, n, d) if initial is None else initial.clone()
        scratch = _Scratch(2, x, n)
        for rows in _row_blocks(x, n):
            state = last[rows]
            for index, first in enumerate(range(0, s, chunk)):
                part = (rows, slice(first, min(first + chunk, s)))
                decay, states = scratch.take(len(state), part[1].stop - first, n, d)
                edges[index, rows] = state
                _decays(decay, dt[part], A, None if starts is None else starts[part])
                torch.mul((dt[part] * x[part])[:, :, None], B[part][..., None], out=states)
                states[:, 0].addcmul_(decay[:, 0], state)
                prefix_scan_(decay, states)
                y[part] = _row_times(C[part], states)
                state.copy_(states[:, -1])
        return y, last, edges


@_selective_scan.register_fake
def _selective_scan_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, s, d), n, chunk = x.shape, A.shape[0], _chunk(x.device)
    edges = x.new_empty((s + chunk - 1) // chunk, b, n, d)
    return x.new_empty(b, s, d), x.new_empty(b, n, d), edges


@torch.library.custom_op("toolmem::selective_scan_backward", mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    edges: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state.

    With g_t the gradient of h_t, all that comes later included: g_t = C_t dy_t + decay_{t+1} g_{t+1},
    a scan from the end. The decays' exponents have g_t decay_t h_{t-1}.
    """
    with torch.autocast(x.device.type, enabled=False):
        (b, s, d), n, chunk = x.shape, A.shape[0], _chunk(x.device)
        grad_x, grad_dt = x.new_empty(b, s, d), x.new_empty(b, s, d)
        grad_A = torch.zeros_like(A)
        grad_B, grad_C = x.new_empty(b, s, n), x.new_empty(b, s, n)
        carried = grad_last.clone(memory_format=torch.contiguous_format)
        scratch = _Scratch(4, x, n)
        for rows in _row_blocks(x, n):
            carry = carried[rows]
            for index in reversed(range(edges.shape[0])):
                first = index * chunk
                part = (rows, slice(first, min(first + chunk, s)))
                length = part[1].stop - first
                decay, work, states, grads = scratch.take(len(carry), length, n, d)
                step, value, dy = dt[part], dt[part] * x[part], grad_y[part]
                # The states again.
                before = edges[index, rows]
                _decays(decay, step, A, None if starts is None else starts[part])
                torch.mul(value[:, :, None], B[part][..., None], out=states)
                states[:, 0].addcmul_(decay[:, 0], before)
                prefix_scan_(work.copy_(decay), states)
                # Their gradients, from the end.
                torch.mul(dy[:, :, None], C[part][..., None], out=grads)
                grads[:, -1] += carry
                work[:, : length - 1] = decay[:, 1:]
                prefix_scan_(work, grads, reverse=True)
                torch.mul(decay[:, 0], grads[:, 0], out=carry)
                # What they say of the inputs.
                grad_C[part] = _row_times(dy, states.transpose(2, 3))
                grad_B[part] = _row_times(value, grads.transpose(2, 3))
                grad_value = _row_times(B[part], grads)
                grad_x[part] = grad_value * step
                decay[:, 0] *= before
                decay[:, 1:] *= states[:, :-1]
                exponents = decay.mul_(grads)
                grad_step = torch.mul(exponents, A, out=work).sum(2)
                grad_dt[part] = grad_step.addcmul_(grad_value, x[part])
                grad_A += exponents.mul_(step[:, :, None]).sum((0, 1))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, carried


@_selective_scan_backward.register_fake
def _selective_scan_backward_shapes(
    grad_y: Tensor, grad_last: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    tensors = (*rest[:5], grad_last)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the edges have none, and zeros for them would be large
    *tensors, initial = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_initial = initial is not None


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, grad_edges: Tensor | None
) -> tuple[Tensor | None, ...]:
    *inputs, edges = ctx.saved_tensors
    x, _, A, *_ = inputs
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_last = x.new_zeros(x.shape[0], *A.shape) if grad_last is None else grad_last
    *grads, grad_initial = _selective_scan_backward(grad_y, grad_last, *inputs, edges)
    return *grads, None, grad_initial if ctx.has_initial else None


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


def _scan_flops(x: Tensor, dt: Tensor, A: Tensor, *_: Any, **__: Any) -> int:
    """Of the recurrence written plainly, an operation on a number one FLOP. For each token, channel and
    state: the decay's exponent, the decay, what is taken in, the recurrence 2, the output 2. For each
    token and channel: dt x.
    """
    return x.numel() * (7 * A.shape[0] + 1)


def _scan_backward_flops(grad_y: Tensor, grad_last: Tensor, *inputs: Any, **_: Any) -> int:
    return 2 * _scan_flops(*inputs)  # as a product's gradients


register_flops(_scan_flops)(torch.ops.toolmem.selective_scan)
register_flops(_scan_backward_flops)(torch.ops.toolmem.selective_scan_backward)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The scan, fast; arguments and results as ``selective_scan_sequential``, in one floating dtype."""
    y, last, _ = _selective_scan(x, dt, A, B, C, starts, initial)
    return y, last
