"""Tensor and sequence parallelism, applied to a model from outside."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.layers import Block
from toolmem.training.parallel.collectives import enter, join, leave
from toolmem.training.parallel.layout import place
from toolmem.training.parallel.plans import SHARED, Plan, Sharing, plan_of
from toolmem.training.parallel.regions import Cut, Region, Stream, make_branch, make_stack

BRANCHES = ("mixer", "feed_forward")


def plans(model: LanguageModel, sharing: Sharing) -> dict[nn.Module, Plan]:
    """What becomes of every branch; nothing is changed.

    Args:
        model: any architecture.
        sharing: of one rank.

    Raises:
        ToolmemError: for what cannot be shared evenly, naming the key.
    """
    return {
        branch: plan_of(branch, sharing)
        for stack in stacks(model)
        for block in stack
        for branch in _branches(block)
    }


def stacks(model: LanguageModel) -> list[list[nn.Module]]:
    """The blocks, and each module that predicts more tokens by itself."""
    ahead = [] if model.multi_token is None else [[block] for block in model.multi_token.blocks]
    return [list(model.blocks), *ahead]


def _branches(block: nn.Module) -> list[nn.Module]:
    if not isinstance(block, Block):
        return [block]
    found = (getattr(block, name) for name in BRANCHES)
    return [branch for branch in found if branch is not None]


def check_sequence_parallel(model: LanguageModel) -> None:
    """Refuse what mixes or draws numbers for tokens outside of branches.

    Raises:
        ToolmemError: naming the key.
    """
    for block in (block for stack in stacks(model) for block in stack):
        if isinstance(block, Block) and block.mixer_conv is not None:
            raise ToolmemError(
                "model.sequence_parallel splits the stream over tokens, and residual_conv mixes them "
                "there: set model.model.init_args.residual_conv: 0, or model.sequence_parallel: false"
            )
        if isinstance(block, Block) and block.dropout is not None:
            raise ToolmemError(
                "model.sequence_parallel splits the stream over tokens, and dropout would draw the same "
                "numbers for each part: set model.model.init_args.dropout: 0, or "
                "model.sequence_parallel: false"
            )


def apply_tensor_parallel(model: LanguageModel, mesh: DeviceMesh, by_tokens: bool = False) -> None:
    """Let this rank hold and work out its share of ``model``.

    Every parameter becomes a ``DTensor``: cut where its branch is split, else whole on each rank. All ranks
    must hold the same weights before.

    Args:
        model: changed in place.
        mesh: of one dimension.
        by_tokens: split the stream between branches over tokens (sequence parallelism).

    Raises:
        ToolmemError: for what cannot be split, naming the key; the model is as it was.
    """
    group = mesh.get_group()
    sharing = Sharing(group.rank(), group.size())
    chosen = plans(model, sharing)
    if by_tokens:
        check_sequence_parallel(model)
    regions: list[Region] = []
    for stack in stacks(model):
        stream = Stream(group, by_tokens)
        for block in stack:
            for branch in _branches(block):
                plan = chosen[branch]
                regions.append(Region(branch, plan.cuts, group))
                make_branch(branch, stream, plan.split)
            if isinstance(block, Block):
                # norms between branches: of a stream that is split, each rank sees some of the tokens
                regions += [
                    Region(part, _alike(part, SHARED if by_tokens else Cut()), group)
                    for name, part in block.named_children()
                    if name not in BRANCHES and _holds(part)
                ]
        make_stack(stack, stream)
    for branch, plan in chosen.items():
        for name, size in plan.sizes.items():
            path, _, attribute = name.rpartition(".")
            setattr(branch.get_submodule(path), attribute, size)
        for finish in plan.finish:
            finish(group)
    regions += _ends(model, group)
    covered = {id(owner) for region in regions for owner, _, _ in region.entries}
    for module in model.modules():  # what belongs to no block: norms, maps that join
        if id(module) not in covered and any(True for _ in module.parameters(recurse=False)):
            regions.append(Region(module, {}, group, children=False))
    for owner, own_name, cut in (entry for region in regions for entry in region.entries):
        if not (owner is model.head and model.tie_embeddings and own_name == "weight"):
            place(owner, own_name, mesh, cut.dim, cut.order)
    if model.tie_embeddings:
        model.head.weight = model.embedding.weight


def _holds(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _alike(module: nn.Module, cut: Cut) -> dict[str, Cut]:
    return {name: cut for name, _ in module.named_parameters()}


def _ends(model: LanguageModel, group: ProcessGroup) -> list[Region]:
    """Embedding and head: by tokens of the vocabulary, where they can be shared evenly."""
    if model.vocab_size % group.size():
        return [Region(model.embedding, {}, group), Region(model.head, {}, group)]
    cut = {"weight": Cut(dim=0)}
    model.embedding.forward = partial(_embed, model.embedding, group)

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter(args[0], group),)

    def after(_: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        return join(logits, -1, model.vocab_size, group, sum_up=False)

    regions = [Region(model.embedding, cut, group), Region(model.head, cut, group)]
    model.head.register_forward_pre_hook(before)
    model.head.register_forward_hook(after)
    return regions


def _embed(module: nn.Embedding, group: ProcessGroup, tokens: Tensor) -> Tensor:
    """Embedded tokens, each from the rank that has it."""
    share = module.num_embeddings // group.size()
    own = tokens - group.rank() * share
    others = (own < 0) | (own >= share)
    x = F.embedding(own.masked_fill(others, 0), module.weight)
    return leave(x.masked_fill(others[..., None], 0), group)
