"""Hook points: places in a forward pass with names that stay the same for every model.

    embedding                        what enters the first block
    blocks.I.input                   the stream before block I
    blocks.I.mixer.input             what its mixer reads: normalised, and convolved where there is such
    blocks.I.mixer.queries           ready to be compared: convolved, normalised, turned by position
    blocks.I.mixer.keys              the same; heads of keys and values may serve several of queries
    blocks.I.mixer.values
    blocks.I.mixer.scores            what attention's softmax is given, -inf where it may not look
    blocks.I.mixer.weights           what it gives
    blocks.I.mixer.heads             what each head hands to the output projection
    blocks.I.mixer.output            what the mixer adds to the stream
    blocks.I.feed_forward.input      what the feed-forward reads
    blocks.I.feed_forward.hidden     its neurons, after the activation
    blocks.I.feed_forward.output     what it adds to the stream
    blocks.I.output                  the stream after block I
    norm                             what the head reads
    logits                           what it says

A model has those that make sense: a Mamba block has no weights, a mixture of experts no neurons that
every token uses. Heads are of anything that keeps several apart up to its output projection: attention
of every kind, linear attention, Mamba-2.

Models know nothing of it. Points are reached by forward hooks, and inside attention by the plain kernel
(``attention_kernels.py``), all of them there only inside the ``with`` (``hooks.py``).
"""

from __future__ import annotations

from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.attention import HeadMixing
from toolmem.models.layers import Block

STREAM = ("batch", "seq", "dim")
HEADS = ("batch", "head", "seq", "head_dim")
KEYS = ("batch", "kv_head", "seq", "head_dim")
PAIRS = ("batch", "head", "seq", "key")
UNITS = ("batch", "seq", "neuron")
INSIDE_ATTENTION = ("queries", "keys", "values", "scores", "weights")


def hook_points(model: LanguageModel) -> dict[str, tuple[str, ...]]:
    """Every hook point of a model by name, in the order of the forward pass, with its axes.

    Args:
        model: any architecture.
    """
    found: dict[str, tuple[str, ...]] = {"embedding": STREAM}
    for index, block in enumerate(model.blocks):
        here = f"blocks.{index}"
        found[f"{here}.input"] = STREAM
        if isinstance(block, Block):
            found |= {f"{here}.{name}": axes for name, axes in _inside(block).items()}
        found[f"{here}.output"] = STREAM
    return found | {"norm": STREAM, "logits": ("batch", "seq", "vocab")}


def _inside(block: Block) -> dict[str, tuple[str, ...]]:
    """Points of a block's two branches."""
    found: dict[str, tuple[str, ...]] = {"mixer.input": STREAM}
    if isinstance(block.mixer, HeadMixing):
        axes: list[tuple[str, ...]] = [HEADS, KEYS, KEYS, PAIRS, PAIRS]
        found |= {f"mixer.{name}": a for name, a in zip(INSIDE_ATTENTION, axes, strict=True)}
    if has_heads(block.mixer):
        found["mixer.heads"] = HEADS
    found["mixer.output"] = STREAM
    if block.feed_forward is not None:
        found["feed_forward.input"] = STREAM
        if has_neurons(block.feed_forward):
            found["feed_forward.hidden"] = UNITS
        found["feed_forward.output"] = STREAM
    return found


def has_heads(mixer: nn.Module) -> bool:
    """Whether a mixer keeps heads apart up to a projection that it calls ``out``."""
    return isinstance(getattr(mixer, "n_heads", None), int) and isinstance(
        getattr(mixer, "out", None), nn.Module
    )


def has_neurons(feed_forward: nn.Module) -> bool:
    """Whether every token uses the same hidden units, projected by a linear map called ``down``."""
    return isinstance(getattr(feed_forward, "down", None), nn.Linear)


def check_points(model: LanguageModel, names: object) -> None:
    """Refuse, by name, a point that a model has not.

    Raises:
        ToolmemError: naming the point, and what there is in its stead.
    """
    known = hook_points(model)
    for name in list(names):  # type: ignore[call-overload]
        if name in known:
            continue
        start = ".".join(str(name).split(".")[:2])
        near = [point for point in known if point.startswith(start + ".")]
        raise ToolmemError(
            f"{name!r} is no hook point of this {type(model).__name__}; it has "
            + ", ".join(near or ["embedding", "blocks.0.input and so on", "norm", "logits"])
        )


def attention_layers(model: LanguageModel) -> list[int]:
    """Numbers of the blocks that have attention's weights.

    Raises:
        ToolmemError: for a model without any.
    """
    layers = [
        index
        for index, block in enumerate(model.blocks)
        if isinstance(getattr(block, "mixer", None), HeadMixing)
    ]
    if not layers:
        raise ToolmemError(
            f"this {type(model).__name__} has no attention, and so no heads that look from one token at "
            "another: take a model with attention (Transformer, MoETransformer, Hybrid); logit lens, "
            "patching and probes of toolmem.analysis.circuits serve the others too"
        )
    return layers
