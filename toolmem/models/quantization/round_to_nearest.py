"""Round to nearest: each weight becomes the nearest multiple of its group's scale.

The simplest quantiser, and the one that better ones are measured by. A group is ``group_size``
neighbours along a row (a linear map's inputs), or the whole row: one scale an output channel. Of b bits
the codes are whole numbers of -(2^(b-1) - 1) to 2^(b-1) - 1, symmetric about 0, so int2 has three
values, and one of its four codes is unused. The scale, the group's largest magnitude over the largest
code, is itself stored in half precision; what comes back is code times stored scale.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models.quantization.storage import KEPT_BITS, Stored, kept_numbers, rounded_weights

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

ScaleFormat = Literal["float16", "float32"]
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def largest_code(bits: int) -> int:
    """The largest whole number of a symmetric code of so many bits."""
    return 2 ** (bits - 1) - 1


def nearest(
    weight: Tensor, bits: int, group_size: int | None = None, scale_format: ScaleFormat = "float16"
) -> tuple[Tensor, Tensor]:
    """Codes and scales of one weight.

    Args:
        weight: (..., columns), finite.
        bits: of a code, 2 to 8.
        group_size: neighbours that share a scale, the last group of a row may be smaller; all of a row
            when None.
        scale_format: what a scale is stored in.

    Returns:
        (..., columns) int8 codes, and (..., groups) scales in the dtype that they are stored in.

    Raises:
        ToolmemError: for a scale that its format cannot hold.
    """
    columns = weight.shape[-1]
    size = min(group_size or columns, columns)
    n_groups = -(-columns // size)
    # float64: a tie of the weights themselves stays one, and nothing else becomes one
    padded = weight.new_zeros(*weight.shape[:-1], n_groups * size, dtype=torch.float64)
    padded[..., :columns] = weight
    groups = padded.unflatten(-1, (n_groups, size))
    top = largest_code(bits)
    scales = (groups.abs().amax(-1) / top).to(SCALE_DTYPES[scale_format])
    if not scales.isfinite().all():
        raise ToolmemError(
            f"a weight of magnitude {weight.abs().max().item():.3g} cannot be stored with a scale in "
            f"{scale_format}: use float32 scales, or look whether training diverged"
        )
    divisors = scales.double()[..., None]
    # a group so small that its scale is 0 comes back as zeros
    codes = torch.where(divisors > 0, groups / divisors, 0.0).round().clamp(-top, top)
    return codes.flatten(-2)[..., :columns].to(torch.int8), scales


def from_codes(codes: Tensor, scales: Tensor, group_size: int | None = None) -> Tensor:
    """The weights that codes and scales tell, float64.

    Args:
        codes: (..., columns) int8.
        scales: (..., groups).
        group_size: as `nearest` had it.
    """
    columns = codes.shape[-1]
    size = min(group_size or columns, columns)
    spread = scales.double().repeat_interleave(size, dim=-1)[..., :columns]
    return codes.double() * spread


def rounded_to_nearest(
    model: LanguageModel,
    bits: int,
    *,
    group_size: int | None = None,
    scale_format: ScaleFormat = "float16",
) -> Stored:
    """A copy of a model with its `rounded_weights` in integers, what is kept in bfloat16.

    Args:
        model: left as it is.
        bits: of a weight, 2 to 8.
        group_size: weights along a row that share a scale; all of a row when None.
        scale_format: what a scale is stored in.

    Raises:
        ToolmemError: for numbers outside these ranges, and weights that cannot be stored.
    """
    if not 2 <= bits <= 8:
        raise ToolmemError(f"bits is {bits}: integers of 2 to 8 bits are stored")
    if group_size is not None and group_size < 1:
        raise ToolmemError(f"group_size is {group_size}: it must be 1 or more, or null for a row")
    stored = copy.deepcopy(model)
    count = {"weights": 0, "scales": 0, "kept": 0}
    with torch.no_grad():
        for name, weight in rounded_weights(stored).items():
            try:
                codes, scales = nearest(weight, bits, group_size, scale_format)
            except ToolmemError as error:
                raise ToolmemError(f"{name}: {error}") from error
            weight.copy_(from_codes(codes, scales, group_size))
            count["weights"] += codes.numel() * bits
            count["scales"] += scales.numel() * torch.finfo(scales.dtype).bits
        for number in kept_numbers(stored).values():
            number.copy_(number.to(torch.bfloat16))
            count["kept"] += number.numel() * KEPT_BITS
    return Stored(stored, count)
