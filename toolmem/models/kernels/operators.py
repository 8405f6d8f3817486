"""The kernels as operators of torch, for compiled passes, which cannot look into calls of C.

They have no gradient, and run where ``functions`` lets them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolmem.models.kernels import functions

_LIBRARY = torch.library.Library("toolmem", "FRAGMENT")
_LIBRARY.define("fast_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_LIBRARY.define(
    "paged_attention(Tensor queries, Tensor new_keys, Tensor new_values, Tensor(a!) key_pages, "
    "Tensor(b!) value_pages, Tensor tables, Tensor lengths, float scale, float softcap) -> Tensor"
)
_LIBRARY.impl("fast_linear", functions.fast_linear, "CPU")
_LIBRARY.impl("paged_attention", functions.paged_attention, "CPU")


@torch.library.register_fake("toolmem::fast_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("toolmem::paged_attention", lib=_LIBRARY)
def _(queries: Tensor, *_: object) -> Tensor:
    return queries.new_empty(queries.shape)
