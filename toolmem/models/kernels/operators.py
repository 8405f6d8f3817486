"""The kernels as operators of torch, for compiled passes, which cannot look into calls of C.

They have no gradient, and run where ``functions`` lets them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.models.kernels import functions
from toolmem.models.kernels.build import library


def _fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``functions.fast_linear``, its questions answered when the pass was compiled."""
    built = library()
    if built is None or x.numel() >= functions.MANY_ROWS * x.shape[-1]:
        return F.linear(x, weight, bias)
    return functions._linear(built, x, weight, bias)


_LIBRARY = torch.library.Library("toolmem", "FRAGMENT")
_LIBRARY.define("fast_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "paged_attention(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) key_pages, "
    "Tensor(b!) value_pages, Tensor tables, Tensor lengths, float scale, float softcap) -> Tensor"
)
_LIBRARY.impl("fast_linear", _fast_linear, "CPU")
_LIBRARY.impl("paged_attention", functions.paged_attention, "CPU")


@torch.library.register_fake("toolmem::fast_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("toolmem::paged_attention", lib=_LIBRARY)
def _(queries: Tensor, *_: object) -> Tensor:
    return queries.new_empty(queries.shape)
