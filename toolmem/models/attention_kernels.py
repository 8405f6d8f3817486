"""What runs attention: one choice for training, for decoding with a cache, and for pages.

    sdpa    torch's ``scaled_dot_product_attention``, masks materialised; a few tokens over pages on a
            CPU, and whole steps of a plain Transformer, by C of our own (``kernels``, ``fused``)
    flex    FlexAttention, whatever the mask (``flex.py``)
    flash   the package flash-attn, on CUDA in half precision (``flash.py``)
    plain   softmax(Q K^T) V, written plainly (``HeadMixing.weights``): the reference of all others
    auto    sdpa, and flex on CUDA for whole rows that have a mask and are long

The choice is a matter of the machine, not of the model, and is not kept in checkpoints. It is made by
``LanguageModel.use_attention``; every forward pass carries it in its ``Context``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models import flash
from toolmem.models.kernel_choice import Kernel, KernelChoice

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from toolmem.models.language_model import LanguageModel

# Below this a row has few blocks to leave out, and FlexAttention would be compiled for nothing.
SHORTEST_ROW = 512


class Plain(NamedTuple):
    """A mask for the reference.

    Args:
        mask: bool, broadcasting to (b, heads, s, keys); None for plain causal attention.
    """

    mask: Tensor | None


if TYPE_CHECKING:
    # What tells a kernel what each token sees, and so which kernel it is; a tensor, or None (plain
    # causal attention), is for ``sdpa``.
    Mask = Tensor | BlockMask | flash.Seen | Plain | None


def kernel_for(choice: KernelChoice, device: torch.device, seq: int, masked: bool) -> Kernel:
    """The kernel of a layer in a forward pass.

    Args:
        choice: what was asked for.
        device: where the model is.
        seq: tokens in a row.
        masked: they are whole rows, with a mask that is not plainly causal.
    """
    if choice != "auto":
        return choice
    return "flex" if masked and device.type == "cuda" and seq >= SHORTEST_ROW else "sdpa"


def own_kernels(choice: KernelChoice) -> bool:
    """Whether attention may run by our own C where it can."""
    return choice in ("auto", "sdpa")


def check_choice(choice: str, model: LanguageModel) -> None:
    """Raise ``ToolmemError`` for a kernel that there is not, or that cannot run this model."""
    if choice not in get_args(KernelChoice):
        raise ToolmemError(
            f"attention: unknown {choice!r}; choose from {', '.join(get_args(KernelChoice))}"
        )
    if choice == "flash":
        flash.functions()
        if model.attention_mask == "prefix":
            raise flash.cannot("masks that look both ways (attention_mask: prefix)")
