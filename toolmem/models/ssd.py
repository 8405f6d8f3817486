"""Mamba-2's scan by matrix products: structured state-space duality (SSD, arXiv 2405.21060, section 6).

Each head has one decay, so that its states S, (n, p), follow

    S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T          y_t = S_t^T C_t

Shapes: b batch, s seq, h heads, p head_dim, g groups of heads that share B and C, n state_dim,
t tokens of a chunk.

``ssd_scan`` cuts the sequence into chunks. Within one, every token looks at those before it as attention
does, y = (C B^T * decays) (dt x): products of (t, t) matrices. What came before the chunk enters through
one state, handed from chunk to chunk. Decays are exp of sums of something negative, at most 1. Going
backward a chunk is made again from the state at its start. It is one operator to torch, so that
``torch.compile`` and the FLOP counter see one call, whatever the length.
"""

# ruff: noqa: N803, N806 (A, B, C and D are the names that the papers give them)
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from toolmem.models.flop_work import PairWork, token_work
from toolmem.models.flops import register_flops
from toolmem.models.scans import LOWEST_EXPONENT


def ssd_sequential(
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
        x: (b, s, h, p).
        dt: (b, s, h), step sizes, at least 0; 0 leaves the state as it is.
        A: (h,), below 0.
        B: (b, s, g, n); g divides h, and a group is of heads that lie side by side.
        C: (b, s, g, n).
        starts: (b, s) bool, tokens before which the state is forgotten.
        initial: (b, h, n, p), the state before the first token; zeros when None.

    Returns:
        y (b, s, h, p), and the state after the last token (b, h, n, p).
    """
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    state = x.new_zeros(b, h, n, p) if initial is None else initial
    outputs = []
    for t in range(s):
        decay = torch.exp(dt[:, t] * A)
        if starts is not None:
            decay = decay.masked_fill(starts[:, t, None], 0.0)
        into = (x[:, t] * dt[:, t, :, None]).view(b, g, h // g, 1, p)
        new = (B[:, t, :, None, :, None] * into).view(b, h, n, p)
        state = torch.addcmul(new, decay[:, :, None, None], state)
        by_group = state.view(b, g, h // g, n, p)
        outputs.append((C[:, t, :, None, None] @ by_group).view(b, h, p))
    return torch.stack(outputs, dim=1), state


class _Chunk:
    """What forward and backward both need to know of a chunk.

    Matrices of a group are as wide as its heads together, w = h / g * p, where all heads' rows or columns
    meet the same B or C: one wide product in place of many narrow.

    Args:
        part: its tokens, of the tensors that follow; those are as ``ssd_sequential`` has them.
        x: (b, s, h, p).
        dt: (b, s, h).
        A: (h,).
        B: (b, s, g, n).
        C: (b, s, g, n).
        starts: (b, s) bool, or None.
    """

    def __init__(
        self,
        part: slice,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        starts: Tensor | None,
    ) -> None:
        x, dt, B, C = x[:, part], dt[:, part], B[:, part], C[:, part]
        (self.b, self.t, self.h, self.p), self.g = x.shape, B.shape[2]
        self.B, self.C = B.transpose(1, 2), C.transpose(1, 2)  # (b, g, t, n)
        # In float64: differences of long sums are wanted, exact where they are small.
        sums = torch.cumsum((dt * A).double(), dim=1)
        since_start = sums.exp().to(x.dtype)
        until_end = (sums[:, -1:] - sums).exp().to(x.dtype)
        # (b, h, t, t): from each token to each later one
        self.decays = torch.empty(self.b, self.h, self.t, self.t, dtype=x.dtype, device=x.device)
        by_head = sums.transpose(1, 2).contiguous()
        torch.sub(by_head[..., :, None], by_head[..., None, :], out=self.decays)
        self.decays.clamp_(LOWEST_EXPONENT, 0.0).exp_().tril_()
        if starts is not None:
            piece = starts[:, part].cumsum(dim=1)  # 0: goes on from the chunk before
            self.decays *= (piece[:, :, None] == piece[:, None, :])[:, None]
            since_start = since_start * (piece == 0)[..., None]
            until_end = until_end * (piece == piece[:, -1:])[..., None]
        whole = since_start[:, -1]
        # (b, t, h, 1): from the chunk's start to each token, and from each to the chunk's end
        self.since_start, self.until_end = since_start[..., None], until_end[..., None]
        self.whole = whole.view(self.b, self.g, 1, -1, 1)  # as heads of a wide state
        self.scores = self.C @ self.B.transpose(2, 3)  # (b, g, t, t)
        self.x = x * dt[..., None]  # (b, t, h, p): what is taken in

    def weights(self) -> Tensor:
        """What each token takes from each, (b, h, t, t)."""
        by_group = self.decays.view(self.b, self.g, -1, self.t, self.t)
        return (by_group * self.scores[:, :, None]).view_as(self.decays)

    def wide(self, x: Tensor) -> Tensor:
        """(b, t, h, p) to (b, g, t, w)."""
        return x.reshape(self.b, self.t, self.g, -1).transpose(1, 2)

    def next_state(self, state: Tensor, new: Tensor) -> Tensor:
        """``state`` handed over the whole chunk, and ``new`` added; both (b, g, n, w)."""
        heads = [_heads(tensor, self.h) for tensor in (new, state)]
        return torch.addcmul(heads[0], heads[1], self.whole).flatten(3)

    def narrow(self, x: Tensor) -> Tensor:
        """(b, g, t, w) to (b, t, h, p)."""
        return x.transpose(1, 2).reshape(self.b, self.t, self.h, self.p)


def _wide_state(state: Tensor, g: int) -> Tensor:
    """(b, h, n, p) to (b, g, n, w)."""
    return state.unflatten(1, (g, -1)).transpose(2, 3).flatten(3)


def _narrow_state(state: Tensor, h: int) -> Tensor:
    """(b, g, n, w) to (b, h, n, p)."""
    return _heads(state, h).transpose(2, 3).flatten(1, 2)


def _heads(state: Tensor, h: int) -> Tensor:
    """(b, g, n, w) seen as (b, g, n, h / g, p)."""
    return state.unflatten(3, (h // state.shape[1], -1))


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]


@torch.library.custom_op("toolmem::ssd_scan", mutates_args=())
def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the last state, and the states at chunks' starts (chunks, b, g, n, w)."""
    with torch.autocast(x.device.type, enabled=False):
        (b, s, h, p), (g, n) = x.shape, B.shape[2:]
        w = h // g * p
        y = x.new_empty(b, s, h, p)
        edges = x.new_empty((s + chunk_size - 1) // chunk_size, b, g, n, w)
        state = x.new_zeros(b, g, n, w) if initial is None else _wide_state(initial, g)
        for index, part in enumerate(_chunks(s, chunk_size)):
            edges[index] = state
            chunk = _Chunk(part, x, dt, A, B, C, starts)
            within = chunk.weights() @ chunk.x.transpose(1, 2)
            before = chunk.narrow(chunk.C @ state)
            y[:, part] = torch.addcmul(within.transpose(1, 2), before, chunk.since_start)
            new = chunk.B.transpose(2, 3) @ chunk.wide(chunk.x * chunk.until_end)
            state = chunk.next_state(state, new)
        return y, _narrow_state(state, h).clone(memory_format=torch.contiguous_format), edges


@_ssd_scan.register_fake
def _ssd_scan_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    edges = x.new_empty((s + chunk_size - 1) // chunk_size, b, g, n, h // g * p)
    return x.new_empty(b, s, h, p), x.new_empty(b, h, n, p), edges


@torch.library.custom_op("toolmem::ssd_scan_backward", mutates_args=())
def _ssd_scan_backward(
    grad_y: Tensor,
    grad_last: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    edges: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state."""
    with torch.autocast(x.device.type, enabled=False):
        h, g = x.shape[2], B.shape[2]
        grad_x, grad_dt, grad_B, grad_C = (_empty_like(tensor) for tensor in (x, dt, B, C))
        grad_A = torch.zeros_like(A)
        grad_state = _wide_state(grad_last, g)
        parts = _chunks(x.shape[1], chunk_size)
        for index in reversed(range(len(parts))):
            part = parts[index]
            chunk = _Chunk(part, x, dt, A, B, C, starts)
            state, dy = edges[index], grad_y[:, part]
            by_group = (chunk.b, g, h // g, chunk.t, chunk.t)
            # Through the tokens of the chunk.
            dy_by_head = dy.transpose(1, 2)
            weights = chunk.weights()
            grad_taken = (weights.transpose(2, 3) @ dy_by_head).transpose(1, 2)
            grad_weights = dy_by_head @ chunk.x.permute(0, 2, 3, 1)
            exponents = weights.mul_(grad_weights)
            grad_scores = grad_weights.mul_(chunk.decays).view(by_group).sum(2)
            grad_C_chunk = grad_scores @ chunk.B
            grad_B_chunk = grad_scores.transpose(2, 3) @ chunk.C
            # Through the state before it.
            dy_decayed = dy * chunk.since_start
            wide_dy = chunk.wide(dy_decayed)
            before = chunk.narrow(chunk.C @ state)
            grad_C_chunk += wide_dy @ state.transpose(2, 3)
            # Through the state after it.
            taken = chunk.x * chunk.until_end
            grad_after = chunk.narrow(chunk.B @ grad_state) * chunk.until_end
            grad_B_chunk += chunk.wide(taken) @ grad_state.transpose(2, 3)
            grad_taken = grad_taken + grad_after
            # A token's exponent counts in every decay that passes over it: from a token before it to
            # itself or a later one, from the chunk's start, to the chunk's end, and over the whole.
            from_start = (dy_decayed * before).sum(-1)
            to_end = (chunk.x * grad_after).sum(-1)
            over = _heads(grad_state * state, h).sum((2, 4)) * chunk.whole[:, :, 0, :, 0]
            grad_exponent = from_start.flip(1).cumsum(1).flip(1) + over.flatten(1)[:, None]
            # By the token before: sums over what each later token takes from this one or earlier.
            passing = exponents.cumsum(dim=-1).tril_(-1).sum(2).transpose(1, 2)
            grad_exponent[:, 1:] += (passing + to_end.cumsum(1))[:, :-1]
            grad_C[:, part], grad_B[:, part] = (
                grad_C_chunk.transpose(1, 2),
                grad_B_chunk.transpose(1, 2),
            )
            grad_x[:, part] = grad_taken * dt[:, part, :, None]
            grad_dt[:, part] = (grad_taken * x[:, part]).sum(-1).addcmul_(grad_exponent, A)
            grad_A += (grad_exponent * dt[:, part]).sum((0, 1))
            grad_state = chunk.next_state(grad_state, chunk.C.transpose(2, 3) @ wide_dy)
        grad_initial = _narrow_state(grad_state, h).clone(memory_format=torch.contiguous_format)
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_initial


@_ssd_scan_backward.register_fake
def _ssd_scan_backward_shapes(grad_y: Tensor, grad_last: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(_empty_like(tensor) for tensor in (*rest[:5], grad_last))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # the edges have none, and zeros for them would be large
    *tensors, initial, chunk_size = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.has_initial, ctx.chunk_size = initial is not None, chunk_size


def _backward(
    ctx: Any, grad_y: Tensor | None, grad_last: Tensor | None, grad_edges: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, edges = ctx.saved_tensors
    x = tensors[0]
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_last = (
        _narrow_state(torch.zeros_like(edges[0]), x.shape[2]) if grad_last is None else grad_last
    )
    *grads, grad_initial = _ssd_scan_backward(grad_y, grad_last, *tensors, edges, ctx.chunk_size)
    return *grads, None, grad_initial if ctx.has_initial else None, None


_ssd_scan.register_autograd(_backward, setup_context=_setup_context)


def _products(x: Tensor, B: Tensor, chunk_size: int, scores: int, means: int, states: int) -> int:
    """FLOPs of matrix products: of C with B and their like, of weights with values, and with states."""
    (b, s, h, p), (g, n) = x.shape, B.shape[2:]
    lengths = [part.stop - part.start for part in _chunks(s, chunk_size)]
    pairs = sum(length * length for length in lengths)
    return 2 * b * (pairs * (scores * g * n + means * h * p) + states * s * h * n * p)


def _scan_flops(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any, **_: Any
) -> int:
    return _products(x, B, rest[-1], scores=1, means=1, states=2)


def _scan_backward_flops(grad_y: Tensor, grad_last: Tensor, *inputs: Any, **_: Any) -> int:
    x, _, _, B, *rest = inputs
    return _products(x, B, rest[-1], scores=3, means=2, states=5)


register_flops(_scan_flops)(torch.ops.toolmem.ssd_scan)
register_flops(_scan_backward_flops)(torch.ops.toolmem.ssd_scan_backward)


def _work(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *_: Any, **__: Any) -> PairWork:
    """Of the recurrence written plainly, an operation on a number one FLOP, whatever the chunks. For each
    token, head, channel and state: the decay, what is taken in, their sum, the output 2. For each token,
    head and channel: dt x. For each token and head: the decay's exponent, the decay.
    """
    s, h, p = x.shape[1:]
    return token_work(h * (5 * B.shape[3] * p + p + 2), seq=s)


@register_flops(_work)
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None = None,
    initial: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The scan, fast; arguments and results as ``ssd_sequential``, in one floating dtype.

    Args as there, and
        chunk_size: tokens of a chunk; it changes the time that is taken, and nothing else.
    """
    y, last, _ = _ssd_scan(x, dt, A, B, C, starts, initial, chunk_size)
    return y, last
