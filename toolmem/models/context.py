"""What a forward pass tells its blocks of the tokens, beside the tokens themselves.

Shapes: b batch, s seq, k cached keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from toolmem.models import flex
from toolmem.models.masks import attention_mask, tree_mask

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass
class Extras:
    """What blocks hand out beside the stream: terms of the loss, and figures to log.

    Args:
        losses: by name, scalars: means over the tokens, times their coefficient. Training adds them to
            the loss of each token.
        metrics: by name, scalars without gradient, means over the tokens.
    """

    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add to a term of the loss; layers that use one name add up."""
        self.losses[name] = self.losses[name] + value if name in self.losses else value


@dataclass
class Context:
    """What a block may need to know of the tokens that it is given; made once a forward pass.

    Args:
        positions: (b, s) or (s,) int64, each token's position in its document or lane.
        documents: (b, s) ids within which attention, convolution and recurrence stay, or None.
        spans: (b, s) int64, ids (0 and up) of the spans within which attention looks both ways, -1
            elsewhere; None for causal attention.
        key_spans: (b, k) int64, the same of every cached token, the chunk's among them; only with a
            cache.
        rotary: cosines and sines, each (s, 1, d) or (b, s, 1, d); None without rotary positions.
        counts: (b,) int64, real tokens of each row of a cached chunk; None when all are.
        slots: (b, s) int64, where each new token goes in a cache of all tokens; None without one.
        n_keys: cached keys to look at; 0 when the chunk is all there is.
        tree: (b,) lengths before a tree of drafts, and (b, s, s) bool, which of its tokens each sees; None
            for tokens that follow each other.
        extras: where terms of the loss and figures go; None when nobody wants them.
        shared: what an earlier layer leaves for later ones, by name.
        kernel: what runs attention that is not plainly causal, over whole rows: torch's own
            (``sdpa``, with a materialised mask) or FlexAttention (``flex``).
    """

    positions: Tensor
    documents: Tensor | None = None
    spans: Tensor | None = None
    key_spans: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    counts: Tensor | None = None
    slots: Tensor | None = None
    n_keys: int = 0
    tree: tuple[Tensor, Tensor] | None = None
    extras: Extras | None = None
    shared: dict[str, Tensor] = field(default_factory=dict)
    kernel: flex.Kernel = "sdpa"
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    block_masks: dict[int, BlockMask] = field(default_factory=dict)

    def mask(self, window: int = 0) -> Tensor | None:
        """Which keys each token attends to; None for plain causal attention.

        Made once for all layers that ask for the same window.

        Args:
            window: how many tokens back, itself included; 0 for all.

        Returns:
            bool, broadcasting to (b, heads, s, keys), or None.
        """
        if window not in self.masks and self.tree is not None:
            self.masks[window] = tree_mask(*self.tree, self.n_keys)
        if window not in self.masks:
            self.masks[window] = attention_mask(
                self.positions,
                n_keys=self.n_keys,
                documents=self.documents,
                spans=self.spans,
                key_spans=self.key_spans,
                window=window,
            )
        return self.masks[window]

    def kernel_mask(self, window: int = 0) -> Tensor | BlockMask | None:
        """``mask``, in the form that the attention kernel of this pass takes."""
        row = self.positions.shape[-1]
        plain = self.documents is None and self.spans is None and not 0 < window < row
        if self.kernel == "sdpa" or self.n_keys or plain:
            return self.mask(window)
        if window not in self.block_masks:
            self.block_masks[window] = flex.block_mask(
                row, self.positions.device, self.documents, self.spans, window
            )
        return self.block_masks[window]
