"""A decoder-only Transformer.

Unusual about it: query, key and value come from one projection, and may pass through a causal
convolution of a few tokens (Canon layers), which makes learning to copy reliable; the gated
feed-forward has one input projection. Everything else is Llama's (or, by options, GPT-2's), and the
options that open models have tried since are all off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention, head_sizes
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import Block, FeedForward, FeedForwardKind, NormKind, make_norm
from toolmem.models.mla import LatentAttention, rope_width
from toolmem.models.multi_token import MultiToken, MultiTokenForm


class Transformer(LanguageModel):
    """A decoder-only Transformer, Llama's shape by default.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads of each.
        n_kv_heads: key/value heads (GQA); n_heads when None.
        hidden_dim: width inside the feed-forward; 4 * dim when None.
        head_dim: width of a head; dim / n_heads when None.
        max_seq_len: longest sequence.
        norm: ``rms`` or ``layer``.
        position: ``rope``, ``learned`` or ``none``.
        rope_base: RoPE's base.
        rope_fraction: share of each head that RoPE turns (partial RoPE, arXiv 2204.06745).
        rope_scaling: slow RoPE's turning down for contexts longer than those it was trained on, as models'
            configs say it: ``{"rope_type": "linear", "factor": ...}`` or ``{"rope_type": "llama3", ...}``.
        nope_every: leave every so-manieth layer without rotary positions (SmolLM3's NoPE layers,
            arXiv 2501.18795); 0 for none.
        qk_norm: RMS-normalise query and key heads.
        window: how many tokens back a layer looks, itself included; a list is a pattern repeated over
            the layers, 0 for all (``[512, 512, 0]``: every third layer sees everything).
        attention_mask: ``causal``, or ``prefix``: attention looks both ways within each span that the
            model did not write (arXiv 1910.10683).
        attention_softcap: bound attention's logits by a tanh (arXiv 2408.00118); 0 for none.
        value_residual: mix the first layer's values into every layer's (arXiv 2410.17897).
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        embedding_norm: normalise embedded tokens.
        logit_softcap: bound the logits to (-cap, cap) by a tanh (arXiv 2408.00118); 0 for none.
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        conv_width: taps of the short causal convolution on query, key and value; 0 for none.
        residual_conv: taps of one on each branch's input (Canon A and C); 0 for none.
        sandwich_norm: normalise also what each branch adds to the stream.
        initialization: a scheme of ``initialization.py``.
        mup_base_dim: the width at which the learning rate was tuned, for ``initialization: mup``.
        norm_eps: epsilon of the norms.
        bias: biases in projections and layer norms.
        qkv_bias: a bias on query, key and value alone (Qwen2, arXiv 2407.10671).
        attention: ``gqa``, heads that may share keys and values, or ``mla``, multi-head latent
            attention (arXiv 2405.04434).
        mla_kv_rank: width of the latent that keys and values are made of; 4 * head_dim when None.
        mla_q_rank: width of the latent that queries are made of; 0 makes them of the stream itself.
        mla_rope_dim: width of the part of queries and keys that carries positions; half of head_dim
            when None.
        multi_token: how many tokens beyond the next each position predicts in training.
        multi_token_form: ``sequential`` (arXiv 2412.19437) or ``parallel`` (arXiv 2404.19737).
        multi_token_weight: of their mean loss beside the next token's.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        hidden_dim: int | None = None,
        head_dim: int | None = None,
        max_seq_len: int = 1024,
        norm: NormKind = "rms",
        position: Literal["rope", "learned", "none"] = "rope",
        rope_base: float = 10_000.0,
        rope_fraction: float = 1.0,
        rope_scaling: dict[str, Any] | None = None,
        nope_every: int = 0,
        qk_norm: bool = False,
        window: int | list[int] = 0,
        attention_mask: Literal["causal", "prefix"] = "causal",
        attention_softcap: float = 0.0,
        value_residual: bool = False,
        feed_forward: FeedForwardKind = "swiglu",
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        embedding_norm: bool = False,
        logit_softcap: float = 0.0,
        dropout: float = 0.0,
        conv_width: int = 0,
        residual_conv: int = 0,
        sandwich_norm: bool = False,
        initialization: str = "scaled",
        mup_base_dim: int | None = None,
        norm_eps: float = 1e-5,
        bias: bool = False,
        qkv_bias: bool = False,
        attention: Literal["gqa", "mla"] = "gqa",
        mla_kv_rank: int | None = None,
        mla_q_rank: int = 0,
        mla_rope_dim: int | None = None,
        multi_token: int = 0,
        multi_token_form: MultiTokenForm = "sequential",
        multi_token_weight: float = 0.3,
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            n_heads=n_heads,
            max_seq_len=max_seq_len,
            n_kv_heads=n_kv_heads,
            hidden_dim=hidden_dim,
            head_dim=head_dim,
        )
        kv_heads, width = head_sizes(dim, n_heads, n_kv_heads, head_dim)
        if attention == "mla":
            rotary_dim = rope_width(width, mla_rope_dim) if rotary_width(2, position) else 0
            if position == "rope" and not rotary_dim:
                raise ToolmemError("mla_rope_dim is 0: leave positions out by position: none")
            for name, wanted in {
                "n_kv_heads": n_kv_heads is not None,
                "qk_norm": qk_norm,
                "value_residual": value_residual,
                "rope_fraction": rope_fraction != 1,
                "qkv_bias": qkv_bias,
            }.items():
                if wanted:
                    raise ToolmemError(
                        f"{name} does not go with attention: mla, whose keys and values are made of "
                        f"one normalised latent; leave {name} out"
                    )
        elif attention == "gqa":
            rotary_dim = rotary_width(width, position, rope_fraction)
            if mla_kv_rank is not None or mla_q_rank or mla_rope_dim is not None:
                raise ToolmemError("mla_* options need attention: mla")
        else:
            raise ToolmemError(f"attention: unknown {attention!r}; choose gqa or mla")
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        off_or_more = {
            "conv_width": conv_width,
            "residual_conv": residual_conv,
            "nope_every": nope_every,
            "attention_softcap": attention_softcap,
            "logit_softcap": logit_softcap,
            "multi_token": multi_token,
        }
        for name, value in off_or_more.items():
            if value < 0:
                raise ToolmemError(f"{name} is {value}: it must be 0 (off) or more")
        if norm_eps <= 0 or rope_base <= 0:
            raise ToolmemError("norm_eps and rope_base must be above 0")
        windows = window_pattern(window, n_layers)

        def mixer(index: int, first_values: bool) -> Attention | LatentAttention:
            rope = not nope_every or (index + 1) % nope_every != 0
            if attention == "mla":
                return LatentAttention(
                    dim,
                    n_heads,
                    head_dim,
                    mla_kv_rank,
                    rotary_dim,
                    mla_q_rank,
                    norm_eps,
                    conv_width,
                    bias,
                    window=windows[index],
                    rope=rope,
                    softcap=attention_softcap,
                )
            return Attention(
                dim,
                n_heads,
                kv_heads,
                width,
                qk_norm,
                norm_eps,
                conv_width,
                bias,
                window=windows[index],
                rope=rope,
                value_residual=first_values,
                softcap=attention_softcap,
                qkv_bias=qkv_bias,
            )

        def block(index: int, first_values: bool = value_residual) -> Block:
            return Block(
                dim,
                mixer(index, first_values),
                FeedForward(dim, hidden_dim or 4 * dim, feed_forward, bias),
                norm,
                norm_eps,
                bias,
                dropout,
                sandwich_norm,
                residual_conv,
            )

        ahead = None
        if multi_token:
            ahead = MultiToken(
                lambda: block(n_layers - 1, first_values=False),
                lambda: make_norm(norm, dim, norm_eps, bias),
                dim,
                multi_token,
                multi_token_form,
                multi_token_weight,
            )
        super().__init__(
            [block(index) for index in range(n_layers)],
            make_norm(norm, dim, norm_eps, bias),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            rotary_dim=rotary_dim,
            rope_base=rope_base,
            rope_scaling=rope_scaling,
            learned_positions=position == "learned",
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            embedding_norm=make_norm(norm, dim, norm_eps, bias) if embedding_norm else None,
            logit_softcap=logit_softcap,
            attention_mask=attention_mask,
            dropout=dropout,
            initialization=initialization,
            mup_base_dim=mup_base_dim,
            multi_token=ahead,
        )


def check_sizes(**sizes: int | None) -> None:
    """Refuse, by name, a size below 1; None is a size left open."""
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ToolmemError(f"{name} is {value}: it must be at least 1")


def rotary_width(head_dim: int, position: str, fraction: float = 1.0) -> int:
    """How many numbers of each head rotary positions turn; 0 where ``position`` is not ``rope``.

    Raises:
        ToolmemError: for an unknown ``position``, or a width that is odd.
    """
    if position not in ("rope", "learned", "none"):
        raise ToolmemError(f"position: unknown {position!r}; choose rope, learned or none")
    if position != "rope":
        return 0
    if not 0 < fraction <= 1:
        raise ToolmemError(
            f"rope_fraction is {fraction}: it must be above 0 and at most 1 (position: none turns "
            "nothing)"
        )
    if fraction == 1 and head_dim % 2:
        raise ToolmemError(
            f"head_dim {head_dim} is odd, and position: rope turns pairs of numbers: make head_dim "
            "(dim / n_heads) even, or choose another position"
        )
    return max(2, 2 * round(head_dim * fraction / 2))


def window_pattern(window: int | Sequence[int], n_layers: int) -> list[int]:
    """Each layer's window; a list is repeated over the layers.

    Raises:
        ToolmemError: for a negative window, or an empty list.
    """
    pattern = [window] if isinstance(window, int) else list(window)
    if not pattern or min(pattern) < 0:
        raise ToolmemError(
            f"window is {window}: give tokens (0 for all of them), or a list that repeats over the "
            "layers"
        )
    return [pattern[index % len(pattern)] for index in range(n_layers)]
