"""muP, the maximal update parametrisation (arXiv 2203.03466): one learning rate for every width.

A model is tuned at a base width (``mup_base_dim``) and built at another, r = dim / mup_base_dim times
as wide, of the same depth. All sizes inside (heads or their width, the feed-forward's width, ...) are
to grow with ``dim`` but the outputs of the maps that a module names in ``mup_fixed_outputs`` (the number
of experts that a router scores), the convolutions' width, and the size of a state.

| parameters                        | AdamW's rate x       | variance        | multiplier            |
|-----------------------------------|----------------------|-----------------|-----------------------|
| matrices, both sizes grow         | 1 / r                | 1 / fan_in      |                       |
| matrices, inputs alone grow       | 1 / r                | 1 / (r fan_in)  |                       |
| embeddings, vectors, filters      | 1                    | as at the base  |                       |
| an untied head                    | 1 / r                | 0               |                       |
| a tied head                       | 1, as the embedding  | as at the base  | 1 / r, of the logits  |
| attention                         |                      | queries 0       | 4 / head_dim          |

It is table 3 of the paper, and for a tied head table 8; the zeros are of its appendix D.2. With
``embedding_scale`` a table is multiplied by sqrt(dim), so its variance is divided by r, its rate and a
tied head's multiplier by sqrt(r). Attention's logits are divided by head_dim and not by its root, since
trained queries and keys are aligned; the 4 makes it the usual scale for heads of 16. At r = 1
everything but that is `scaled`.

Mamba's B and C come out of maps whose other outputs grow, and are drawn as those are, though they
themselves stay as wide as the state. By table 3 their variance would be 1 / (r fan_in): what a state
adds to the stream at the start would then vanish as 1 / r, and what training changes in B and C would
shrink with the width; drawn as matrices are, both stay (that table 3 fails here: Vankadara et al., On
feature learning in structured state space models, 2024). ``tests/models/test_mup.py`` measures it.

A rule for the rest follows from the spectral condition (arXiv 2310.17813): an update of a matrix shall
have a spectral norm that goes as sqrt(outputs / inputs). Muon's rates: ``toolmem.training.optimizers``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention, HeadMixing
from toolmem.models.linear_maps import linear_maps
from toolmem.models.mla import LatentAttention

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

ATTENTION_GAIN = 4.0


class Ratios(NamedTuple):
    """How many times larger than at the base width a matrix's sizes are."""

    outputs: float = 1.0
    inputs: float = 1.0


def base_width(model: LanguageModel) -> int:
    """The width at which ``model``'s learning rate was tuned."""
    assert model.mup_base_dim is not None
    return model.mup_base_dim


def check(initialization: str, mup_base_dim: int | None) -> None:
    """Refuse half of muP: its first weights without its base width, or the other way round.

    Raises:
        ToolmemError: naming the key to set.
    """
    if mup_base_dim is not None and mup_base_dim < 1:
        raise ToolmemError(f"mup_base_dim is {mup_base_dim}: it must be at least 1")
    if (initialization == "mup") != (mup_base_dim is not None):
        raise ToolmemError(
            f"initialization is {initialization} and mup_base_dim is {mup_base_dim}: `mup` needs "
            "mup_base_dim, the width (dim) at which the learning rate was tuned, and nothing else takes it"
        )


def parametrize(model: LanguageModel) -> None:
    """Set the multipliers of a model's forward pass: attention's scale and a tied head's."""
    ratio = model.dim / base_width(model)
    if model.tie_embeddings:
        model.logit_scale = 1 / math.sqrt(ratio) if model.scale != 1.0 else 1 / ratio
    for module in model.modules():
        if isinstance(module, HeadMixing):  # made with the scale 1 / sqrt(head_dim)
            module.scale = ATTENTION_GAIN * module.scale**2


def queries(model: LanguageModel) -> list[Tensor]:
    """The rows of projections that make attention's queries."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, Attention):
            found.append(module.qkv.weight[: module.n_heads * module.head_dim])
        elif isinstance(module, LatentAttention):
            of_latents = module.queries
            rows = module.compress.weight[: module.widths[0]]
            found.append(rows if of_latents is None else of_latents.weight)
    return found


def width_ratios(model: nn.Module) -> dict[str, Ratios]:
    """How each linear map's sizes have grown from the base width; empty for a model without muP.

    Returns:
        name of the parameter -> ratios. What it does not hold has not grown in a way that counts.
    """
    base = getattr(model, "mup_base_dim", None)
    if base is None:
        return {}
    ratio = model.dim / base
    maps = linear_maps(model)
    fixed = _fixed_outputs(model)
    assert fixed <= maps.keys(), f"no linear map of that name: {fixed - maps.keys()}"
    fixed |= {"head.weight"}
    return {name: Ratios(1.0 if name in fixed else ratio, ratio) for name in maps}


def _fixed_outputs(model: nn.Module) -> set[str]:
    """Full names of what modules name in ``mup_fixed_outputs``: their own parameters, or a child's weight."""
    names = set()
    for prefix, module in model.named_modules():
        for name in getattr(module, "mup_fixed_outputs", ()):
            child = getattr(module, name)
            full = f"{prefix}.{name}" if prefix else name
            names.add(f"{full}.weight" if isinstance(child, nn.Module) else full)
    return names


def adamw_scales(model: nn.Module) -> dict[str, float]:
    """What AdamW's learning rate is multiplied with, by parameter; 1 for those left out."""
    scales = {name: 1 / ratios.inputs for name, ratios in width_ratios(model).items()}
    if scales and model.scale != 1.0:
        scales["embedding.weight"] = math.sqrt(base_width(model) / model.dim)  # type: ignore[arg-type, operator]
    return scales
