"""Which experts each token goes to, and how they are kept about equally busy.

Shapes: n tokens, e experts, k experts a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.context import Context

ScoreFunction = Literal["softmax", "sigmoid"]


@dataclass
class Routing:
    """Where tokens go.

    Args:
        experts: (n, k) int64, each token's experts, best first.
        weights: (n, k), what their outputs are multiplied by.
    """

    experts: Tensor
    weights: Tensor


class Router(nn.Module):
    """Scores a token's experts and picks the best k (token choice, arXiv 1701.06538).

    Scores are computed in float32 at least. Balance is kept in up to three ways, which may be combined:

    - a bias on each expert's score, for choosing alone, that goes up by ``bias_update_rate`` after a
      step in which the expert got less than its share, and down else (without an auxiliary loss,
      arXiv 2408.15664, DeepSeek-V3: arXiv 2412.19437);
    - ``balance_loss`` times e sum_i f_i p_i, with f_i the share of choices that fell on expert i and
      p_i its mean probability (Switch, arXiv 2101.03961); 1 where both are even;
    - ``z_loss`` times the mean of logsumexp(logits)^2, which keeps logits small (arXiv 2202.08906).

    Padding is counted neither in the load nor in the losses where ``context.documents`` tells it apart
    (-1).

    Args:
        dim: width of the residual stream.
        n_experts: experts to choose from.
        top_k: how many of them a token goes to.
        score: ``softmax`` over the experts, or ``sigmoid`` of each (DeepSeek-V3).
        normalize_weights: make the weights of a token's experts add up to 1.
        weight_scale: multiplies the weights (DeepSeek-V3 has 2.5).
        bias_update_rate: 0 for no bias.
        balance_loss: coefficient; 0 for none.
        z_loss: coefficient; 0 for none.

    Raises:
        ToolmemError: for options that do not go together, naming the key.
    """

    parameter_group = "router"
    mup_fixed_outputs = ("weight",)  # the number of experts does not grow with the width
    counts_of_step = ("load",)

    bias: Tensor  # (e,) float32, added to scores for choosing
    load: Tensor  # (e,) int64, tokens that chose each expert since the last step

    def __init__(
        self,
        dim: int,
        n_experts: int,
        top_k: int,
        score: ScoreFunction = "softmax",
        normalize_weights: bool = True,
        weight_scale: float = 1.0,
        bias_update_rate: float = 1e-3,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if n_experts < 1:
            raise ToolmemError(f"n_experts is {n_experts}: it must be at least 1")
        if not 1 <= top_k <= n_experts:
            raise ToolmemError(
                f"top_k is {top_k}: it must be at least 1 and at most n_experts, {n_experts}"
            )
        if score not in ("softmax", "sigmoid"):
            raise ToolmemError(f"score: unknown {score!r}; choose softmax or sigmoid")
        if normalize_weights and top_k == 1 < n_experts:
            raise ToolmemError(
                "top_k is 1 with normalize_weights: every weight is 1, and the router would learn "
                "nothing of the loss; set normalize_weights: false, or a larger top_k"
            )
        off_or_more = {
            "bias_update_rate": bias_update_rate,
            "balance_loss": balance_loss,
            "z_loss": z_loss,
        }
        for name, value in off_or_more.items():
            if value < 0:
                raise ToolmemError(f"{name} is {value}: it must be 0 (off) or more")
        if weight_scale <= 0:
            raise ToolmemError(f"weight_scale is {weight_scale}: it must be above 0")
        self.n_experts = n_experts
        self.top_k = top_k
        self.score = score
        self.normalize_weights = normalize_weights
        self.weight_scale = weight_scale
        self.bias_update_rate = bias_update_rate
        self.balance_loss = balance_loss
        self.z_loss = z_loss
        self.weight = nn.Parameter(torch.empty(n_experts, dim))
        nn.init.normal_(self.weight, std=1 / math.sqrt(dim))
        self.register_buffer("bias", torch.zeros(n_experts, dtype=torch.float32))
        # Kept in checkpoints too: one may be written between the micro-batches of a step.
        self.register_buffer("load", torch.zeros(n_experts, dtype=torch.int64))

    def forward(self, x: Tensor, context: Context | None = None) -> Routing:
        """Choose for every token.

        Args:
            x: (n, dim), the tokens of a batch one after the other.
            context: takes terms of the loss and figures, where somebody wants them.
        """
        logits = self.logits(x)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choosing = scores.detach()
        if self.bias_update_rate:
            choosing = choosing + self.bias.to(choosing.dtype)
        experts = choosing.topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, experts)
        if self.normalize_weights:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.weight_scale != 1.0:
            weights = weights * self.weight_scale
        watched = context is not None and context.extras is not None
        balancing = self.training and self.bias_update_rate > 0
        if watched or balancing:
            real = _real_tokens(context)
            load = self._count(experts, real)
            if balancing:
                self.load += load
            if watched and context is not None:
                self._report(context, logits, scores, load, real)
        return Routing(experts, weights)

    def logits(self, x: Tensor) -> Tensor:
        """Each expert's logit, (n, e), float32 at least, also under autocast."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        if torch.is_autocast_enabled(x.device.type):
            with torch.autocast(x.device.type, enabled=False):
                return F.linear(x.to(dtype), self.weight.to(dtype))
        return F.linear(x.to(dtype), self.weight.to(dtype))

    def _count(self, experts: Tensor, real: Tensor | None) -> Tensor:
        """Tokens that chose each expert, (e,) int64."""
        ones = torch.ones_like(experts) if real is None else real[:, None].expand_as(experts).long()
        load = torch.zeros(self.n_experts, dtype=torch.int64, device=experts.device)
        return load.scatter_add_(0, experts.flatten(), ones.flatten())

    def _report(
        self,
        context: Context,
        logits: Tensor,
        scores: Tensor,
        load: Tensor,
        real: Tensor | None,
    ) -> None:
        extras = context.extras
        assert extras is not None
        probabilities = scores
        if self.score == "sigmoid":
            probabilities = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        if self.training and self.balance_loss:
            share = load.to(logits.dtype) / load.sum().clamp(min=1)
            evenness = self.n_experts * (share * _mean(probabilities, real)).sum()
            extras.add_loss("moe/balance_loss", self.balance_loss * evenness)
        if self.training and self.z_loss:
            size = logits.logsumexp(-1).square()
            extras.add_loss("moe/z_loss", self.z_loss * _mean(size, real))
        with torch.no_grad():
            entropy = _mean(torch.special.entr(probabilities).sum(-1), real)
            log_mean(context, "moe/router_entropy", entropy)
            mean_load = load.sum().clamp(min=1) / self.n_experts
            log_mean(context, "moe/load_max_over_mean", load.max() / mean_load)

    @torch.no_grad()
    def after_optimizer_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Move each expert's bias by the load of the step.

        Args:
            reduce: sums a tensor over ranks.
        """
        if not self.bias_update_rate:
            return
        load = reduce(self.load)
        # load against its mean, in whole numbers
        self.bias += self.bias_update_rate * torch.sign(load.sum() - self.n_experts * load)
        self.load.zero_()

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.score}, {self.top_k} of {self.n_experts}"


def _real_tokens(context: Context | None) -> Tensor | None:
    """Which tokens are not padding, (n,) bool; None when all are, or nobody knows."""
    if context is None or context.documents is None:
        return None
    return context.documents.flatten() >= 0


def _mean(values: Tensor, real: Tensor | None) -> Tensor:
    """The mean over tokens (the first dimension) that are real."""
    if real is None:
        return values.mean(0)
    chosen = real.view(-1, *[1] * (values.ndim - 1)).to(values.dtype)
    return (values * chosen).sum(0) / chosen.sum().clamp(min=1)


def log_mean(context: Context, name: str, value: Tensor) -> None:
    """Log the mean over all layers that log ``name``.

    Args:
        context: of a forward pass.
        name: of the figure.
        value: of one layer, a scalar without gradient.
    """
    if context.extras is None:
        return
    metrics, counter = context.extras.metrics, f"{name}/layers"
    layers = context.shared.get(counter, torch.zeros_like(value)) + 1
    context.shared[counter] = layers
    before = metrics.get(name, value)
    metrics[name] = before + (value - before) / layers
