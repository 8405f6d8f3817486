"""Attention by the package flash-attn (FlashAttention-2, arXiv 2307.08691), where it is installed.

It takes no mask, but rules: causal, within a window, within documents one after the other, over a cache
of which each lane has so many keys. What other masks say (both ways within spans, trees of drafts) it
cannot do. Its tensors are (batch, seq, heads, head_dim), in half precision, on CUDA.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.errors import ToolmemError

# What its kernels take.
DEVICE = "cuda"
DTYPES = (torch.float16, torch.bfloat16)
WIDEST_HEAD = 256
NEEDED = ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache")
OLDEST = (2, 6)  # the first with softcap
OTHERS = "take sdpa, flex or plain"


class Seen(NamedTuple):
    """What each token sees, in flash-attn's terms.

    Args:
        window: how many tokens back, itself included; 0 for all.
        before: (b,) int64, keys of each lane that stand before the first query's; None where the
            queries' own keys are all there is.
        padded: some rows have fewer tokens than the chunk is wide.
        starts: (n + 1,) int32, where each document begins in all rows one after the other, and where the
            last one ends; None where each row is one.
    """

    window: int = 0
    before: Tensor | None = None
    padded: bool = False
    starts: Tensor | None = None


def cannot(what: str) -> ToolmemError:
    """The error for something that flash-attn cannot do."""
    return ToolmemError(f"attention flash: flash-attn cannot do {what}: {OTHERS}")


def functions() -> ModuleType:
    """The package.

    Raises:
        ToolmemError: where it is not installed, or too old.
    """
    install = f"install it on a machine with CUDA by `pip install 'toolmem[flash]'`, or {OTHERS}"
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:
        raise ToolmemError(
            f"attention flash needs the package flash-attn ({error}): {install}"
        ) from None
    version = getattr(module, "__version__", "0")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST or not all(hasattr(module, name) for name in NEEDED):
        oldest = ".".join(map(str, OLDEST))
        raise ToolmemError(
            f"attention flash needs flash-attn {oldest} or newer, not {version}: {install}"
        )
    return module


def document_starts(documents: Tensor) -> Tensor:
    """Where documents begin in all rows one after the other, and where the last ends, int32.

    Args:
        documents: (batch, seq) ids; those of a document are adjacent.
    """
    first = torch.ones_like(documents[:, :1], dtype=torch.bool)
    starts = torch.cat((first, documents[:, 1:] != documents[:, :-1]), dim=1).flatten()
    places = starts.nonzero()[:, 0].to(torch.int32)
    return F.pad(places, (0, 1), value=documents.numel())


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, seen: Seen, scale: float, softcap: float
) -> Tensor:
    """Weighted means of values, (b, h, s, d), as ``HeadMixing.attend``.

    Args:
        queries: (b, h, s, d).
        keys: (b, k, n, d), each of the k heads for h / k query heads.
        values: (b, k, n, d).
        seen: what each query sees.
        scale: what products of queries and keys are multiplied by.
        softcap: bound them to (-softcap, softcap) by a tanh; 0 for none.

    Raises:
        ToolmemError: for tensors that flash-attn does not take.
    """
    module = functions()
    _check(queries, values)
    rows, seq = queries.shape[0], queries.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
    options: dict[str, Any] = {
        "softmax_scale": scale,
        "causal": True,  # aligned to the last key
        "window_size": (seen.window - 1, 0) if seen.window else (-1, -1),
        "softcap": softcap,
    }
    if seen.starts is not None:
        flat = (x.flatten(0, 1) for x in (q, k, v))
        lengths = (seen.starts, seen.starts, seq, seq)
        y = module.flash_attn_varlen_func(*flat, *lengths, **options).unflatten(0, (rows, seq))
    elif seen.before is None:
        y = module.flash_attn_func(q, k, v, **options)
    else:
        # A row's padding counts as tokens: real ones see none of it, being before it.
        if seen.padded:
            k, v = (F.pad(x, (0, 0, 0, 0, 0, seq)) for x in (k, v))
        ends = (seen.before + seq).to(torch.int32)
        y = module.flash_attn_with_kvcache(q, k, v, cache_seqlens=ends, **options)
    return y.transpose(1, 2)


def _check(queries: Tensor, values: Tensor) -> None:
    if queries.device.type != DEVICE:
        raise ToolmemError(
            f"attention flash: flash-attn runs on CUDA, and the model is on {queries.device.type}: "
            f"{OTHERS}"
        )
    if queries.dtype not in DTYPES:
        raise ToolmemError(
            f"attention flash: flash-attn computes in bfloat16 or float16, not in "
            f"{str(queries.dtype).removeprefix('torch.')}: set trainer.precision to bf16-mixed, or {OTHERS}"
        )
    if queries.shape[-1] != values.shape[-1]:
        raise cannot("heads whose values are of another width than their keys (latent attention)")
    if queries.shape[-1] > WIDEST_HEAD:
        raise cannot(f"heads of {queries.shape[-1]} numbers, only up to {WIDEST_HEAD}")


def in_order(
    ring: Tensor, positions: Tensor, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A window's ring, and the chunk behind it, put in the order of their positions.

    Args:
        ring: (b, w) int64, positions of the ring's keys; -1 where there is none.
        positions: (b, s) int64, of the chunk, padding included.
        keys: (b, k, w + s, d).
        values: the same.

    Returns:
        keys and values in order, what is no key last, and (b,) int64, the ring's keys of each lane.
    """
    absent = torch.iinfo(ring.dtype).max
    places = torch.cat((torch.where(ring < 0, absent, ring), positions), dim=1)
    order = places.argsort(dim=1, stable=True)[:, None, :, None]
    keys, values = (x.gather(2, order.expand_as(x)) for x in (keys, values))
    return keys, values, (ring >= 0).sum(1)
