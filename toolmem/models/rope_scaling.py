"""RoPE turned more slowly, for contexts longer than a model was trained on, as models' configs say it.

| rope_type | pairs of wavelength w                                                          |
|-----------|--------------------------------------------------------------------------------|
| `linear`  | all turn by 1 / factor of their angle (arXiv 2306.15595)                       |
| `llama3`  | w < L / high: as before; w > L / low: by 1 / factor; in between, between them   |

with L = ``original_max_position_embeddings``, low = ``low_freq_factor`` and high = ``high_freq_factor``
(arXiv 2407.21783).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from toolmem.errors import ToolmemError

KEYS = {
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


def check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raise ``ToolmemError`` for a scaling that there is not, or that lacks a number."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in KEYS:
        raise ToolmemError(f"rope_scaling: unknown rope_type {kind!r}; choose {', '.join(KEYS)}")
    if unknown := sorted(set(scaling) - {"rope_type", *KEYS[kind]}):
        raise ToolmemError(f"rope_scaling: {kind} has no {unknown[0]}")
    for key in KEYS[kind]:
        value = scaling.get(key)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ToolmemError(f"rope_scaling: {key} is {value!r}: it must be a number above 0")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ToolmemError("rope_scaling: high_freq_factor must be above low_freq_factor")


def scaled_frequencies(frequencies: Tensor, scaling: Mapping[str, Any] | None) -> Tensor:
    """Radians a token by which each pair turns.

    Args:
        frequencies: (pairs,) float64, unscaled.
        scaling: as in a model's config; None for none.

    Raises:
        ToolmemError: for a scaling that there is not.
    """
    check_rope_scaling(scaling)
    return (
        frequencies if scaling is None else frequencies / frequency_divisors(frequencies, scaling)
    )


def frequency_divisors(frequencies: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """(pairs,) float64, by how much slower each pair turns; arguments as ``scaled_frequencies``."""
    factor = float(scaling["factor"])
    if scaling["rope_type"] == "linear":
        return torch.full_like(frequencies, factor)
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
