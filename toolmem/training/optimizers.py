"""Optimizers as configuration: which parameter is trained by what, and which of them decay.

Three kinds of parameters are told apart:

==========  ==========================================================  ==================
kind        which                                                       decays
==========  ==========================================================  ==================
matrices    two or more dimensions, inside the model's stack of blocks  yes
tables      embeddings (a tied head is its embedding)                   ``decay_embeddings``
the rest    an untied head yes; norms, biases, vectors, short filters   only the head
==========  ==========================================================  ==================

Under muP (``toolmem.models.mup``) learning rates depend on the width too, r times the base's:

=====================================  =============================================
AdamW (arXiv 2203.03466, table 3)      1 / r where the inputs grow, else 1
Muon, ``adjust_lr: original``          1 where both sizes grow
Muon, ``adjust_lr: match_rms_adamw``   1 / sqrt(r) where both sizes grow
=====================================  =============================================

Muon's follow from the spectral condition (arXiv 2310.17813): an update's spectral norm shall go as
sqrt(outputs / inputs). An orthogonal update has the norm 1 at every width, which is right as it is;
``match_rms_adamw`` multiplies it by the root of the larger size, which has to be undone. Weight decay
is independent of all this: what a step takes off a weight, rate * decay, is the same at every width,
so the group's ``weight_decay`` is divided by what its rate is multiplied with. Rates transfer over
widths only with that (arXiv 2510.19093).
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models.mup import adamw_scales, width_ratios
from toolmem.training.muon import AdjustRate, MuonAdamW, rate_ratio


@dataclass(frozen=True)
class OptimizerConfig(ABC):
    """What an optimizer is to be; ``build`` makes it for a model.

    Args:
        lr: the highest learning rate; the schedule multiplies it.
        weight_decay: decoupled, a step takes lr * weight_decay off (arXiv 1711.05101).
        betas: AdamW's decay rates of its two averages.
        eps: AdamW's, added to the root of the second average.
        decay_embeddings: let embedding tables decay too.
        no_decay: regular expressions; what matches one anywhere in its name does not decay.
    """

    lr: float
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    decay_embeddings: bool = False
    no_decay: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ToolmemError(f"model.optimizer: lr is {self.lr}: it must be above 0")
        if not self.weight_decay >= 0:
            raise ToolmemError(
                f"model.optimizer: weight_decay is {self.weight_decay}: it must be 0 or more"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ToolmemError(
                f"model.optimizer: betas are {list(self.betas)}: each must be at least 0, below 1"
            )
        for pattern in self.no_decay:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ToolmemError(
                    f"model.optimizer: no_decay: {pattern!r} is no regular expression: {error}"
                ) from error
        momentum = getattr(self, "momentum", 0.0)
        if not 0 <= momentum < 1:
            raise ToolmemError(
                f"model.optimizer: momentum is {momentum}: it must be at least 0 and below 1"
            )

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of ``model``'s trainable parameters, every one in exactly one group."""

    def exempt(self, name: str) -> bool:
        """Is this parameter kept from decaying by name?"""
        return any(re.search(pattern, name) for pattern in self.no_decay)

    def adamw_groups(
        self,
        parameters: dict[str, nn.Parameter],
        tables: set[int],
        lr: float,
        scales: dict[str, float],
    ) -> list[dict[str, Any]]:
        """``parameters`` in groups of one learning rate that decay or do not."""

        def decays(name: str) -> bool:
            parameter = parameters[name]
            if self.exempt(name):
                return False
            return self.decay_embeddings if id(parameter) in tables else parameter.ndim >= 2

        return [
            group
            for decaying in (True, False)
            for group in self.groups_by_scale(
                {name: p for name, p in parameters.items() if decays(name) == decaying},
                lr,
                self.weight_decay if decaying else 0.0,
                scales,
            )
        ]

    def groups_by_scale(
        self,
        parameters: dict[str, nn.Parameter],
        lr: float,
        weight_decay: float,
        scales: dict[str, float],
    ) -> list[dict[str, Any]]:
        """``parameters`` in one group for each learning rate.

        Args:
            parameters: by name.
            lr: of a parameter whose scale is 1.
            weight_decay: of such a one; rate * decay is the same for all.
            scales: what the rate is multiplied with, by name; 1 for those left out.
        """
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(scales.get(name, 1.0), []).append(parameter)
        return [
            {"params": members, "lr": lr * scale, "weight_decay": weight_decay / scale}
            for scale, members in groups.items()
        ]


@dataclass(frozen=True)
class AdamW(OptimizerConfig):
    """AdamW (arXiv 1711.05101) for every parameter, as one fused kernel where there is one.

    Args:
        lr: the highest learning rate.
        weight_decay: decoupled; matrices only.
        betas: decay rates of the two averages.
        eps: added to the root of the second average.
        decay_embeddings: let embedding tables decay too.
        no_decay: regular expressions; what matches one anywhere in its name does not decay.
    """

    lr: float = 3e-3

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """AdamW over ``model``'s trainable parameters."""
        parameters = trainable(model)
        tables = embedding_tables(model)
        groups = self.adamw_groups(parameters, tables, self.lr, adamw_scales(model))
        optimizer = torch.optim.AdamW(
            groups,
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=can_fuse(parameters),
        )
        return unscaled_by_trainer(optimizer)


@dataclass(frozen=True)
class Muon(OptimizerConfig):
    """Muon for the matrices of the blocks, AdamW for embeddings, head, norms, vectors and short
    filters.

    Muon orthogonalises its momentum (https://kellerjordan.github.io/posts/muon/).

    Args:
        lr: the highest learning rate.
        weight_decay: decoupled; matrices only.
        betas: AdamW's decay rates.
        eps: AdamW's.
        decay_embeddings: let embedding tables decay too.
        no_decay: regular expressions; what matches one anywhere in its name does not decay.
        adamw_lr: the highest learning rate of AdamW's parameters; ``lr`` when None.
        momentum: Muon's.
        nesterov: Muon's momentum looks ahead.
        ns_steps: Newton-Schulz iterations.
        adjust_lr: how the rate depends on a matrix's shape: ``match_rms_adamw`` makes updates as
            large as AdamW's, so that both share one rate (arXiv 2502.16982); ``original`` is Muon's
            first.
        ns_dtype: what to iterate in; chosen by device when None (bfloat16 on GPUs that are fast at
            it, else float32).
        adamw_names: parameters of the blocks whose names contain one of these are AdamW's though
            they look like matrices.
    """

    lr: float = 1e-2
    adamw_lr: float | None = None
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr: AdjustRate = "match_rms_adamw"
    ns_dtype: Literal["float32", "bfloat16", "float64"] | None = None
    adamw_names: tuple[str, ...] = ("conv", "embedding")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """One optimizer that is Muon and AdamW, over ``model``'s trainable parameters."""
        tables = embedding_tables(model)
        inside = block_parameters(model)
        matrices: dict[str, nn.Parameter] = {}
        others: dict[str, nn.Parameter] = {}
        for name, parameter in trainable(model).items():
            is_matrix = (
                parameter.ndim >= 2
                and id(parameter) in inside
                and id(parameter) not in tables
                and not any(part in name for part in self.adamw_names)
            )
            (matrices if is_matrix else others)[name] = parameter
        adamw_lr = self.lr if self.adamw_lr is None else self.adamw_lr
        muons = [
            group
            for exempt, decay in ((False, self.weight_decay), (True, 0.0))
            for group in self.groups_by_scale(
                {name: p for name, p in matrices.items() if self.exempt(name) == exempt},
                self.lr,
                decay,
                muon_scales(model, self.adjust_lr),
            )
        ]
        rest = self.adamw_groups(others, tables, adamw_lr, adamw_scales(model))
        groups = [{"kind": "muon", **group} for group in muons]
        groups += [{"kind": "adamw", **group} for group in rest]
        return MuonAdamW(
            groups,
            self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            steps=self.ns_steps,
            adjust=self.adjust_lr,
            dtype=None if self.ns_dtype is None else getattr(torch, self.ns_dtype),
            betas=self.betas,
            eps=self.eps,
            fused=can_fuse(others),
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name, a shared one once.

    Raises:
        ToolmemError: when there is none.
    """
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ToolmemError("the model has no trainable parameter: nothing can be trained")
    return found


def embedding_tables(model: nn.Module) -> set[int]:
    """Ids of the parameters that are embedding tables."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }


def block_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that live in a list of layers."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential)
        for parameter in module.parameters()
    }


def muon_scales(model: nn.Module, adjust: AdjustRate) -> dict[str, float]:
    """What Muon's learning rate is multiplied with under muP, by matrix; none without muP.

    The norm that an update should have, against the norm that ``rate_ratio`` gives it, both relative
    to the same matrix at the base width.
    """
    scales = {}
    for name, ratios in width_ratios(model).items():
        outputs, inputs = model.get_parameter(name).shape[-2:]
        given = rate_ratio((outputs, inputs), adjust) / rate_ratio(
            (outputs / ratios.outputs, inputs / ratios.inputs), adjust
        )
        # rounded, so that equal scales make one group
        scales[name] = round(math.sqrt(ratios.outputs / ratios.inputs) / given, 12)
    return scales


def can_fuse(parameters: dict[str, nn.Parameter]) -> bool:
    """Has this torch a fused AdamW kernel for all of them?"""
    return bool(parameters) and all(
        parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
        for parameter in parameters.values()
    )


def unscaled_by_trainer(optimizer: Any) -> Any:
    """Let the trainer undo float16's loss scale before the step, as for an optimizer that is not
    fused.

    A fused AdamW offers to do it itself, inside its step: then gradients could not be clipped
    before.
    """
    optimizer._step_supports_amp_scaling = False
    return optimizer
