"""How a parameter lies on the ranks of a tensor-parallel group, and how it comes from and to files.

Many of our matrices are several in one: query, key and value; a gate and its values. A rank is to have a
share of each, and a ``DTensor`` cuts a dimension in pieces that follow each other. So parameters are kept
with their rows in another order, in which each rank's share is one piece:

    as the model has it     q0 q1 q2 q3 | k0 k1 | v0 v1
    as it is kept           q0 q1 k0 v0 | q2 q3 k1 v1        (two ranks)

Nobody else sees that order: whatever leaves by ``state_dict`` or comes by ``load_state_dict``, of module
or optimizer, is in the model's own. Norms, AdamW and Muon do not depend on the order of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

ORDERS = "_toolmem_orders"  # attribute of a module: name of a parameter -> its order


def row_order(segments: Sequence[int], size: int) -> Tensor | None:
    """The order in which each rank's rows follow each other; None where they do already.

    Args:
        segments: sizes of the matrices that are stacked, each a multiple of ``size``.
        size: number of ranks.

    Returns:
        (rows,) int64: which row of the model's own order is kept at each place.
    """
    if len(segments) == 1 or size == 1:
        return None
    starts, total = [], 0
    for segment in segments:
        assert segment % size == 0, f"{segment} rows are not shared evenly by {size} ranks"
        starts.append(total)
        total += segment
    return torch.cat(
        [
            torch.arange(start + segment // size * rank, start + segment // size * (rank + 1))
            for rank in range(size)
            for start, segment in zip(starts, segments, strict=True)
        ]
    )


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, sharing memory; the tensor itself where it is not split."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor, order: Tensor | None = None) -> Tensor:
    """All of a tensor in the model's own order, on every rank, all of which must call it.

    Args:
        tensor: split or not.
        order: of its rows, as it is kept.
    """
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full if order is None else full.index_select(0, order.argsort().to(full.device))


def cut(full: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """The own piece of a tensor that every rank has; nothing is sent."""
    everywhere = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=placements).to_local()


def spread(full: Tensor, like: Tensor, order: Tensor | None = None) -> Tensor:
    """A tensor that every rank has, split as ``like`` is; the tensor itself where that is not split.

    Args:
        full: in the model's own order.
        like: of the same shape.
        order: of rows, as ``like`` is kept.
    """
    full = full.to(like.device)
    if order is not None:
        full = full.index_select(0, order.to(full.device))
    if not isinstance(like, DTensor):
        return full
    piece = cut(full, like.device_mesh, like.placements)
    return DTensor.from_local(
        piece.contiguous(),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def place(
    module: nn.Module, name: str, mesh: DeviceMesh, dim: int | None, order: Tensor | None = None
) -> None:
    """Put one parameter of ``module`` on the ranks of ``mesh``.

    Args:
        module: whose own parameter it is.
        name: of the parameter.
        mesh: one dimension.
        dim: where it is cut; None keeps all of it on each rank.
        order: of its rows.
    """
    parameter = module._parameters[name]
    assert parameter is not None
    full = parameter.detach()
    if order is not None:
        full = full.index_select(0, order.to(full.device))
        orders(module)[name] = order
    placement: Placement = Replicate() if dim is None else Shard(dim)
    # Every rank has built the same weights, so each takes its piece: nothing is sent.
    piece = cut(full.contiguous(), mesh, [placement]).clone()
    tensor = DTensor.from_local(
        piece, mesh, [placement], run_check=False, shape=full.shape, stride=full.stride()
    )
    module._parameters[name] = nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def orders(module: nn.Module) -> dict[str, Tensor]:
    """Orders of a module's own parameters' rows, by name."""
    return module.__dict__.setdefault(ORDERS, {})


def parameter_orders(model: nn.Module) -> dict[int, Tensor]:
    """Orders of rows by the parameter's id."""
    return {
        id(module._parameters[name]): order
        for module in model.modules()
        for name, order in module.__dict__.get(ORDERS, {}).items()
    }


def named_orders(model: nn.Module) -> dict[str, Tensor]:
    """Orders of rows by the parameter's name, of all names that it has."""
    return {
        f"{prefix}.{name}" if prefix else name: order
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name, order in module.__dict__.get(ORDERS, {}).items()
    }


def keep_own_order(model: nn.Module) -> None:
    """Let state dicts of ``model`` be in the model's own order, and load tensors that are not split."""
    for module in model.modules():
        if any(isinstance(p, DTensor) for p in module._parameters.values()):
            module.register_state_dict_post_hook(_leaving)
            module.register_load_state_dict_pre_hook(_coming)


def _leaving(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, order in orders(module).items():
        kept = state.get(prefix + name)
        if isinstance(kept, DTensor):
            state[prefix + name] = spread(whole(kept.detach(), order), kept)


def _coming(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        given, order = state.get(prefix + name), orders(module).get(name)
        if not isinstance(parameter, DTensor) or given is None or given.shape != parameter.shape:
            continue
        if order is not None or not isinstance(given, DTensor):
            state[prefix + name] = spread(whole(given.detach()), parameter, order)


def keep_own_order_of_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """The same of an optimizer of ``model``'s parameters."""
    found = parameter_orders(model)

    def numbered(state: Mapping[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Each parameter, and what the optimizer keeps of it."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        numbers = [n for group in state["param_groups"] for n in group["params"]]
        for parameter, number in zip(parameters, numbers, strict=True):
            yield parameter, state["state"].get(number, {})

    def copied(state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "state": {n: dict(one) for n, one in state["state"].items()}}

    def leaving(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copied(state)
        for parameter, own in numbered(state):
            order = found.get(id(parameter))
            for key, value in own.items():
                if order is not None and value.shape == parameter.shape:
                    own[key] = spread(whole(value, order), value)
        return state

    def coming(_: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = copied(state)
        for parameter, own in numbered(state):
            order = found.get(id(parameter))
            for key, value in own.items():
                if not isinstance(value, Tensor) or value.shape != parameter.shape:
                    continue
                if order is not None or not isinstance(value, DTensor):
                    own[key] = spread(whole(value), parameter, order)
        return state

    optimizer.register_state_dict_post_hook(leaving)
    optimizer.register_load_state_dict_pre_hook(coming)
