"""Which part of each module a rank of a tensor-parallel group works out.

    attention (GQA)         heads                       two sums a layer and direction, with that of
    latent attention        heads; latents on all       the feed-forward
    feed-forward            hidden units
    mixture of experts      experts; router on all
    Mamba-1                 inner channels              one sum more, of what makes dt, B and C
    Mamba-2                 heads and their groups; B and C of a single group on all, and then the sum of
                            squares of the norm
    minGRU, minLSTM         channels of the state
    RG-LRU                  blocks of the gates, and their channels
    linear attention        heads
    LSTM, GRU, and mixers
    that are not ours       nothing: every rank does all of it
    embedding, head         tokens of the vocabulary, where they divide; else nothing

The first matrices of a split branch are cut by rows (outputs), the last one by columns (inputs), so that
what comes out is a part of a sum (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, singledispatch
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention
from toolmem.models.layers import FeedForward
from toolmem.models.linear_attention import GatedDeltaNet, GatedLinearAttention
from toolmem.models.mamba import Mamba1Mixer
from toolmem.models.mamba2 import GatedRMSNorm, Mamba2Mixer
from toolmem.models.mla import LatentAttention
from toolmem.models.moe import MixtureOfExperts
from toolmem.models.rnn import RGLRU, MinGRU, MinLSTM
from toolmem.training.parallel.collectives import pass_on
from toolmem.training.parallel.experts import spread_experts
from toolmem.training.parallel.layout import row_order
from toolmem.training.parallel.regions import Cut

SHARED = Cut(use="shared")
COLUMNS = Cut(dim=1)


@dataclass
class Plan:
    """What becomes of a branch.

    Args:
        cuts: by name of the parameter; those left out stay whole, and every rank does the same with them.
        sizes: by dotted name of an attribute, what it is on one rank.
        finish: what else is done, given the group.
        split: the branch is a part of a sum on each rank.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    sizes: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    finish: list[Callable[[ProcessGroup], Any]] = field(default_factory=list)
    split: bool = True


class Sharing:
    """One rank's share.

    Args:
        rank: of this process in the tensor-parallel group.
        size: number of ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size

    def of(self, value: int, key: str) -> int:
        """A rank's share of ``value`` things.

        Raises:
            ToolmemError: when they cannot be shared evenly, naming ``key``.
        """
        if value % self.size:
            raise ToolmemError(
                f"tensor_parallel_size {self.size} does not divide {key}, {value}: change "
                f"model.model.init_args ({key}) or "
                "trainer.strategy.init_args.tensor_parallel_size"
            )
        return value // self.size

    def rows(self, *segments: int, times: int = 1) -> Cut:
        """Cut by rows a stack of matrices, itself repeated ``times``."""
        return Cut(dim=0, order=row_order(segments * times, self.size))

    def picked(self, *segments: tuple[int, bool]) -> Cut:
        """Keep all rows; compute with the own share of each segment that is split, and all of the others.

        Args:
            segments: rows, and whether they are split.
        """
        found, start = [], 0
        for length, split in segments:
            share = length // self.size if split else length
            first = start + (self.rank * share if split else 0)
            found.append(torch.arange(first, first + share))
            start += length
        return Cut(use="shared", rows=torch.cat(found))


def linear(
    name: str, module: nn.Linear | None, cut: Cut, bias: Cut | None = None
) -> dict[str, Cut]:
    """Cuts of a linear map's parameters; nothing where there is no such map."""
    if module is None:
        return {}
    cuts = {f"{name}.weight": cut}
    if module.bias is not None:
        cuts[f"{name}.bias"] = cut if bias is None else bias
    return cuts


def last(name: str, module: nn.Linear) -> dict[str, Cut]:
    """Cuts of the last map of a branch, whose outputs are summed over ranks."""
    return linear(name, module, COLUMNS, Cut(use="added"))


@singledispatch
def plan_of(module: nn.Module, sharing: Sharing) -> Plan:
    """What becomes of a branch on one rank; of a module that is not known, nothing.

    Args:
        module: a mixer or a feed-forward.
        sharing: the rank's share.

    Raises:
        ToolmemError: for what cannot be shared evenly, naming the key.
    """
    return Plan(split=False)


@plan_of.register
def _(module: Attention, sharing: Sharing) -> Plan:
    d = module.head_dim
    h, k = sharing.of(module.n_heads, "n_heads"), sharing.of(module.n_kv_heads, "n_kv_heads")
    segments = (module.n_heads * d, module.n_kv_heads * d, module.n_kv_heads * d)
    plan = Plan(
        {
            **linear("qkv", module.qkv, sharing.rows(*segments)),
            **last("out", module.out),
            "q_norm.weight": SHARED,
            "k_norm.weight": SHARED,
            "value_mix": SHARED,
        },
        {"n_heads": h, "n_kv_heads": k},
    )
    if module.conv is not None:
        plan.cuts["conv.taps"] = sharing.rows(*segments, times=module.conv.width)
        plan.sizes["conv.channels"] = (h + 2 * k) * d
    return plan


@plan_of.register
def _(module: LatentAttention, sharing: Sharing) -> Plan:
    h = sharing.of(module.n_heads, "n_heads")
    of_queries, of_latents, of_rope = module.widths
    heads = module.queries is None  # else the first rows are a latent, which every rank needs
    segments = ((of_queries, heads), (of_latents, False), (of_rope, False))
    widths = (of_queries // sharing.size if heads else of_queries, of_latents, of_rope)
    every = sharing.rows(module.n_heads)  # heads follow each other
    plan = Plan(
        {
            **linear("compress", module.compress, sharing.picked(*segments)),
            **linear("queries", module.queries, every),
            **linear("keys_values", module.keys_values, every),
            **last("out", module.out),
            "q_norm.weight": SHARED,
            "kv_norm.weight": SHARED,
        },
        {"n_heads": h, "widths": widths},
    )
    if module.conv is not None:
        plan.cuts["conv.taps"] = sharing.picked(*segments * module.conv.width)
        plan.sizes["conv.channels"] = sum(widths)
    return plan


@plan_of.register
def _(module: FeedForward, sharing: Sharing) -> Plan:
    hidden = module.down.in_features
    sharing.of(hidden, "hidden_dim")
    segments = (hidden,) * (module.up.out_features // hidden)
    return Plan({**linear("up", module.up, sharing.rows(*segments)), **last("down", module.down)})


@plan_of.register
def _(module: MixtureOfExperts, sharing: Sharing) -> Plan:
    sharing.of(module.n_experts, "n_experts")
    experts = sharing.rows(module.n_experts)
    plan = Plan({"up.weight": experts, "down.weight": experts})
    if module.shared is not None:
        shared = plan_of(module.shared, sharing)
        plan.cuts |= {f"shared.{name}": cut for name, cut in shared.cuts.items()}
    plan.finish.append(partial(spread_experts, module))
    return plan


@plan_of.register
def _(module: Mamba1Mixer, sharing: Sharing) -> Plan:
    inner = module.inner
    share = sharing.of(inner, "expand * dim")
    own = sharing.rows(inner)

    def add_up(group: ProcessGroup) -> None:
        module.x_proj.register_forward_hook(lambda _, args, y: pass_on(y, group))

    return Plan(
        {
            **linear("in_proj", module.in_proj, sharing.rows(inner, inner)),
            "conv.taps": sharing.rows(*[inner] * module.conv.width),
            "conv_bias": own,
            "x_proj.weight": COLUMNS,
            "dt_proj.weight": own,
            "dt_bias": own,
            "A_log": sharing.rows(*[inner] * module.state_dim),
            "D": own,
            **last("out", module.out),
        },
        {"inner": share, "conv.channels": share},
        [add_up],
    )


@plan_of.register
def _(module: Mamba2Mixer, sharing: Sharing) -> Plan:
    inner, shared, heads = module.inner, module.shared, module.n_heads
    h = sharing.of(heads, "expand * dim / head_dim, its heads")
    single = module.n_groups == 1  # B and C serve all heads, so that every rank needs all of them
    groups = 1 if single else sharing.of(module.n_groups, "n_groups")
    share = inner // sharing.size
    of_groups = groups * module.state_dim
    if single:
        projected = sharing.picked(
            (inner, True), (inner, True), (shared, False), (shared, False), (heads, True)
        )
        convolved = ((inner, True), (shared, False), (shared, False))
        taps, bias = sharing.picked(*convolved * module.conv.width), sharing.picked(*convolved)
    else:
        projected = sharing.rows(inner, inner, shared, shared, heads)
        taps = sharing.rows(inner, shared, shared, times=module.conv.width)
        bias = sharing.rows(inner, shared, shared)
    return Plan(
        {
            **linear("in_proj", module.in_proj, projected),
            "conv.taps": taps,
            "conv_bias": bias,
            "dt_bias": sharing.rows(heads),
            "A_log": sharing.rows(heads),
            "D": sharing.rows(heads),
            "norm.weight": sharing.rows(inner),
            **last("out", module.out),
        },
        {
            "inner": share,
            "n_heads": h,
            "n_groups": groups,
            "shared": of_groups,
            "conv.channels": share + 2 * of_groups,
            "norm.n_groups": groups,
        },
        [partial(_norm_over_ranks, module.norm, inner)] if single else [],
    )


def _norm_over_ranks(norm: GatedRMSNorm, channels: int, group: ProcessGroup) -> None:
    """Let a norm of one group of channels take the mean over those of all ranks."""

    def forward(x: Tensor, gate: Tensor) -> Tensor:
        x = x * F.silu(gate)
        squares = pass_on(x.square().sum(-1, keepdim=True), group)
        return x * torch.rsqrt(squares / channels + norm.eps) * norm.weight

    norm.forward = forward  # type: ignore[method-assign]


@plan_of.register(MinGRU)
@plan_of.register(MinLSTM)
def _(module: MinGRU | MinLSTM, sharing: Sharing) -> Plan:
    share = sharing.of(module.width, "width")
    segments = (module.width,) * (module.gates.out_features // module.width)
    return Plan(
        {
            **linear("gates", module.gates, sharing.rows(*segments)),
            **last("out", module.out),
            "conv.taps": SHARED,
        },
        {"width": share},
    )


@plan_of.register
def _(module: RGLRU, sharing: Sharing) -> Plan:
    width, blocks = module.width, module.n_blocks
    share, of_blocks = sharing.of(width, "width"), sharing.of(blocks, "n_blocks")
    plan = Plan(
        {
            **linear("inputs", module.inputs, sharing.rows(width, width)),
            "gates": sharing.rows(blocks, blocks),
            "gate_bias": sharing.rows(width, width),
            "decay": sharing.rows(width),
            **last("out", module.out),
        },
        {"width": share, "n_blocks": of_blocks},
    )
    if module.conv is not None:
        plan.cuts["conv.taps"] = sharing.rows(*[width] * module.conv.width)
        plan.sizes["conv.channels"] = share
    return plan


@plan_of.register(GatedLinearAttention)
@plan_of.register(GatedDeltaNet)
def _(module: GatedLinearAttention | GatedDeltaNet, sharing: Sharing) -> Plan:
    heads = module.n_heads
    h, inner = sharing.of(heads, "n_heads"), heads * module.head_dim
    plan = Plan(
        {
            **linear("inputs", module.inputs, sharing.rows(*[inner] * 4)),
            **linear("rates", module.rates, sharing.rows(heads, heads)),
            "A_log": sharing.rows(heads),
            "dt_bias": sharing.rows(heads),
            "norm_weight": SHARED,
            **last("out", module.out),
        },
        {"n_heads": h},
    )
    if module.conv is not None:
        plan.cuts["conv.taps"] = sharing.rows(*[inner] * 3, times=module.conv.width)
        plan.sizes["conv.channels"] = 3 * h * module.head_dim
    return plan
