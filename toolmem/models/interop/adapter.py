"""Any causal language model of ``transformers`` in the place of one of ours: engine, tools, evaluation.

The model stays theirs, and so does what its layers do. What they remember is kept in our protocol
(``toolmem.models.cache``), so that lanes are ragged, pages are shared and sent away as for models of ours:

- layers that keep keys and values are handed a cache of transformers' kind that writes to ours and reads
  from it, beside a mask that says what each token sees;
- layers that keep states of one size (Mamba) get them put in and taken out around each call. They cannot take
  several tokens behind others, so those are run one by one, and rows of unlike length apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.cache import Cache, LaneState, TokenState
from toolmem.models.context import Context, Extras
from toolmem.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNBOUNDED = 8192  # tokens, where a config names no most
PROBE = 4  # tokens that a model is tried with


class KeysAndValues(TokenState):
    """Keys and values of one layer.

    Args:
        batch_size: number of lanes.
        max_len: tokens that a lane can hold.
        keys: (1, heads, tokens, head_dim) of a layer, for its sizes.
        values: likewise.
        device: where it lives.
        dtype: of what is kept.
    """

    token_dims = {"keys": 2, "values": 2}

    def __init__(
        self,
        batch_size: int,
        max_len: int,
        keys: Tensor,
        values: Tensor,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        for name, like in (("keys", keys), ("values", values)):
            shape = (batch_size, like.shape[1], max_len + 1, like.shape[3])
            setattr(self, name, torch.zeros(shape, device=device, dtype=dtype))


class States(LaneState):
    """States of one size of one layer: a convolution's last inputs, and a recurrence's."""

    def __init__(self, conv: Tensor, recurrent: Tensor) -> None:
        self.conv = conv
        self.recurrent = recurrent


class Adapter(LanguageModel):
    """A causal language model of ``transformers``.

    Args:
        model: theirs, with its weights. It is not copied.
        max_seq_len: longest sequence; as its config says when None.

    Raises:
        ToolmemError: for a model whose logits are more than its head's output, or whose layers remember
            something that has no place here.
    """

    recurrent: bool  # its layers keep states of one size
    _like: list[tuple[Tensor, Tensor]]  # what each layer keeps of a few tokens

    def __init__(self, model: PreTrainedModel, max_seq_len: int | None = None) -> None:
        nn.Module.__init__(self)
        self.theirs = model
        self.body = [getattr(model, model.base_model_prefix)]  # in a list: no module of its own
        config: Any = model.config.get_text_config()
        self.vocab_size = int(self.embedding.weight.shape[0])
        self.dim = int(self.head.weight.shape[1])
        self.attention_mask = "causal"
        self.logit_softcap, self.logit_scale, self.scale = 0.0, 1.0, 1.0
        self.rotary, self.multi_token, self.mup_base_dim = False, None, None
        self.position_embedding = self.embedding_norm = self.dropout = None
        self.tie_embeddings = self.head.weight is self.embedding.weight
        self.blocks = nn.ModuleList()
        parameters = inspect.signature(self.body[0].forward).parameters
        self._cache_name = "past_key_values" if "past_key_values" in parameters else "cache_params"
        self._positions = "position_ids" in parameters
        known = getattr(config, "max_position_embeddings", None) or UNBOUNDED
        self.max_seq_len = min(max_seq_len or known, known)
        self._probe(config)

    @property
    def embedding(self) -> Any:  # type: ignore[override]
        """Theirs."""
        return self.theirs.get_input_embeddings()

    @property
    def head(self) -> Any:  # type: ignore[override]
        """Theirs."""
        return self.theirs.get_output_embeddings()

    @torch.no_grad()
    def _probe(self, config: Any) -> None:
        """Run a few tokens, and look at what came of them."""
        from transformers import DynamicCache
        from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

        was = self.theirs.training
        self.theirs.eval()
        ids = torch.arange(PROBE, device=self.device)[None] % self.vocab_size
        cache: Any = DynamicCache(config=config)
        hidden = self._run(ids, cache)
        logits = self.theirs(ids, use_cache=False).logits
        self.theirs.train(was)
        name = type(self.theirs).__name__
        if not torch.allclose(self.head(hidden).float(), logits.float(), atol=1e-4, rtol=1e-3):
            raise ToolmemError(
                f"{name}: its logits are not its head's output alone, which is needed here"
            )
        if self.head.bias is not None:
            raise ToolmemError(f"{name}: its head has a bias, which has no place here")
        layers: list[Any] = list(cache.layers)
        self.recurrent = bool(layers) and all(type(one) is LinearAttentionLayer for one in layers)
        if self.recurrent:
            pairs = [(one.conv_states[0], one.recurrent_states[0]) for one in layers]
        else:
            pairs = [(getattr(one, "keys", None), getattr(one, "values", None)) for one in layers]
        plain = [
            all(one is not None for one in pair)
            and (self.recurrent or not isinstance(layer, LinearAttentionLayer))
            for layer, pair in zip(layers, pairs, strict=True)
        ]
        if not layers or not all(plain):
            kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "nothing"
            raise ToolmemError(
                f"{name}: what its layers remember ({kinds}) is not keys and values, nor a convolution's and "
                "a recurrence's states"
            )
        self._like = [(a.detach(), b.detach()) for a, b in pairs]
        windows = [
            one.sliding_window for one in layers if isinstance(one, DynamicSlidingWindowLayer)
        ]
        self.max_seq_len = min([self.max_seq_len, *windows])  # within it a window changes nothing

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.weight.device

    def _run(self, ids: Tensor, cache: Any, **options: Any) -> Tensor:
        options |= {self._cache_name: cache, "use_cache": cache is not None}
        return self.body[0](input_ids=ids, return_dict=True, **options).last_hidden_state

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cache:
        """Empty decoding state."""
        device = device or self.device
        layers: list[LaneState] = []
        for first, second in self._like:
            if self.recurrent:
                both = [
                    like.new_zeros((batch_size, *like.shape[1:]), device=device)
                    for like in (first, second)
                ]
                layers.append(States(*both))
            else:
                kind = dtype or first.dtype
                layers.append(KeysAndValues(batch_size, max_len, first, second, device, kind))
        return Cache(layers, batch_size, max_len, device)

    def hidden(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        cache: Cache | None = None,
        counts: Tensor | None = None,
        spans: Tensor | None = None,
        tree: tuple[Tensor, Tensor] | None = None,
        extras: Extras | None = None,
    ) -> Tensor:
        """What the head reads; arguments as ``LanguageModel.hidden``."""
        if documents is not None:
            raise ToolmemError("a model of transformers cannot keep packed documents apart")
        if cache is None:
            self._check_length(tokens.shape[1])
            return self._run(tokens, None)
        context = self._cached_context(tokens, cache, counts, None, tree)
        if self.recurrent:
            x = self._recurrently(tokens, cache, counts)
        else:
            x = self._with_keys(tokens, cache, context)
        cache.advance(counts, tokens.shape[1])
        return x

    def _with_keys(self, tokens: Tensor, cache: Cache, context: Context) -> Tensor:
        mask = context.mask()
        seq = tokens.shape[1]
        if mask is None:
            mask = torch.ones(seq, seq, dtype=torch.bool, device=tokens.device).tril()[None, None]
        dtype = self.embedding.weight.dtype
        lowest = torch.finfo(dtype).min
        added = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, lowest)
        added = added.expand(tokens.shape[0], -1, -1, -1)
        options = {"position_ids": context.positions} if self._positions else {}
        return self._run(tokens, _bridge(cache.layers, context), attention_mask=added, **options)

    def _recurrently(self, tokens: Tensor, cache: Cache, counts: Tensor | None) -> Tensor:
        """Rows that begin as wholes, those of one length together; others token by token."""
        batch, seq = tokens.shape
        real = [seq] * batch if counts is None else counts.tolist()
        fresh = (cache.lengths == 0).tolist()
        hidden = torch.zeros(
            batch, seq, self.dim, device=tokens.device, dtype=self.embedding.weight.dtype
        )
        groups: dict[int, list[int]] = {}
        for row in range(batch):
            if fresh[row] and real[row]:
                groups.setdefault(real[row], []).append(row)
        for length, rows in groups.items():
            self._advance(tokens, cache, hidden, rows, slice(0, length), False)
        for step in range(seq):
            rows = [row for row in range(batch) if not fresh[row] and real[row] > step]
            if rows:
                self._advance(tokens, cache, hidden, rows, slice(step, step + 1), True)
        return hidden

    def _advance(
        self,
        tokens: Tensor,
        cache: Cache,
        hidden: Tensor,
        rows: Sequence[int],
        span: slice,
        before: bool,
    ) -> None:
        from transformers import DynamicCache

        index = torch.tensor(rows, device=tokens.device)
        theirs: Any = DynamicCache(config=self.theirs.config.get_text_config())
        if before:
            for layer, state in zip(theirs.layers, cache.layers, strict=True):
                conv, recurrent = state.conv[index], state.recurrent[index]
                layer.lazy_initialization(conv_states=conv, recurrent_states=recurrent)
                layer.conv_states[0], layer.recurrent_states[0] = conv, recurrent
                layer.has_previous_state[0] = True
        hidden[index, span] = self._run(tokens[index, span], theirs)
        for layer, state in zip(theirs.layers, cache.layers, strict=True):
            state.conv[index] = layer.conv_states[0].to(state.conv.dtype)
            state.recurrent[index] = layer.recurrent_states[0].to(state.recurrent.dtype)


def _bridge(layers: Sequence[Any], context: Context) -> Any:
    """A cache of transformers' kind over ours, for one forward pass."""
    from transformers import DynamicCache

    class Bridge(DynamicCache):
        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            state = layers[layer_idx]
            state.write(
                context, keys=key_states.transpose(1, 2), values=value_states.transpose(1, 2)
            )
            if not context.n_keys:  # the chunk is all there is
                return key_states, value_states
            return state.read("keys", context), state.read("values", context)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return max(0, context.n_keys - context.positions.shape[-1])

    return Bridge()
