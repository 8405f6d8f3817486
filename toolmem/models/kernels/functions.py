"""The kernels as functions of tensors, each with the plain torch that serves where they cannot.

Shapes: b lanes, h query heads, k key/value heads, d head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toolmem.models.kernels.build import library

# From so many rows on torch's matrix product (MKL) is the faster one: on one core of a Xeon with AVX-512,
# SmolLM2-135M's products took 176 ms here and 177 ms there at 96 rows, 343 and 317 ms at 192.
MANY_ROWS = 96


@torch.compiler.assume_constant_result
def _there() -> bool:
    return library() is not None


def _compiled(*tensors: Tensor) -> bool:
    """Whether a pass is being compiled in which these tensors may go to our operators."""
    return (
        torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and _there()
    )


def _plain(*tensors: Tensor) -> bool:
    """Whether C may read and write these tensors: real memory of the CPU, and nobody who looks on."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or any(
            type(t) not in (Tensor, torch.nn.Parameter)
            or t.device.type != "cpu"
            or (torch.is_grad_enabled() and t.requires_grad)
            or torch._C._functorch.is_functorch_wrapped_tensor(t)
            for t in tensors
        )
    )


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel computes this product."""
    return (
        x.dtype == torch.float32
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.ndim == 2
        and weight.is_contiguous()
        and x.ndim > 0
        and x.shape[-1] == weight.shape[1]
        and (
            bias is None
            or (
                bias.dtype == torch.float32
                and bias.is_contiguous()
                and bias.shape == weight.shape[:1]
            )
        )
        and _plain(x, weight, *(() if bias is None else (bias,)))
    )


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` in torch: each row by a call of its own, from memory aligned alike."""
    rows = x.reshape(-1, x.shape[-1])
    outputs = [F.linear(row.clone(), weight.to(row.dtype), bias) for row in rows.split(1)]
    y = torch.cat(outputs) if outputs else F.linear(rows, weight.to(x.dtype), bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Products with a weight, x W^T + b, each row the same bits whatever rows are beside it.

    At one row it runs as fast as the weight can be read. No gradient.

    Args:
        x: (..., inputs) float32.
        weight: (outputs, inputs) float32, or bfloat16, which is summed in float32.
        bias: (outputs,) float32, or None.

    Returns:
        (..., outputs) float32.
    """
    built = library()
    if built is None or not _takes(x, weight, bias):
        return _row_by_row(x, weight, bias)
    return _linear(built, x, weight, bias)


def _linear(built: object, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outputs, inputs = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    built.linear(  # type: ignore[attr-defined]
        x.data_ptr(),
        x.numel() // inputs if inputs else y.numel() // max(1, outputs),
        weight.data_ptr(),
        weight.dtype == torch.bfloat16,
        outputs,
        inputs,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def fast_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by whatever is fastest for so many rows; its arguments.

    ``F.linear`` itself wherever the kernel is not there, would be slower, or a gradient is wanted.
    """
    if _compiled(x, weight, *(() if bias is None else (bias,))) and weight.is_contiguous():
        y: Tensor = torch.ops.toolmem.fast_linear(x, weight, bias)
        return y
    few = x.dtype == weight.dtype and x.numel() < MANY_ROWS * x.shape[-1]
    if few and _takes(x, weight, bias):
        built = library()
        if built is not None:
            return _linear(built, x, weight, bias)
    return F.linear(x, weight, bias)


def likeliest(logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token of each row, the first of a tie, and its log-probability.

    Args:
        logits: (n, vocab) float32.

    Returns:
        tokens (n,) int64, and log-probabilities (n,) float32 in nats.
    """
    built = library()
    if built is None or logits.dtype != torch.float32 or not _plain(logits):
        tokens = logits.argmax(dim=-1)
        log_probs = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(dim=-1)
        return tokens.cpu().numpy(), log_probs.cpu().numpy()
    logits = logits.contiguous()
    n, vocab = logits.shape
    chosen, log_prob = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.float32)
    built.likeliest(logits.data_ptr(), n, vocab, chosen.ctypes.data, log_prob.ctypes.data)
    return chosen, log_prob


def usable(queries: Tensor, keys: Tensor) -> bool:
    """Whether ``paged_attention`` runs as a kernel for these queries and pages of keys."""
    return (
        queries.dtype == keys.dtype == torch.float32
        and keys.is_contiguous()
        and queries.shape[-1] == keys.shape[-1]
        and (_compiled(queries, keys) or (_plain(queries, keys) and library() is not None))
    )


def paged_attention(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """One new token a lane: kept in its page, then let look at all tokens of its lane.

    Paged attention, arXiv 2309.06180. No gradient.

    Args:
        queries: (b, h, d) float32.
        new_keys: (b, k, d) float32, written to the lane's pages.
        new_values: the same.
        key_pages: (n_pages, k, page_size, d) float32, written to.
        value_pages: the same.
        tables: (b, n) int32, each lane's pages in order.
        lengths: (b,) int32, tokens of each before the new one; negative for a row that is no lane:
            nothing is written for it, and its output is zero.
        scale: what products of queries and keys are multiplied by.
        softcap: bound them to (-softcap, softcap) by a tanh; 0 for none.

    Returns:
        (b, h, d) float32.
    """
    if torch.compiler.is_compiling():
        y: Tensor = torch.ops.toolmem.paged_attention(
            queries, new_keys, new_values, key_pages, value_pages, tables, lengths, scale, softcap
        )
        return y
    built = library()
    every = (queries, new_keys, new_values, key_pages, value_pages)
    if (
        built is None
        or any(t.dtype != torch.float32 for t in every)
        or not (key_pages.is_contiguous() and value_pages.is_contiguous())
        or not _plain(*every)
    ):
        return _paged_attention(*every, tables, lengths, scale, softcap)
    b, h, d = queries.shape
    _, k, page_size, _ = key_pages.shape
    tables, lengths = tables.to(torch.int32).contiguous(), lengths.to(torch.int32).contiguous()
    y = queries.new_empty(b, h, d)
    rows = []
    for t in (queries, new_keys, new_values):
        if t.stride(2) != 1 or t.stride(1) != d:
            t = t.contiguous()
        rows.append(t)
    failure = built.paged_attention(
        rows[0].data_ptr(),
        rows[0].stride(0),
        rows[1].data_ptr(),
        rows[1].stride(0),
        rows[2].data_ptr(),
        rows[2].stride(0),
        key_pages.data_ptr(),
        value_pages.data_ptr(),
        len(key_pages),
        tables.data_ptr(),
        tables.shape[1],
        lengths.data_ptr(),
        y.data_ptr(),
        b,
        h,
        k,
        d,
        page_size,
        scale,
        softcap,
        torch.get_num_threads(),
    )
    if failure == 1:
        raise MemoryError(f"attention over {int(lengths.max()) + 1} tokens of one lane")
    assert not failure, "a lane's table is too short, or names a page that there is not"
    return y


def _paged_attention(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float,
) -> Tensor:
    """``paged_attention`` in torch, lane by lane."""
    size, share = key_pages.shape[2], queries.shape[1] // key_pages.shape[1]
    y = torch.zeros_like(queries)
    for lane, length in enumerate(lengths.tolist()):
        if length < 0:
            continue
        pages = tables[lane].long()
        key_pages[pages[length // size], :, length % size] = new_keys[lane].to(key_pages.dtype)
        value_pages[pages[length // size], :, length % size] = new_values[lane].to(
            value_pages.dtype
        )
        pages = pages[: length // size + 1]
        keys, values = (
            t[pages].transpose(0, 1).flatten(1, 2)[:, : length + 1].repeat_interleave(share, 0)
            for t in (key_pages, value_pages)
        )
        scores = (keys.to(queries.dtype) @ queries[lane][:, :, None])[:, :, 0] * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.softmax(-1)
        y[lane] = (weights[:, None] @ values.to(queries.dtype))[:, 0]
    return y
