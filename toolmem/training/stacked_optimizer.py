"""Muon and AdamW over stacked parameters, every member with settings of its own.

What a member's settings mean (which parameters Muon takes, what decays, muP's rates) is not decided here:
the optimizer that trains the member alone is built, and its groups are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from toolmem.errors import ToolmemError
from toolmem.training.muon import MuonAdamW, rate_ratio
from toolmem.training.optimizers import OptimizerConfig

# A number for each member; the others must be the same for all, since they decide what is computed.
PER_MEMBER = ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum")
SHARED = ("nesterov", "steps", "adjust")
# Of torch's AdamW and of MuonAdamW: how it is computed, not what.
IMPLEMENTATION = {
    "params", "fused", "foreach", "capturable", "differentiable", "maximize", "amsgrad",
    "decoupled_weight_decay",
}  # fmt: skip


def stacked_groups(
    configs: Sequence[OptimizerConfig], model: nn.Module, stacked: Mapping[str, nn.Parameter]
) -> tuple[list[dict[str, Any]], torch.dtype | None]:
    """Parameter groups of a `StackedOptimizer`, and what Muon iterates in.

    Args:
        configs: each member's.
        model: of the members' shape.
        stacked: the members' parameters (members, ...), by the model's names.

    Raises:
        ToolmemError: where members want what one optimizer cannot do at once.
    """
    alone = [config.build(model) for config in configs]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    settings: dict[str, list[dict[str, Any]]] = {}
    for optimizer in alone:
        for group in optimizer.param_groups:
            own = {key: value for key, value in group.items() if key not in IMPLEMENTATION}
            own.setdefault("kind", "adamw")
            if "betas" in own:
                own["beta1"], own["beta2"] = own.pop("betas")
            for parameter in group["params"]:
                settings.setdefault(names[id(parameter)], []).append(own)
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, members in settings.items():
        for key in ("kind", *(key for key in SHARED if key in members[0])):
            if any(member.get(key) != members[0].get(key) for member in members):
                raise ToolmemError(
                    f"model.members: {key} of {name} differs among members, and decides what is "
                    "computed: give them one, or train them in two populations"
                )
        common = {key: members[0][key] for key in ("kind", *SHARED) if key in members[0]}
        each = {
            key: tuple(float(member[key]) for member in members)
            for key in PER_MEMBER
            if key in members[0]
        }
        group = groups.setdefault(
            (*common.items(), *each.items()), {"params": [], **common, **each}
        )
        group["params"].append(stacked[name])
    dtypes = {optimizer.dtype if isinstance(optimizer, MuonAdamW) else None for optimizer in alone}
    if len(dtypes) > 1:
        raise ToolmemError("model.members: ns_dtype differs among members: give them one")
    return list(groups.values()), dtypes.pop()


class StackedOptimizer(MuonAdamW):
    """``MuonAdamW`` for parameters that are stacks of members' parameters, (members, ...).

    ``lr``, ``weight_decay``, ``beta1``, ``beta2``, ``eps`` and ``momentum`` of a group are tuples, a
    number for each member. Parameters, averages and momenta of members that are not active are left as
    they are, bit for bit.

    Args:
        groups: as `stacked_groups` makes them.
        dtype: what Muon iterates in; None to choose by device.

    Attributes:
        active: numbers of the members that take part in a step; None for all.
    """

    def __init__(self, groups: list[dict[str, Any]], dtype: torch.dtype | None = None) -> None:
        super().__init__(groups, dtype=dtype)
        self.active: list[int] | None = None

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        rows = _Rows(self.active, params)
        weights, grads = rows.take(params), rows.take([p.grad for p in params])  # type: ignore[misc]
        buffers = rows.take([self.state[p]["momentum_buffer"] for p in params])
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_lerp_(buffers, grads, rows.columns([1 - m for m in momentum]))
        updates = buffers
        if group["nesterov"]:
            updates = list(torch._foreach_lerp(grads, buffers, rows.columns(momentum)))
        if any(group["weight_decay"]):
            kept = [1 - rate * decay for rate, decay in zip(lr, group["weight_decay"], strict=True)]
            torch._foreach_mul_(weights, rows.columns(kept))
        for shape, members in self._stacks(weights):
            batch = self._orthogonal([updates[i] for i in members], group["steps"])
            ratio = rate_ratio(shape, group["adjust"])
            rates = rows.columns([-rate * ratio for rate in lr])
            for i, update in zip(members, batch, strict=True):
                weights[i].addcmul_(update.to(weights[i].dtype), rates[i])
        rows.put(params, weights)
        rows.put([self.state[p]["momentum_buffer"] for p in params], buffers)

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
        steps = int(self.state[params[0]]["step"])
        rows = _Rows(self.active, params)
        weights, grads = rows.take(params), rows.take([p.grad for p in params])  # type: ignore[misc]
        averages = rows.take([self.state[p]["exp_avg"] for p in params])
        squares = rows.take([self.state[p]["exp_avg_sq"] for p in params])
        lr, beta1, beta2 = group["lr"], group["beta1"], group["beta2"]
        if any(group["weight_decay"]):
            kept = [1 - rate * decay for rate, decay in zip(lr, group["weight_decay"], strict=True)]
            torch._foreach_mul_(weights, rows.columns(kept))
        torch._foreach_lerp_(averages, grads, rows.columns([1 - beta for beta in beta1]))
        torch._foreach_mul_(squares, rows.columns(beta2))
        scaled = torch._foreach_mul(grads, rows.columns([1 - beta for beta in beta2]))
        torch._foreach_addcmul_(squares, scaled, grads)
        # the root of the corrected average, and eps; the rate over the other correction
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, rows.columns([(1 - beta**steps) ** 0.5 for beta in beta2]))
        torch._foreach_add_(roots, rows.columns(group["eps"]))
        updates = torch._foreach_div(averages, roots)
        rates = [-rate / (1 - beta**steps) for rate, beta in zip(lr, beta1, strict=True)]
        torch._foreach_addcmul_(weights, updates, rows.columns(rates))
        rows.put(params, weights)
        rows.put([self.state[p]["exp_avg"] for p in params], averages)
        rows.put([self.state[p]["exp_avg_sq"] for p in params], squares)


class _Rows:
    """The members of stacked tensors that take part in a step.

    Args:
        active: their numbers; None for all, which costs no copies.
        params: the stacked parameters of a group.
    """

    def __init__(self, active: list[int] | None, params: Sequence[Tensor]) -> None:
        self.active = active
        self.params = params
        self.index = None if active is None else torch.tensor(active, device=params[0].device)

    def take(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Their rows; the tensors themselves where it is all of them."""
        return list(tensors) if self.index is None else [t[self.index] for t in tensors]

    def put(self, tensors: Sequence[Tensor], rows: Sequence[Tensor]) -> None:
        """Write back what `take` took."""
        if self.index is not None:
            for tensor, row in zip(tensors, rows, strict=True):
                tensor[self.index] = row

    def columns(self, values: Sequence[float]) -> list[Tensor]:
        """A number for each member, for each parameter, ready to be broadcast."""
        if self.active is not None:
            values = [values[member] for member in self.active]
        first = self.params[0]
        column = torch.tensor(values, dtype=first.dtype, device=first.device)
        return [column.view(-1, *[1] * (parameter.ndim - 1)) for parameter in self.params]


class StackedSchedule(LRScheduler):
    """A schedule for each member: its factor on its learning rate.

    Args:
        optimizer: a `StackedOptimizer`.
        factors: step -> factor, one a member.
    """

    def __init__(self, optimizer: Optimizer, factors: Sequence[Callable[[int], float]]) -> None:
        self.factors = list(factors)
        super().__init__(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Plain data: functions are made anew from the recipe."""
        return {
            key: value
            for key, value in self.__dict__.items()
            if key not in ("optimizer", "factors")
        }

    def get_lr(self) -> list[Any]:
        """Each group's rates."""
        factors = [factor(self.last_epoch) for factor in self.factors]
        return [
            tuple(rate * factor for rate, factor in zip(rates, factors, strict=True))
            for rates in cast(list[tuple[float, ...]], self.base_lrs)
        ]


@torch.no_grad()
def clip_by_member(gradients: Sequence[Tensor], largest: float) -> None:
    """Scale each member's gradients so that their norm is at most ``largest``, as
    ``torch.nn.utils.clip_grad_norm_`` does for one model.

    Args:
        gradients: stacked, (members, ...), changed in place.
        largest: norm.
    """
    norms = [gradient.flatten(1).norm(dim=1) for gradient in gradients]
    total = torch.stack(norms).norm(dim=0)
    factor = (largest / (total + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))
