"""What a stored model is: weights as they come back from storage, and the bits that they took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

KEPT_BITS = 16  # of each number that is not rounded: bfloat16


@dataclass(frozen=True)
class Stored:
    """A model as it comes back from storage.

    Args:
        model: computes in the dtype that it had; its weights are what the format can tell.
        bits: what is stored, by kind: ``weights`` (codes of rounded weights), ``scales``, ``kept``
            (numbers that the format leaves alone).
    """

    model: LanguageModel
    bits: dict[str, int]

    @property
    def total_bits(self) -> int:
        """All that is stored."""
        return sum(self.bits.values())


def rounded_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that integer formats round, by name: every parameter of two dimensions or more.

    These are linear maps, stacks of them, and embedding tables; rows run over the last dimension, a
    map's inputs. Gains of norms, biases and convolutions' taps are one-dimensional, few, and kept. A
    tied head is its table and comes once.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and not name.endswith("bias")
    }


def kept_numbers(model: nn.Module) -> dict[str, Tensor]:
    """What is stored beside `rounded_weights`: the other parameters, and buffers that are kept."""
    rounded = {id(parameter) for parameter in rounded_weights(model).values()}
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if id(parameter) not in rounded
    }
    persistent = model.state_dict().keys()
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers()
        if name in persistent and buffer.is_floating_point()
    }
    return parameters | buffers
