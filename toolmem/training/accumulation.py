"""What a checkpoint in the middle of gradient accumulation keeps of the batches since the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from toolmem import checkpoints

if TYPE_CHECKING:
    from toolmem.training.module import LanguageModelModule

STATES = (
    "state_dict",
    "current_model_state",
)  # of a checkpoint: the second beside averaged weights


def gathered_gradients(module: LanguageModelModule) -> dict[str, Tensor]:
    """The gradients gathered so far, whole, by the model's names: those of all ranks, on each of them."""
    named = dict(module.model.named_parameters())
    if module.sharded:
        from toolmem.training.parallel.layout import named_orders, whole

        orders = named_orders(module.model)
        return {
            name: whole(parameter.grad.detach(), orders.get(name))
            for name, parameter in named.items()
            if parameter.grad is not None
        }
    reduce = module.trainer.strategy.reduce
    # a rank whose tokens all went elsewhere has none of an expert's
    has = torch.tensor([p.grad is not None for p in named.values()], device=module.device)
    anywhere = reduce(has.to(torch.int32), reduce_op="sum").tolist()
    found = {}
    for (name, parameter), n in zip(named.items(), anywhere, strict=True):
        if n:
            own = parameter.grad
            value = torch.zeros_like(parameter) if own is None else own.detach().clone()
            found[name] = reduce(value.detach(), reduce_op="mean")
    return found


def put_back(module: LanguageModelModule, gradients: Mapping[str, Tensor]) -> None:
    """Take up `gathered_gradients`, whatever the number of ranks was.

    Args:
        module: whose parameters get them.
        gradients: by the model's names.
    """
    orders: Mapping[str, Any] = {}
    if module.sharded and gradients:
        from toolmem.training.parallel.layout import named_orders, spread

        orders = named_orders(module.model)
    for name, parameter in module.model.named_parameters():
        if name not in gradients:
            continue
        if module.sharded:
            whole = gradients[name].to(parameter.dtype)
            parameter.grad = spread(whole, parameter, orders.get(name))
        else:
            parameter.grad = gradients[name].to(parameter)


def keep_sums(
    module: nn.Module, checkpoint: dict[str, Any], sum_over_ranks: Callable[[Tensor], Tensor]
) -> None:
    """Have a checkpoint hold what all ranks counted since the last step, not the first one alone.

    Args:
        module: the language model. A module in it names buffers that count by ``counts_of_step``.
        checkpoint: changed in place.
        sum_over_ranks: sums a tensor over ranks that read different data.
    """
    for name, buffer in _counts(module):
        total = sum_over_ranks(buffer.clone())
        for state in STATES:
            if checkpoints.WEIGHTS_PREFIX + name in checkpoint.get(state, ()):
                checkpoint[state][checkpoints.WEIGHTS_PREFIX + name] = total


def forget_sums(module: nn.Module) -> None:
    """Of a rank that is not the first: what `keep_sums` kept is counted once."""
    for _, buffer in _counts(module):
        buffer.zero_()


def _counts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, module in model.named_modules():
        for one in getattr(module, "counts_of_step", ()):
            yield f"{name}.{one}", getattr(module, one)
