"""What a forward pass tells its blocks of the tokens, beside the tokens themselves.

Shapes: b batch, s seq, k cached keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from toolmem.models import flash, flex
from toolmem.models.attention_kernels import Plain, kernel_for
from toolmem.models.kernel_choice import Kernel, KernelChoice
from toolmem.models.masks import attention_mask, tree_mask

if TYPE_CHECKING:
    from toolmem.models.attention_kernels import Mask


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
        kernel: what runs attention (``attention_kernels.py``).
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
    kernel: KernelChoice = "auto"
    masks: dict[int, Tensor | None] = field(default_factory=dict)
    kernel_masks: dict[int, Mask] = field(default_factory=dict)

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

    def kernel_mask(self, window: int = 0) -> Mask:
        """``mask``, in the form that the attention kernel of this pass takes."""
        row, whole = self.positions.shape[-1], self.slots is None
        masked = whole and not (
            self.documents is None and self.spans is None and not 0 < window < row
        )
        kernel = kernel_for(self.kernel, self.positions.device, row, masked)
        if kernel == "sdpa":
            return self.mask(window)
        if window not in self.kernel_masks:
            self.kernel_masks[window] = self._mask_for(kernel, window)
        return self.kernel_masks[window]

    def _mask_for(self, kernel: Kernel, window: int) -> Mask:
        if kernel == "flash":
            return self._seen(window)
        if kernel == "plain":
            return Plain(self.mask(window))
        mask = None if self.slots is None else self.mask(window)
        if mask is not None:  # with a cache: not larger than what the rule would be worked out to
            return flex.from_mask(mask)
        row, device = self.positions.shape[-1], self.positions.device
        return flex.block_mask(row, device, self.documents, self.spans, window)

    def _seen(self, window: int) -> flash.Seen:
        if self.spans is not None:
            raise flash.cannot("masks that look both ways (attention_mask: prefix)")
        if self.tree is not None:
            raise flash.cannot("trees of drafts")
        if self.documents is not None:
            return flash.Seen(window, starts=flash.document_starts(self.documents))
        if not self.n_keys:
            return flash.Seen(window)
        return flash.Seen(window, self.positions[:, 0], self.counts is not None)

    def mask_in_form(self, mask: Tensor) -> Mask:
        """A mask of a layer's own, in the form that the attention kernel of this pass takes.

        Args:
            mask: bool, (b, 1, s, keys).
        """
        kernel = kernel_for(self.kernel, mask.device, mask.shape[-2], masked=False)
        if kernel == "flash":
            raise flash.cannot("such masks")
        if kernel == "plain":
            return Plain(mask)
        return mask if kernel == "sdpa" else flex.from_mask(mask)
