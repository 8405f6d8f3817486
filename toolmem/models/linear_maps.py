"""Which parameters of a model are linear maps, and which of those write to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

RESIDUAL_OUTPUTS = ("out", "down")


def linear_maps(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every linear map by name, or stack of linear maps, of shape (..., outputs, inputs).

    A rule and no list: parameters of two or more dimensions that are neither an embedding table (a
    tied head is its table) nor named ``bias``. Whatever is not a linear map is one-dimensional.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in tables and not name.endswith("bias")
    }


def _path(name: str) -> list[str]:
    return name.removesuffix(".weight").split(".")


def residual_outputs(model: LanguageModel) -> dict[str, nn.Parameter]:
    """The maps that write to the residual stream, the last of each branch: ``out`` and ``down``."""
    return {
        name: parameter
        for name, parameter in linear_maps(model).items()
        if name.startswith("blocks.") and _path(name)[-1] in RESIDUAL_OUTPUTS
    }


def residual_branches(model: LanguageModel) -> int:
    """How many branches add to the residual stream; a mixture of experts is one."""
    # blocks.INDEX.CHILD: what is below one child of a block is one branch
    return len({".".join(_path(name)[:3]) for name in residual_outputs(model)})
