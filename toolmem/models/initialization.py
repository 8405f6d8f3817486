"""Named schemes for a model's first weights.

| scheme          | matrices                | ends of branches | embeddings             | head        |
|-----------------|-------------------------|------------------|------------------------|-------------|
| `scaled`        | 1 / fan_in              | that / branches  | 1 (tied: 1 / dim)      | 1 / dim     |
| `gpt2`          | 0.02²                   | that / branches  | 0.02²                  | 0.02²       |
| `llama`         | 0.02², cut at 3σ        | as matrices      | as matrices            | as matrices |
| `xavier`        | 2 / (fan_in + fan_out)  | as matrices      | as `scaled`            | as matrices |
| `kaiming`       | 2 / fan_in              | as matrices      | as `scaled`            | 1 / dim     |
| `orthogonal`    | orthogonal, 1 / fan_in  | that / branches  | as `scaled`            | as matrices |
| `small_init`    | 2 / (5 dim)             | as matrices      | as matrices            | as matrices |
| `zero_residual` | 1 / fan_in              | 0                | as `scaled`            | 1 / dim     |
| `mup`           | 1 / fan_in, and see     | that / branches  | `scaled` of base width | 0           |

Entries are variances of a distribution around 0 that is normal unless said otherwise. Matrices are
all linear maps, stacks of experts' slice by slice. A branch ends in the matrix that writes to the
residual stream (named ``out`` or ``down``); a Transformer has 2 n_layers branches. Biases start at
0, gains of norms at 1, taps of short convolutions at 0 (the identity). What else a module has (decay
rates, step sizes) it sets in its constructor, or, where a scheme would overwrite it, in a method
``after_initialization()``, called when the scheme has run.

`scaled` is the default: a standard deviation of 0.02 is made for wide models and leaves every
branch of a model of dim 16 nearly silent (1/sqrt(16) is 0.25).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models import mup as mup_rules
from toolmem.models.linear_maps import linear_maps, residual_branches, residual_outputs

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


def _tables(model: LanguageModel) -> list[Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def _normal(weights: Iterable[Tensor], variance: Callable[[Tensor], float]) -> None:
    for weight in weights:
        nn.init.normal_(weight, std=math.sqrt(variance(weight)))


def _one_over_fan_in(weight: Tensor) -> float:
    return 1 / weight.shape[-1]


def _maps_and_tables(
    model: LanguageModel, dim: int, draw: Callable[[str, Tensor], object] | None = None
) -> None:
    """Linear maps by ``draw`` (variance 1 / fan_in when None); tables as ``scaled`` has them in a model
    of width ``dim``.
    """
    _normal(_tables(model), lambda table: 1 / dim)
    for name, weight in linear_maps(model).items():
        if draw is None:
            _normal([weight], _one_over_fan_in)
        else:
            draw(name, weight)
    # Again, and last: so the seeds that recipes were tried with give the weights they always gave.
    embedding = 1 / math.sqrt(dim) if model.tie_embeddings else 1.0
    nn.init.normal_(model.embedding.weight, std=embedding)


def _shrink_residual_outputs(model: LanguageModel) -> None:
    """Keep the residual stream's variance at the end from growing with depth (GPT-2)."""
    outputs = residual_outputs(model)
    for weight in outputs.values():
        weight.mul_(1 / math.sqrt(residual_branches(model)))


def scaled(model: LanguageModel) -> None:
    """Unit-variance activations at every width: LeCun's rule, with GPT-2's ends of branches.

    | parameters       | variance                                        |
    |------------------|-------------------------------------------------|
    | matrices, head   | 1 / fan_in                                      |
    | ends of branches | 1 / (fan_in branches)                           |
    | embedding        | 1, or 1 / dim where it is also the head         |
    | positions        | 1 / dim                                         |
    """
    _maps_and_tables(model, model.dim)
    _shrink_residual_outputs(model)


def gpt2(model: LanguageModel) -> None:
    """GPT-2's: 0.02 everywhere, ends of branches shrunk by depth.

    | parameters                   | variance         |
    |------------------------------|------------------|
    | matrices, head, embeddings   | 0.02²            |
    | ends of branches             | 0.02² / branches |
    """
    _normal([*_tables(model), *linear_maps(model).values()], lambda weight: 0.02**2)
    _shrink_residual_outputs(model)


def llama(model: LanguageModel) -> None:
    """A truncated normal of 0.02 everywhere: Llama's width of 0.02, cut at three of them (OLMo 2,
    arXiv 2501.00656).

    | parameters                                     | distribution                       |
    |------------------------------------------------|------------------------------------|
    | matrices, ends of branches, head, embeddings   | N(0, 0.02²), cut to [-0.06, 0.06]  |
    """
    for weight in [*_tables(model), *linear_maps(model).values()]:
        nn.init.trunc_normal_(weight, std=0.02, a=-0.06, b=0.06)


def xavier(model: LanguageModel) -> None:
    """Between keeping the variance of activations and of gradients (Glorot and Bengio, 2010).

    | parameters                       | variance               |
    |----------------------------------|------------------------|
    | matrices, ends of branches, head | 2 / (fan_in + fan_out) |
    | embeddings                       | as ``scaled``          |

    Projections that are one matrix here (query, key and value; the gated feed-forward's two inputs)
    count as one.
    """

    def draw(name: str, weight: Tensor) -> None:
        nn.init.normal_(weight, std=math.sqrt(2 / (weight.shape[-1] + weight.shape[-2])))

    _maps_and_tables(model, model.dim, draw)


def kaiming(model: LanguageModel) -> None:
    """Keeps the variance of activations through rectifiers (arXiv 1502.01852).

    | parameters                 | variance                            |
    |----------------------------|-------------------------------------|
    | matrices, ends of branches | 2 / fan_in                          |
    | head                       | 1 / dim: no rectifier is before it  |
    | embeddings                 | as ``scaled``                       |
    """

    def draw(name: str, weight: Tensor) -> None:
        gain = 1 if weight is model.head.weight else 2
        nn.init.normal_(weight, std=math.sqrt(gain / weight.shape[-1]))

    _maps_and_tables(model, model.dim, draw)


def orthogonal(model: LanguageModel) -> None:
    """Matrices whose singular values are all the same (arXiv 1312.6120).

    | parameters       | distribution                                                      |
    |------------------|-------------------------------------------------------------------|
    | matrices, head   | orthonormal rows or columns, times sqrt(max(1, fan_out / fan_in)) |
    | ends of branches | that / sqrt(branches)                                             |
    | embeddings       | as ``scaled``                                                     |

    The factor makes the mean square of entries 1 / fan_in, as ``scaled`` has it, for tall matrices
    too.
    """

    def draw(name: str, weight: Tensor) -> None:
        outputs, inputs = weight.shape[-2:]
        for matrix in weight.view(-1, outputs, inputs):
            nn.init.orthogonal_(matrix, gain=math.sqrt(max(1, outputs / inputs)))

    _maps_and_tables(model, model.dim, draw)
    _shrink_residual_outputs(model)


def small_init(model: LanguageModel) -> None:
    """SmallInit (arXiv 1910.05895): every matrix as Xavier would draw one from dim to 4 dim.

    | parameters                                   | variance    |
    |----------------------------------------------|-------------|
    | matrices, ends of branches, head, embeddings | 2 / (5 dim) |
    """
    _normal([*_tables(model), *linear_maps(model).values()], lambda weight: 2 / (5 * model.dim))


def zero_residual(model: LanguageModel) -> None:
    """Branches that add nothing at first: every block is the identity (arXiv 1901.09321).

    | parameters       | variance               |
    |------------------|------------------------|
    | matrices, head   | 1 / fan_in             |
    | ends of branches | 0                      |
    | embeddings       | as ``scaled``          |

    A branch with a norm behind it (``sandwich_norm``) is zero too.
    """
    scaled(model)
    for weight in residual_outputs(model).values():
        nn.init.zeros_(weight)


def mup(model: LanguageModel) -> None:
    """muP, the maximal update parametrisation (arXiv 2203.03466): as ``scaled`` at the base width.

    With r = dim / mup_base_dim:

    | parameters                      | variance                       |
    |---------------------------------|--------------------------------|
    | matrices, both sizes grow       | 1 / fan_in                     |
    | matrices, inputs alone grow     | 1 / (r fan_in)                 |
    | ends of branches                | 1 / (fan_in branches)          |
    | queries, untied head            | 0 (appendix D.2)               |
    | embedding                       | 1, or 1 / mup_base_dim if tied |
    | positions                       | 1 / mup_base_dim               |

    A table that is multiplied by sqrt(dim) (``embedding_scale``) has 1 / r of that. Queries and head
    start at 0 because random ones would give logits that shrink with the width, and what the first
    steps do would depend on it. Learning rates and multipliers: ``toolmem.models.mup``.
    """
    base, ratios = mup_rules.base_width(model), mup_rules.width_ratios(model)

    def draw(name: str, weight: Tensor) -> None:
        outputs, inputs = ratios[name]
        nn.init.normal_(weight, std=math.sqrt(min(1.0, outputs / inputs) / weight.shape[-1]))

    _maps_and_tables(model, base, draw)
    if model.scale != 1.0:
        model.embedding.weight.mul_(math.sqrt(base / model.dim))
    if not model.tie_embeddings:
        nn.init.zeros_(model.head.weight)
    for queries in mup_rules.queries(model):
        nn.init.zeros_(queries)
    _shrink_residual_outputs(model)


SCHEMES: dict[str, Callable[[LanguageModel], None]] = {
    scheme.__name__: scheme
    for scheme in (
        scaled, gpt2, llama, xavier, kaiming, orthogonal, small_init, zero_residual, mup,
    )
}  # fmt: skip


@torch.no_grad()
def initialize(model: LanguageModel, scheme: str) -> None:
    """Give ``model`` its first weights by a named scheme, drawn from torch's global generator.

    Afterwards each module's ``after_initialization()`` is called, where it has one.

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
    for module in model.modules():
        if hasattr(module, "after_initialization"):
            module.after_initialization()  # type: ignore[operator]
