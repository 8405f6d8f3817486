"""Named schemes for a model's first weights.

| scheme   | matrices      | ends of branches   | embedding tied / untied | head        |
|----------|---------------|--------------------|-------------------------|-------------|
| `scaled` | 1 / fan_in    | that / (2 n_layers)| 1 / dim, 1              | 1 / dim     |
| `gpt2`   | 0.02²         | that / (2 n_layers)| 0.02²                   | 0.02²       |
| `llama`  | 0.02², cut 3σ | as matrices        | as matrices             | as matrices |

Entries are variances of a normal distribution around 0; a branch ends in the matrix that writes to
the residual stream, and there are 2 n_layers branches. Biases start at 0, gains of norms at 1, taps
of short convolutions at 0 (the identity). `scaled` is the default: a standard deviation of 0.02 is
made for wide models and leaves every branch of a model of dim 16 nearly silent (1/sqrt(16) is
0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


def residual_outputs(model: LanguageModel) -> list[nn.Linear]:
    """The projections that write to the residual stream: the last of each branch."""
    names = ("out", "down")
    return [
        module
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in names
    ]


def _shrink_residual_outputs(model: LanguageModel) -> None:
    """Keep the residual stream's variance at the end from growing with depth (GPT-2)."""
    outputs = residual_outputs(model)
    for module in outputs:
        module.weight.mul_(1 / math.sqrt(len(outputs)))


def scaled(model: LanguageModel) -> None:
    """Unit-variance activations at every width."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1 / math.sqrt(model.dim))
    if not model.tie_embeddings:
        nn.init.normal_(model.embedding.weight, std=1.0)
    _shrink_residual_outputs(model)


def gpt2(model: LanguageModel) -> None:
    """GPT-2's: 0.02 everywhere, residual branches shrunk by depth."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    _shrink_residual_outputs(model)


def llama(model: LanguageModel) -> None:
    """Llama's as torchtitan has it: truncated normal of 0.02 everywhere."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.trunc_normal_(module.weight, std=0.02, a=-0.06, b=0.06)


SCHEMES: dict[str, Callable[[LanguageModel], None]] = {
    "scaled": scaled,
    "gpt2": gpt2,
    "llama": llama,
}


@torch.no_grad()
def initialize(model: LanguageModel, scheme: str) -> None:
    """Give ``model`` its first weights by a named scheme, drawn from torch's global generator.

    Raises:
        ToolmemError: for an unknown name.
    """
    if scheme not in SCHEMES:
        raise ToolmemError(f"initialization: unknown {scheme!r}; choose {', '.join(SCHEMES)}")
    for module in model.modules():
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear) and bias is not None:
            nn.init.zeros_(bias)
    SCHEMES[scheme](model)
