"""What fine-tuning asks for: adapters, frozen parameters, learning rates by depth, noise on embeddings."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.lora import LoRA, add_adapters, check_patterns

if TYPE_CHECKING:
    from toolmem.models import LanguageModel

BLOCK = re.compile(r"^blocks\.(\d+)\.")
FIRST = ("embedding", "position_embedding", "embedding_norm")


def prepare(
    model: LanguageModel,
    lora: LoRA | None,
    frozen: tuple[str, ...],
    layer_lr_decay: float,
    neftune_alpha: float,
) -> None:
    """Make a model ready to be fine-tuned.

    Args:
        model: changed in place.
        lora: its adapters, or None.
        frozen: patterns of parameters that stay as they are.
        layer_lr_decay: to be checked; `decay_by_layer` sees to it.
        neftune_alpha: size of the noise on embedded tokens; 0 for none.

    Raises:
        ToolmemError: for what cannot be, naming the key.
    """
    if not 0 < layer_lr_decay <= 1:
        raise ToolmemError(
            f"model.layer_lr_decay is {layer_lr_decay}: it must be above 0 and at most 1 (off)"
        )
    if neftune_alpha < 0:
        raise ToolmemError(f"model.neftune_alpha is {neftune_alpha}: it must be 0 (off) or more")
    if lora is not None:
        add_adapters(model, lora)
    freeze(model, frozen)
    if neftune_alpha:
        model.embedding.register_forward_hook(NoisyEmbedding(neftune_alpha))


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let parameters stay as they are in training.

    Args:
        model: changed in place.
        patterns: regular expressions; a parameter that has one of them in its name is frozen.

    Raises:
        ToolmemError: for a pattern that is in no parameter's name, or when nothing is left to train.
    """
    check_patterns(patterns, "model.freeze")
    names = dict(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ToolmemError(
                f"model.freeze: no parameter has {pattern!r} in its name; there are "
                f"{', '.join(list(names)[:6])}, ..."
            )
        for name in found:
            names[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in names.values()):
        raise ToolmemError(f"model.freeze: {list(patterns)} leave nothing to train: name less")


def depth(name: str, n_layers: int) -> int:
    """How deep a parameter is: 0 for embeddings, 1 for the first block, n_layers + 1 for norm and head."""
    block = BLOCK.match(name)
    if block is not None:
        return int(block[1]) + 1
    return 0 if name.partition(".")[0] in FIRST else n_layers + 1


def decay_by_layer(
    optimizer: torch.optim.Optimizer, model: LanguageModel, decay: float
) -> torch.optim.Optimizer:
    """Give layers learning rates that fall towards the input (arXiv 1801.06146, 2003.10555).

    A parameter's rate is multiplied by ``decay`` once for each layer between it and the head. What weight
    decay takes off goes with the rate.

    Args:
        optimizer: without state yet, and before a schedule is built; its groups are parted.
        model: whose parameters it has.
        decay: 1 changes nothing.

    Returns:
        The optimizer.
    """
    if decay == 1:
        return optimizer
    n_layers = len(model.blocks)
    factors = {
        id(p): decay ** (n_layers + 1 - depth(name, n_layers))
        for name, p in model.named_parameters()
    }
    parted: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        members: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            members.setdefault(factors[id(parameter)], []).append(parameter)
        parted += [
            {**group, "params": some, "lr": group["lr"] * factor}
            for factor, some in members.items()
        ]
    optimizer.param_groups[:] = parted
    return optimizer


class NoisyEmbedding:
    """NEFTune (arXiv 2310.05914): uniform noise on the embedded tokens while training.

    Of size alpha / sqrt(seq * dim), drawn from torch's own random numbers.

    A forward hook of an embedding, at work while that is in training mode.

    Args:
        alpha: the size; the paper has 5 to 15.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha

    def __call__(self, embedding: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Any:
        """What the embedding gave, with noise."""
        if not embedding.training:
            return embedded
        size = self.alpha / math.sqrt(embedded.shape[-2] * embedded.shape[-1])
        return embedded + torch.empty_like(embedded).uniform_(-size, size)
