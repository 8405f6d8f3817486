"""A model that is split over ranks, made once more as it was before."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule

from toolmem.models import LanguageModel
from toolmem.training.parallel.layout import whole


def class_of(model: LanguageModel) -> type[LanguageModel]:
    """The class of a model; FSDP2 gives it one of its own, made from that."""
    kind = type(model)
    return kind.__bases__[1] if isinstance(model, FSDPModule) else kind


def shapes_of(model: LanguageModel) -> LanguageModel:
    """The same model on the meta device: shapes, no numbers."""
    with torch.device("meta"):
        twin = class_of(model)(**model.init_args).to(model.embedding.weight.dtype)
    for name, parameter in model.named_parameters():
        twin.get_parameter(name).requires_grad_(parameter.requires_grad)
    return twin


def gathered_model(model: LanguageModel, keep: bool) -> LanguageModel | None:
    """The same model with all of its weights; every rank must call it.

    Args:
        model: split over ranks.
        keep: make it on this rank; else only help those that do.

    Returns:
        the model, in evaluation mode, on the device of ``model``; None where it is not kept.
    """
    state = model.state_dict()
    weights: dict[str, torch.Tensor] = {}
    for name in list(state):
        value = whole(state.pop(name))
        if keep:
            weights[name] = value
    if not keep:
        return None
    with torch.random.fork_rng(devices=[]):
        twin = class_of(model)(**model.init_args)
    device, dtype = model.embedding.weight.device, model.embedding.weight.dtype
    twin.attention_kernel = model.attention_kernel
    twin.load_state_dict(weights)
    return twin.to(device, dtype).eval()
