"""Low-rank adapters, applied to a model from outside: a linear map W becomes W + s B A; A and B alone train.

LoRA (arXiv 2106.09685) with s = alpha / rank; rank-stabilised (2312.03732) with s = alpha / sqrt(rank); DoRA
(2402.09353), which also trains the length of every row: m (W + s B A) / |W + s B A|, the lengths below held
fixed in the backward pass, as the paper has it.

A layer keeps its name and its weight's (``blocks.0.mixer.qkv.weight``), and takes ``lora_a`` (rank, inputs),
``lora_b`` (outputs, rank) and, of DoRA, ``lora_m`` (outputs). B starts at zero, so nothing changes at first.
What projects several things at once (query, key and value) has one A for them all.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError

A, B, M = "lora_a", "lora_b", "lora_m"
PARTS = (A, B, M)


@dataclass(frozen=True)
class LoRA:
    """Adapters for a model's linear maps; all else is frozen.

    Args:
        rank: of the matrices A and B.
        alpha: B A is multiplied by alpha / rank.
        targets: regular expressions; a linear layer whose name has one of them in it gets an adapter.
        rank_stabilized: multiply by alpha / sqrt(rank) instead.
        dora: train the lengths of the rows apart from their directions.
        dropout: probability, on what A reads.

    Raises:
        ToolmemError: for values that cannot be.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = (r"^blocks\.",)
    rank_stabilized: bool = False
    dora: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ToolmemError(f"model.lora.rank is {self.rank}: it must be at least 1")
        if not self.alpha > 0:
            raise ToolmemError(f"model.lora.alpha is {self.alpha}: it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ToolmemError(
                f"model.lora.dropout is {self.dropout}: it must be at least 0 and below 1"
            )
        check_patterns(self.targets, "model.lora.targets")

    @property
    def scale(self) -> float:
        """What B A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def plain(self) -> dict[str, Any]:
        """As plain data, for checkpoints."""
        return {**asdict(self), "targets": list(self.targets)}


def check_patterns(patterns: tuple[str, ...], key: str) -> None:
    """Refuse what is no regular expression.

    Args:
        patterns: to be checked.
        key: where they stand, for messages.

    Raises:
        ToolmemError: naming the pattern.
    """
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ToolmemError(f"{key}: {pattern!r} is no regular expression: {error}") from error


class LoRALinear(nn.Linear):
    """``nn.Linear`` with an adapter. Made by `add_adapters` of a layer that is there, never by itself."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_m: nn.Parameter | None
    lora_scale: float
    lora_dropout: float
    lora_factor: Tensor | None  # of a merged DoRA layer: what its rows were multiplied by

    def forward(self, input: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        if self.merged:
            return F.linear(input, self.weight, self.bias)
        read = F.dropout(input, self.lora_dropout, self.training) if self.lora_dropout else input
        change = F.linear(F.linear(read, self.lora_a), self.lora_b)
        if self.lora_m is None:
            return torch.add(F.linear(input, self.weight, self.bias), change, alpha=self.lora_scale)
        change = torch.add(F.linear(input, self.weight), change, alpha=self.lora_scale)
        change = change * (self.lora_m / self.lengths()).to(change.dtype)
        return change if self.bias is None else change + self.bias

    @property
    def merged(self) -> bool:
        """Does ``weight`` hold the adapter already?"""
        return self.lora_factor is not None

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """|W + s B A| of every row."""
        with torch.autocast(self.weight.device.type, enabled=False):
            whole = torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.lora_scale)
            return torch.linalg.vector_norm(whole, dim=1)

    @torch.no_grad()
    def start(self) -> None:
        """A random as ``nn.Linear`` has its weight, B zero, rows as long as they are."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)
        if self.lora_m is not None:
            self.lora_m.copy_(self.lengths())


def targets_of(model: nn.Module, how: LoRA) -> dict[str, nn.Linear]:
    """The linear layers that get an adapter, by name.

    Raises:
        ToolmemError: for a pattern that is in no layer's name, and for a head that is the embedding.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for pattern in how.targets:
        if not any(re.search(pattern, name) for name in layers):
            some = ", ".join(list(layers)[:6])
            raise ToolmemError(
                f"model.lora.targets: no linear layer has {pattern!r} in its name; there are {some}, ..."
            )
    found = {
        name: layer
        for name, layer in layers.items()
        if any(re.search(pattern, name) for pattern in how.targets)
    }
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, layer in found.items():
        if id(layer.weight) in tables:
            raise ToolmemError(
                f"model.lora.targets: {name} is the embedding (tie_embeddings), which no adapter changes: "
                "leave it out"
            )
        if type(layer) is not nn.Linear:
            raise ToolmemError(
                f"model.lora: {name} is a {type(layer).__name__} already: give adapters to a plain model"
            )
    return found


def add_adapters(model: nn.Module, how: LoRA) -> list[str]:
    """Give a model's layers adapters, and freeze all else.

    Args:
        model: changed in place; what it computes stays the same at first.
        how: which layers, and what kind.

    Returns:
        Names of the layers.

    Raises:
        ToolmemError: naming a pattern, or a layer that cannot have one.
    """
    found = targets_of(model, how)
    model.requires_grad_(False)
    for layer in found.values():
        weight = layer.weight
        layer.__class__ = LoRALinear
        assert isinstance(layer, LoRALinear)
        for name, shape in (
            (A, (how.rank, layer.in_features)),
            (B, (layer.out_features, how.rank)),
            (M, (layer.out_features,)),
        ):
            new = nn.Parameter(weight.new_empty(shape)) if name != M or how.dora else None
            layer.register_parameter(name, new)
        layer.lora_scale, layer.lora_dropout, layer.lora_factor = how.scale, how.dropout, None
        layer.start()
    return list(found)


def adapted(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers that have adapters, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def is_adapter(name: str) -> bool:
    """Is this the name of an adapter's parameter?"""
    return name.rpartition(".")[2] in PARTS


def start_adapters(model: nn.Module) -> None:
    """Let adapters begin anew: after a model was given other weights."""
    for layer in adapted(model).values():
        layer.start()


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Put adapters into the weights, for the speed of a plain model; `unmerge_adapters` takes them out."""
    for layer in adapted(model).values():
        if not layer.merged:
            merged, factor = _merged(
                layer.weight, layer.lora_a, layer.lora_b, layer.lora_m, layer.lora_scale
            )
            layer.weight.copy_(merged)
            layer.lora_factor = factor


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> None:
    """Take adapters out of the weights again; equal to what they were to rounding."""
    for layer in adapted(model).values():
        if layer.lora_factor is not None:
            change = layer.lora_scale * (layer.lora_b.double() @ layer.lora_a.double())
            layer.weight.copy_(layer.weight.double() / layer.lora_factor[:, None] - change)
            layer.lora_factor = None


def _merged(
    weight: Tensor, a: Tensor, b: Tensor, m: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """The merged weight, and what DoRA multiplied its rows by (else ones); in float64."""
    whole = weight.double() + scale * (b.double() @ a.double())
    if m is None:
        return whole, whole.new_ones(len(whole))
    factor = m.double() / torch.linalg.vector_norm(whole, dim=1)
    return whole * factor[:, None], factor


@torch.no_grad()
def merged_weights(weights: Mapping[str, Tensor], spec: Mapping[str, Any]) -> dict[str, Tensor]:
    """A model's weights with its adapters put into them: those of a plain model.

    Args:
        weights: by name, adapters among them.
        spec: `LoRA.plain` of the adapters.

    Raises:
        ToolmemError: for adapters that lack a part, or do not fit, naming the layer.
    """
    how = LoRA(**{**spec, "targets": tuple(spec["targets"])})
    found = {name: value for name, value in weights.items() if not is_adapter(name)}
    for name, a in weights.items():
        layer, _, part = name.rpartition(".")
        if part != A:
            continue
        weight, b = (weights.get(f"{layer}.{one}") for one in ("weight", B))
        m = weights.get(f"{layer}.{M}")
        fits = (
            weight is not None
            and b is not None
            and (m is not None) == how.dora
            and (len(b), a.shape[1]) == tuple(weight.shape)
            and b.shape[1] == len(a) == how.rank
        )
        if not fits:
            raise ToolmemError(
                f"the adapter of {layer} does not fit: the file was edited; use another"
            )
        assert weight is not None and b is not None
        found[f"{layer}.weight"] = _merged(weight, a, b, m, how.scale)[0].to(weight.dtype)
    return found
