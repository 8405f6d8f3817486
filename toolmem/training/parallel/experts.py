"""Expert parallelism: the experts of a layer spread over the ranks of a tensor-parallel group.

Tokens are the same on every rank of the group, so nothing is sent to experts: each rank routes all tokens,
takes the pairs of its own experts, and what the ranks put out is summed, as of every other branch.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from toolmem.models.context import Context
from toolmem.models.layers import activate
from toolmem.models.moe import MixtureOfExperts, dispatch
from toolmem.models.routing import log_mean
from toolmem.training.parallel.collectives import enter, scale_gradient


def spread_experts(module: MixtureOfExperts, group: ProcessGroup) -> None:
    """Let a layer compute with its rank's experts: its ``up`` and ``down`` hold those alone."""
    module.forward = partial(_forward, module, group)  # type: ignore[method-assign]


def _forward(
    module: MixtureOfExperts, group: ProcessGroup, x: Tensor, context: Context | None = None
) -> Tensor:
    """The own part of ``MixtureOfExperts.forward``."""
    tokens = x.flatten(0, 1)
    # Every rank finds the router's whole gradient, whose share then is summed with those of the experts.
    routing = module.router(scale_gradient(tokens, 1 / group.size()), context)
    weights = enter(routing.weights, group).flatten()
    capacity = module.capacity(len(tokens)) if module.training else 0
    order, _, ends = dispatch(routing.experts, module.n_experts, capacity)
    if capacity and context is not None:
        log_mean(context, "moe/dropped_fraction", 1 - ends[-1] / routing.experts.numel())
    share = module.n_experts // group.size()
    first = group.rank() * share
    begin = ends[first - 1] if first else ends.new_zeros(())
    own = order[int(begin) : int(ends[first + share - 1])]
    own_ends = ends[first : first + share] - begin
    of_token = own // module.top_k
    y = activate(module.up(tokens.index_select(0, of_token), own_ends), module.kind)
    y = module.down(y, own_ends) * weights.index_select(0, own).to(x.dtype)[:, None]
    total = torch.zeros_like(tokens).index_add(0, of_token, y.to(tokens.dtype)).view(x.shape)
    return total if module.shared is None else total + module.shared(x)
