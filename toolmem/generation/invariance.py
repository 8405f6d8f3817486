"""Results that do not hang on the batch, bit for bit: which models give them many lanes at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from toolmem.errors import ToolmemError
from toolmem.models import kernels
from toolmem.models.attention import Attention
from toolmem.models.attention_kernels import own_kernels
from toolmem.models.moe import MixtureOfExperts

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


def row_independent(model: LanguageModel) -> bool:
    """Whether one pass over many lanes gives each the bits that it would get with others beside it.

    True where every operation that sums runs by our kernels: linear layers and paged attention. Other
    models run lane by lane when results are to be invariant.
    """
    weight = model.embedding.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not kernels.available():
        return False
    if not own_kernels(model.attention_kernel):
        return False
    plain = all(
        type(mixer) is Attention and not mixer.window
        for mixer in (getattr(block, "mixer", None) for block in model.blocks)
    )
    return plain and not any(isinstance(module, MixtureOfExperts) for module in model.modules())


def check_invariant(model: LanguageModel) -> None:
    """Raise ``ToolmemError`` for a model whose results may hang on the batch all the same."""
    for parameter in model.parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise ToolmemError(
                "invariant: the same bits in any batch are promised in float32 on a CPU, and this model "
                f"has {dtype} on {parameter.device}: run it on the device cpu in float32, or without "
                "invariant"
            )
