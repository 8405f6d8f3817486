"""Any pattern of mixers by layer, written in the recipe.

    pattern: [mamba2, mamba2, attention]         repeated over the layers
    mixers:                                      what each name is made with
      attention: {n_heads: 4, window: 128}
      mamba2: {state_dim: 32}

A name is one of ``MIXERS``, or one of your own that says by ``class_path`` what it stands for, a mixer
of ``MIXERS`` or any class by its import path:

    pattern: [local, local, global]
    mixers:
      local: {class_path: attention, n_heads: 4, window: 64}
      global: {class_path: attention, n_heads: 4}
      mine: {class_path: my_mixers.Gate, width: 3}

A mixer class takes ``dim`` and its options; ``layers.Mixer`` says what it must do. Feed-forwards are
chosen the same way. Griffin (arXiv 2402.19427) and Jamba (arXiv 2403.19887) are such patterns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from toolmem.class_path import construct
from toolmem.errors import ToolmemError
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import Block, FeedForward, NormKind, make_norm
from toolmem.models.transformer import check_sizes

# Short names of the mixers and feed-forwards that come with the library, for recipes.
MIXERS = {
    "attention": "toolmem.models.attention.Attention",
    "latent_attention": "toolmem.models.mla.LatentAttention",
    "mamba1": "toolmem.models.mamba.Mamba1Mixer",
    "mamba2": "toolmem.models.mamba2.Mamba2Mixer",
    "lstm": "toolmem.models.rnn.LSTM",
    "gru": "toolmem.models.rnn.GRU",
    "mingru": "toolmem.models.rnn.MinGRU",
    "minlstm": "toolmem.models.rnn.MinLSTM",
    "rglru": "toolmem.models.rnn.RGLRU",
    "gated_linear": "toolmem.models.linear_attention.GatedLinearAttention",
    "gated_delta": "toolmem.models.linear_attention.GatedDeltaNet",
}
FEED_FORWARDS = {"moe": "toolmem.models.moe.MixtureOfExperts"}
FEED_FORWARD_KINDS = ("swiglu", "silu", "gelu", "relu2")


class Hybrid(LanguageModel):
    """A language model of any mixers, layer by layer.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        pattern: names of mixers, repeated over the layers.
        mixers: options by name.
        feed_forward: a kind (``swiglu``, ``silu``, ``gelu``, ``relu2``), ``moe``, ``none``, or a name of
            ``feed_forwards``; a list is repeated over the layers.
        feed_forwards: options by name.
        hidden_dim: width inside feed-forwards that do not say their own; 4 * dim when None.
        max_seq_len: longest sequence.
        rope: rotary positions for the mixers that take them.
        rope_base: RoPE's base.
        attention_mask: ``causal``, or ``prefix``: attention looks both ways within each span that the
            model did not write.
        norm: ``rms`` or ``layer``.
        norm_eps: epsilon of the norms.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        logit_softcap: bound the logits to (-cap, cap) by a tanh; 0 for none.
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        residual_conv: taps of a short convolution on each branch's input (Canon A and C of
            arXiv 2512.17351); 0 for none.
        sandwich_norm: normalise also what each branch adds to the stream.
        initialization: a scheme of ``initialization.py``.

    Raises:
        ToolmemError: for a name that is unknown, or an option that a mixer does not take.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        pattern: list[str],
        mixers: dict[str, dict[str, Any]] | None = None,
        feed_forward: str | list[str] = "swiglu",
        feed_forwards: dict[str, dict[str, Any]] | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 1024,
        rope: bool = True,
        rope_base: float = 10_000.0,
        attention_mask: str = "causal",
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        logit_softcap: float = 0.0,
        dropout: float = 0.0,
        residual_conv: int = 0,
        sandwich_norm: bool = False,
        initialization: str = "scaled",
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            max_seq_len=max_seq_len,
            hidden_dim=hidden_dim,
        )
        if not pattern:
            raise ToolmemError("pattern is empty: name at least one mixer")
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        hidden = hidden_dim or 4 * dim
        branches = [feed_forward] if isinstance(feed_forward, str) else feed_forward
        _check_options("mixers", mixers, pattern)
        _check_options("feed_forwards", feed_forwards, branches)

        def block(index: int) -> Block:
            mixer = make_part(
                pattern[index % len(pattern)], mixers or {}, MIXERS, "mixers", {"dim": dim}
            )
            return Block(
                dim,
                mixer,
                _feed_forward(branches[index % len(branches)], feed_forwards or {}, dim, hidden),
                norm,
                norm_eps,
                dropout=dropout,
                sandwich_norm=sandwich_norm,
                residual_conv=residual_conv,
            )

        blocks = [block(index) for index in range(n_layers)]
        super().__init__(
            blocks,
            make_norm(norm, dim, norm_eps),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            rotary_dim=_rotary_dim([block.mixer for block in blocks]) if rope else 0,
            rope_base=rope_base,
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            logit_softcap=logit_softcap,
            attention_mask=attention_mask,  # type: ignore[arg-type]
            dropout=dropout,
            initialization=initialization,
        )


def make_part(
    name: str,
    options: Mapping[str, Mapping[str, Any]],
    shortcuts: Mapping[str, str],
    key: str,
    given: Mapping[str, Any],
) -> nn.Module:
    """A mixer or feed-forward by its name in a recipe.

    Args:
        name: as the pattern says it.
        options: of all names; ``class_path`` says what a name stands for.
        shortcuts: import paths by short name.
        key: what ``options`` is called in the recipe, for messages.
        given: arguments that the model decides, as far as the class takes them.

    Raises:
        ToolmemError: for a name that stands for nothing, a class that cannot be imported, or options
            that it does not take.
    """
    chosen = dict(options.get(name, {}))
    path = str(chosen.pop("class_path", name))
    path = shortcuts.get(path, path)
    if "." not in path:
        raise ToolmemError(
            f"{key}: {path!r} is unknown; choose one of {', '.join(shortcuts)}, or name a class by "
            f"{key}.{name}.class_path"
        )
    return construct(path, chosen, given, f"{key}.{name}", nn.Module)


def _feed_forward(
    name: str, options: Mapping[str, Mapping[str, Any]], dim: int, hidden_dim: int
) -> nn.Module | None:
    if name == "none":
        return None
    given = {"dim": dim, "hidden_dim": hidden_dim}
    if name in FEED_FORWARD_KINDS:
        return FeedForward(**{**given, **options.get(name, {})}, kind=name)
    return make_part(name, options, FEED_FORWARDS, "feed_forwards", given)


def _check_options(
    key: str, options: Mapping[str, Mapping[str, Any]] | None, names: Sequence[str]
) -> None:
    """Refuse options of a name that the pattern never uses: they would do nothing."""
    for name, chosen in (options or {}).items():
        if name not in names:
            raise ToolmemError(
                f"{key}.{name}: no layer is called so; the pattern has {', '.join(dict.fromkeys(names))}"
            )
        if not isinstance(chosen, Mapping):
            raise ToolmemError(f"{key}.{name} is {chosen!r}: give its options by name")


def _rotary_dim(mixers: Sequence[Any]) -> int:
    """Width of the rotary tables that serve all mixers that take them; 0 where none does."""
    widths = {mixer.rotary_dim for mixer in mixers if getattr(mixer, "rotary_dim", 0)}
    if len(widths) > 1:
        raise ToolmemError(
            f"mixers turn heads of different widths, {sorted(widths)}: give them one head_dim, or "
            "rope: false to all but one"
        )
    return widths.pop() if widths else 0
