"""The linear recurrence of gated RNNs, h_t = a_t h_{t-1} + b_t, channel by channel.

Shapes: b batch, s seq, c channels.

``linear_scan`` takes it by a parallel prefix, about 2 log2(s) operations on whole rows and three products
a number; nothing is divided by, so that decays of any size from 0 to 1 are exact, which the log-space form
of the paper (``log_space_scan``, arXiv 2410.01201, appendix B) is only for values above 0. It is one
operator to torch, so that ``torch.compile`` and the FLOP counter see one call, whatever the length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.models.flops import register_flops
from toolmem.models.scans import prefix_scan_


def sequential_scan(decay: Tensor, values: Tensor, initial: Tensor | None = None) -> Tensor:
    """The recurrence written plainly, token after token: the reference; arguments as ``linear_scan``."""
    state = torch.zeros_like(values[:, 0]) if initial is None else initial
    states = []
    for t in range(values.shape[1]):
        state = decay[:, t] * state + values[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def log_space_scan(log_decay: Tensor, log_values: Tensor) -> Tensor:
    """The paper's parallel form, for values above 0 and no state before the first.

    Args:
        log_decay: (b, s, c).
        log_values: (b, s, c).
    """
    total = log_decay.cumsum(dim=1)
    return torch.exp(total + torch.logcumsumexp(log_values - total, dim=1))


@torch.library.custom_op("toolmem::linear_scan", mutates_args=())
def _linear_scan(decay: Tensor, values: Tensor) -> Tensor:
    states = values.clone(memory_format=torch.contiguous_format)
    prefix_scan_(decay.clone(memory_format=torch.contiguous_format), states)
    return states


@_linear_scan.register_fake
def _linear_scan_shape(decay: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.custom_op("toolmem::linear_scan_backward", mutates_args=())
def _linear_scan_backward(grad: Tensor, decay: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of decays and values: the same recurrence, from the last token to the first."""
    grad_values = grad.clone(memory_format=torch.contiguous_format)
    # what a token hands on to the next is weighed by the next one's decay
    following = F.pad(decay[:, 1:], (0, 0, 0, 1))
    prefix_scan_(following, grad_values, reverse=True)
    grad_decay = torch.zeros_like(grad_values)
    torch.mul(grad_values[:, 1:], states[:, :-1], out=grad_decay[:, 1:])
    return grad_decay, grad_values


@_linear_scan_backward.register_fake
def _linear_scan_backward_shape(
    grad: Tensor, decay: Tensor, states: Tensor
) -> tuple[Tensor, Tensor]:
    like = torch.empty_like(states, memory_format=torch.contiguous_format)
    return like, torch.empty_like(like)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    decay, states = ctx.saved_tensors
    return _linear_scan_backward(grad, decay, states)


_linear_scan.register_autograd(_backward, setup_context=_setup)


def _scan_flops(decay: Tensor, values: Tensor, **_: Any) -> int:
    """Of the recurrence written plainly: a product and a sum for each number."""
    return 2 * values.numel()


def _scan_backward_flops(grad: Tensor, decay: Tensor, states: Tensor, **_: Any) -> int:
    """The recurrence backward, and the decay's gradient."""
    return 3 * states.numel()


register_flops(_scan_flops)(torch.ops.toolmem.linear_scan)
register_flops(_scan_backward_flops)(torch.ops.toolmem.linear_scan_backward)


def linear_scan(decay: Tensor, values: Tensor, initial: Tensor | None = None) -> Tensor:
    """All states h_t = decay_t h_{t-1} + values_t.

    Args:
        decay: (b, s, c), from 0 to 1; 0 forgets what was before.
        values: (b, s, c), of the same dtype.
        initial: (b, c), the state before the first token; zeros when None.

    Returns:
        (b, s, c), contiguous.
    """
    if values.shape[1] == 1:  # a step of decoding: the recurrence itself
        return values if initial is None else values + decay * initial[:, None]
    if initial is not None:
        first = values[:, :1] + decay[:, :1] * initial[:, None]
        values = torch.cat((first, values[:, 1:]), dim=1)
    return _linear_scan(decay, values)
