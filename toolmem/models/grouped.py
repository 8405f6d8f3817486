"""Linear maps of groups of rows: rows sorted by group, each group with a matrix of its own.

Unusual about it: groups may have any size, and the sizes are data. The products are operators of their
own (``torch.library``) around ``torch._grouped_mm``, so that ``torch.compile`` and the meta device take
every dtype (torch 2.13 traces it in bfloat16 only), FLOPs are counted (it has no formula), and what it
leaves undefined is zero. What it does not take at all (float64) is one matmul a group.

On one core (AVX2, float32, 16,384 rows in 64 groups, 256 to 1,024 features) ``torch._grouped_mm`` took
153 ms, one matmul a group 154 ms, one dense matmul 143 ms, a batched matmul of groups padded to the
largest 168 ms; of 64 rows in 4 groups, 34 us against 75 us for the loop.

Shapes: n rows, g groups, i in, o out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_fused(a: Tensor, b: Tensor) -> bool:
    """Does ``torch._grouped_mm`` take these? Rows have to start at multiples of 16 bytes."""
    if not hasattr(torch, "_grouped_mm") or a.dtype not in FUSED_DTYPES:
        return False
    widths = (*a.shape[1:], *b.shape[1:])
    aligned = all(width * a.element_size() % 16 == 0 for width in widths)
    return aligned and a.device.type in ("cpu", "cuda")


def _sizes(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _clear_beyond(y: Tensor, ends: Tensor) -> Tensor:
    """Zeros in the rows that belong to no group; they are as they were allocated."""
    if y.is_cuda:  # looking at a number would make the host wait
        beyond = torch.arange(len(y), device=y.device) >= ends[-1]
        return y.masked_fill_(beyond[:, None], 0)
    y[int(ends[-1]) :] = 0
    return y


def fused_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped_product`` by ``torch._grouped_mm``."""
    return _clear_beyond(torch._grouped_mm(x.contiguous(), weight.transpose(1, 2), ends), ends)


def looped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """``grouped_product`` by one matmul a group that is not empty."""
    y = x.new_empty(x.shape[0], weight.shape[1])
    start = 0
    for group, size in enumerate(_sizes(ends)):
        if size:
            rows = slice(start, start + size)
            torch.mm(x[rows], weight[group].t(), out=y[rows])
        start += size
    y[start:] = 0
    return y


def fused_outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``grouped_outer`` by ``torch._grouped_mm``."""
    result = torch._grouped_mm(gradient.contiguous().t(), x.contiguous(), ends)
    if result.is_cuda:  # the kernel may pass over empty groups; on the CPU they are zeros
        result.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    return result


def looped_outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """``grouped_outer`` by one matmul a group that is not empty."""
    result = x.new_empty(len(ends), gradient.shape[1], x.shape[1])
    start = 0
    for group, size in enumerate(_sizes(ends)):
        rows = slice(start, start + size)
        if size:
            torch.mm(gradient[rows].t(), x[rows], out=result[group])
        else:
            result[group] = 0
        start += size
    return result


# Not torch.library.custom_op, whose wrapper costs 50 us a call: a tiny model makes a dozen a step.
_LIBRARY = torch.library.Library("toolmem", "FRAGMENT")
_LIBRARY.define("grouped_product(Tensor x, Tensor weight, Tensor ends) -> Tensor")
_LIBRARY.define("grouped_outer(Tensor gradient, Tensor x, Tensor ends) -> Tensor")


@torch.library.impl(_LIBRARY, "grouped_product", "CompositeExplicitAutograd")
def _product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return (fused_product if is_fused(x, weight) else looped_product)(x, weight, ends)


@torch.library.impl(_LIBRARY, "grouped_outer", "CompositeExplicitAutograd")
def _outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return (fused_outer if is_fused(gradient, x) else looped_outer)(gradient, x, ends)


@torch.library.register_fake("toolmem::grouped_product", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("toolmem::grouped_outer", lib=_LIBRARY)
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


def _rows(x: Tensor, ends: Tensor) -> int:
    """Rows that belong to a group; all of them where only shapes are known."""
    known = type(ends) is Tensor and ends.device.type != "meta"
    return int(ends[-1]) if known else x.shape[0]


@register_flop_formula(torch.ops.toolmem.grouped_product, get_raw=True)
def _product_flops(x: Tensor, weight: Tensor, ends: Tensor, **_: Any) -> int:
    return 2 * _rows(x, ends) * weight.shape[1] * weight.shape[2]


@register_flop_formula(torch.ops.toolmem.grouped_outer, get_raw=True)
def _outer_flops(gradient: Tensor, x: Tensor, ends: Tensor, **_: Any) -> int:
    return 2 * _rows(x, ends) * gradient.shape[1] * x.shape[1]


class _GroupedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return torch.ops.toolmem.grouped_product(x, weight, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.toolmem.grouped_product(gradient, weight.transpose(1, 2), ends)
        if ctx.needs_input_grad[1]:
            of_weight = torch.ops.toolmem.grouped_outer(gradient, x, ends)
        return of_x, of_weight, None


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group's rows times its matrix, transposed: y = x @ weight[group].T.

    Args:
        x: (n, i), sorted by group.
        weight: (g, o, i), of the same dtype.
        ends: (g,) int32, where each group ends; rows after the last belong to none and give zeros.

    Returns:
        (n, o).
    """
    return _GroupedProduct.apply(x, weight, ends)


class GroupedLinear(nn.Module):
    """One linear map a group, without bias.

    ``weight`` is a stack (groups, out_features, in_features) whose slices are linear maps: schemes of
    first weights draw them by in_features, and Muon orthogonalises them slice by slice.

    Args:
        groups: number of matrices.
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(self, groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.groups = groups
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(groups, out_features, in_features))
        bound = in_features**-0.5  # as nn.Linear starts
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Each group's rows through its matrix.

        Args:
            x: (n, in_features), sorted by group.
            ends: (groups,) int32, where each group ends; rows after the last give zeros.

        Returns:
            (n, out_features).
        """
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        return grouped_product(x, weight, ends)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.groups} x ({self.in_features} -> {self.out_features})"
