"""What each head does, as numbers: previous token, induction, copying.

Shapes: b batch, s seq, h heads, d head_dim, v vocab.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolmem.analysis.circuits.dialogues import Told, side_by_side
from toolmem.analysis.circuits.hooks import record
from toolmem.analysis.circuits.nodes import Node, head, heads
from toolmem.analysis.circuits.points import attention_layers
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.attention import Attention
from toolmem.models.layers import Block, RMSNorm


def attention_weights(model: LanguageModel, tokens: Tensor, **told: Any) -> dict[Node, Tensor]:
    """What every head looks at, by head: (b, s, s), row the one that looks.

    Args:
        model: one with attention.
        tokens: (b, s) int64.
        **told: what else its forward takes.

    Raises:
        ToolmemError: for a model without attention.
    """
    layers = attention_layers(model)
    found = record(model, tokens, [f"blocks.{i}.mixer.weights" for i in layers], **told)
    return {
        head(layer, index): weights
        for layer in layers
        for index, weights in enumerate(found[f"blocks.{layer}.mixer.weights"].unbind(1))
    }


def repeated_tokens(
    model: LanguageModel,
    n: int = 32,
    length: int = 32,
    vocabulary: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Rows of random tokens told twice, (n, 2 length): no token comes twice within a telling if it can.

    Args:
        model: whose ``max_seq_len`` they fit; of a shorter one the tellings are shorter.
        n: rows.
        length: tokens in a telling.
        vocabulary: (k,) int64, tokens to take, such as those of its training data; all when None.
        seed: of the choice.
    """
    device = model.embedding.weight.device
    tokens = torch.arange(model.vocab_size) if vocabulary is None else vocabulary.cpu()
    length = min(length, model.max_seq_len // 2)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        order = torch.randperm(len(tokens), generator=generator)
        order = order.repeat(-(-length // len(order)))[:length]
        rows.append(tokens[order])
    return torch.stack(rows).repeat(1, 2).to(device)


def previous_token_scores(model: LanguageModel, tokens: Tensor, **told: Any) -> dict[Node, float]:
    """The mean weight that each head gives the token before, over all tokens but the first.

    Args:
        model: one with attention.
        tokens: (b, s) int64, such as ``repeated_tokens``.
        **told: what else its forward takes.

    Raises:
        ToolmemError: for a model without attention.
    """
    weights = attention_weights(model, tokens, **told)
    return {node: w.diagonal(-1, 1, 2).mean().item() for node, w in weights.items()}


def induction_scores(model: LanguageModel, tokens: Tensor) -> dict[Node, float]:
    """The mean weight that each head gives the token after the last occurrence of the present one.

    As in arXiv 2209.11895, over the second telling of random tokens.

    Args:
        model: one with attention.
        tokens: (b, 2 length) int64 of ``repeated_tokens``.

    Raises:
        ToolmemError: for a model without attention, or rows that do not tell the same twice.
    """
    length = tokens.shape[1] // 2
    if length < 2 or not torch.equal(tokens[:, :length], tokens[:, length : 2 * length]):
        raise ToolmemError("induction scores need rows that tell the same twice (repeated_tokens)")
    # the last token's successor has not come yet in the first telling, so it is left out
    at = torch.arange(length, 2 * length)
    weights = attention_weights(model, tokens[:, : 2 * length])
    return {node: w[:, at, at - length + 1].mean().item() for node, w in weights.items()}


def copy_scores(
    model: LanguageModel, told: Sequence[Told], what: str, offset: int = 0
) -> dict[Node, float]:
    """The mean weight that each head gives what is copied, at the token before each that is written.

    Args:
        model: one with attention.
        told: dialogues.
        what: which copies (``dialogues.Copy``).
        offset: look so many tokens after the copied token instead. A short convolution before attention
            may have carried it on.

    Returns:
        of each head, the weights on all earlier occurrences together; nan where nothing is copied.

    Raises:
        ToolmemError: for a model without attention.
    """
    rows = side_by_side(told, model.embedding.weight.device)
    weights = attention_weights(model, rows.tokens, spans=rows.spans)
    triples = [
        (row, target - 1, source + offset, 1 / len(copy.target))
        for row, one in enumerate(told)
        for copy in one.copies
        if copy.what == what
        for sources in copy.sources
        for target, source in zip(copy.target, sources, strict=True)
        if 0 <= source + offset < target
    ]
    n = sum(copy.what == what for one in told for copy in one.copies)
    if not n:
        return dict.fromkeys(weights, float("nan"))
    row, query, key = torch.tensor([t[:3] for t in triples], dtype=torch.int64).reshape(-1, 3).T
    share = torch.tensor([t[3] for t in triples], dtype=torch.float64)
    return {
        node: float((w[row, query, key].cpu().double() * share).sum() / n)
        for node, w in weights.items()
    }


def frozen_norm(norm: nn.Module, whole: Tensor, part: Tensor) -> Tensor:
    """What a norm makes of a part of what it reads, its divisor being that of the whole.

    So the parts' add up to the whole's, but for a layer norm's bias.

    Args:
        norm: of the library.
        whole: (..., dim), what it reads.
        part: (..., dim), a part of it.

    Raises:
        ToolmemError: for a norm of another kind.
    """
    if isinstance(norm, RMSNorm):
        return part * torch.rsqrt(whole.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    if isinstance(norm, nn.LayerNorm):
        divisor = torch.sqrt(whole.var(-1, unbiased=False, keepdim=True) + norm.eps)
        y = (part - part.mean(-1, keepdim=True)) / divisor
        return y if norm.weight is None else y * norm.weight
    raise ToolmemError(
        f"a {type(norm).__name__} cannot be taken apart: it is no RMSNorm or LayerNorm"
    )


@torch.no_grad()
def head_outputs(block: Block, found: Tensor) -> Tensor:
    """What each head adds to the stream, (b, h, s, dim).

    Args:
        block: the block.
        found: (b, h, s, d), what passed its point ``mixer.heads``.
    """
    weight = block.mixer.out.weight.unflatten(1, (found.shape[1], -1))  # type: ignore[union-attr,operator]
    each = torch.einsum("bhsd,ehd->bhse", found, weight)
    if block.mixer_post_norm is None:
        return each
    whole = block.mixer.out(found.transpose(1, 2).flatten(2))  # type: ignore[operator]
    return frozen_norm(block.mixer_post_norm, whole[:, None], each)


@torch.no_grad()
def logit_effects(model: LanguageModel, told: Sequence[Told], what: str) -> dict[Node, float]:
    """How much each head by itself raises the logit of the token to be copied, over that of the mean token.

    What the head adds to the stream, read by the last norm (its divisor as it is) and the head; before a
    soft cap. Also of heads that are not attention's.

    Args:
        model: any with heads.
        told: dialogues.
        what: which copies.
    """
    rows = side_by_side(told, model.embedding.weight.device)
    nodes = heads(model)
    names = list(dict.fromkeys(node.point for node in nodes))
    last = f"blocks.{len(model.blocks) - 1}.output"
    found = record(model, rows.tokens, [*names, last], spans=rows.spans)
    places = [
        (row, target - 1, target)
        for row, one in enumerate(told)
        for copy in one.copies
        if copy.what == what
        for target in copy.target
    ]
    if not places:
        return dict.fromkeys(nodes, float("nan"))
    row, at, target = torch.tensor(places, device=rows.tokens.device).T
    unembed = model.head.weight * model.logit_scale
    direction = unembed[rows.tokens[row, target]] - unembed.mean(0)
    whole = found[last][row, at]
    effects: dict[Node, float] = {}
    for name in names:
        block = model.blocks[int(name.split(".")[1])]
        assert isinstance(block, Block)
        each = head_outputs(block, found[name]).transpose(1, 2)[row, at]
        read = frozen_norm(model.norm, whole[:, None], each)
        values = (read * direction[:, None]).sum(-1).mean(0)
        effects |= {Node(name, index): float(value) for index, value in enumerate(values)}
    return effects


@torch.no_grad()
def ov_copying(model: LanguageModel) -> dict[Node, float]:
    """How far each head's OV circuit says the token that it looks at: sum of eigenvalues over their sizes.

    1 where every token raises itself, -1 where it lowers itself ("A Mathematical Framework for
    Transformer Circuits", Elhage et al. 2021). From the embedding straight to the logits: what other
    layers do in between, short convolutions on earlier tokens, and a norm's divisor are left out.

    Args:
        model: one with attention. Heads of latent attention, whose values pass a norm, have none.

    Raises:
        ToolmemError: for a model without attention.
    """
    attention_layers(model)
    embedded = model.embed(torch.arange(model.vocab_size, device=model.embedding.weight.device))
    if model.embedding_norm is not None:
        embedded = model.embedding_norm(embedded)
    unembed = model.head.weight * _gain(model.norm)
    scores = {}
    for layer, block in enumerate(model.blocks):
        mixer = getattr(block, "mixer", None)
        if not isinstance(mixer, Attention):
            continue
        value = mixer.qkv.weight.unflatten(0, (-1, mixer.head_dim))[-mixer.n_kv_heads :]
        if mixer.conv is not None:
            taps = 1 + mixer.conv.taps.view(mixer.conv.width, -1)[0]
            value = value * taps.view(-1, mixer.head_dim, 1)[-mixer.n_kv_heads :]
        value = value * _gain(block.mixer_norm)
        out = mixer.out.weight.unflatten(1, (mixer.n_heads, -1))
        if block.mixer_post_norm is not None:
            out = out * _gain(block.mixer_post_norm)[:, None, None]
        for index in range(mixer.n_heads):
            # tokens -> head -> tokens has the eigenvalues of head -> tokens -> head
            own = value[index // (mixer.n_heads // mixer.n_kv_heads)]
            circle = (own @ embedded.T) @ (unembed @ out[:, index])
            values = torch.linalg.eigvals(circle.double())
            size = values.abs().sum()
            scores[head(layer, index)] = float(values.real.sum() / size) if size > 0 else 0.0
    return scores


def _gain(norm: nn.Module) -> Tensor:
    weight = getattr(norm, "weight", None)
    return torch.ones(()) if weight is None else weight
