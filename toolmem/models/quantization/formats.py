"""Storage formats by name: floating-point ones, and integers by round-to-nearest."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal, get_args

import torch

from toolmem.errors import ToolmemError
from toolmem.models.quantization.round_to_nearest import ScaleFormat, rounded_to_nearest
from toolmem.models.quantization.storage import Stored, kept_numbers, rounded_weights

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

Storage = Literal["float32", "bfloat16", "float16", "int8", "int4", "int3", "int2"]
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def in_float(model: LanguageModel, dtype: torch.dtype) -> Stored:
    """A copy of a model with all its numbers in a floating-point format.

    Args:
        model: left as it is.
        dtype: the format.
    """
    stored = copy.deepcopy(model)
    bits = torch.finfo(dtype).bits
    count = {"weights": 0, "scales": 0, "kept": 0}
    with torch.no_grad():
        for key, numbers in (("weights", rounded_weights(stored)), ("kept", kept_numbers(stored))):
            for number in numbers.values():
                number.copy_(number.to(dtype))
                count[key] += number.numel() * bits
    return Stored(stored, count)


def as_stored(
    model: LanguageModel,
    storage: Storage,
    *,
    group_size: int | None = None,
    scale_format: ScaleFormat = "float16",
) -> Stored:
    """A copy of a model as it comes back from a storage format, by its name.

    Args:
        model: left as it is.
        storage: ``float32``, ``bfloat16``, ``float16``, or ``int8``, ``int4``, ``int3``, ``int2`` by
            round-to-nearest.
        group_size: of integers, see `rounded_to_nearest`.
        scale_format: of integers.

    Raises:
        ToolmemError: for a format that there is not.
    """
    if storage not in get_args(Storage):
        raise ToolmemError(
            f"storage: unknown {storage!r}; choose from {', '.join(get_args(Storage))}"
        )
    if storage in FLOATS:
        return in_float(model, FLOATS[storage])
    bits = int(storage.removeprefix("int"))
    return rounded_to_nearest(model, bits, group_size=group_size, scale_format=scale_format)
