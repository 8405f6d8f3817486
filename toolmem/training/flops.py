"""FLOPs of a step of training beside the model's own: the optimizer's, and what the machine could do.

The optimizer's work is reckoned from the shapes of parameters. Of it, matrix products (Muon's) follow
the convention of ``toolmem.models.flop_formulas``; elementwise work, which there counts 0, is all that
AdamW does, so that it is counted here, an operation on a number one FLOP:

==========  =======================================================================  =================
optimizer   on each number                                                           FLOPs
==========  =======================================================================  =================
AdamW       two running averages 3 + 4, root, its correction and eps 3, ratio, rate  14 (1 of decay)
            and difference 3, decay 1
Muon        momentum 3, look-ahead 3, norm 3, difference 2, decay 1                  12 (1 of decay,
            and each Newton-Schulz step 3 m^2 a matrix and 2 for each number         3 of look-ahead)
==========  =======================================================================  =================

Muon's products, for each matrix of m by n numbers with m <= n and each step: X X^T, its square, and one
with X: 2 m^2 n + 2 m^3 + 2 m^2 n.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from toolmem.training.muon import MuonAdamW, own_piece


@dataclass(frozen=True)
class OptimizerFlops:
    """FLOPs of one step of an optimizer.

    Args:
        matmul: of matrix products.
        elementwise: of all else.
        unknown: names of optimizers that nothing is known of; their work is in neither.
    """

    matmul: int = 0
    elementwise: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Both together."""
        return self.matmul + self.elementwise


def optimizer_flops(optimizer: torch.optim.Optimizer) -> OptimizerFlops:
    """FLOPs of a step in which every trainable parameter has a gradient.

    Args:
        optimizer: ours, or torch's AdamW or Adam.
    """
    matmul = elementwise = 0
    for group in optimizer.param_groups:
        parameters: list[Tensor] = [p for p in group["params"] if p.requires_grad]
        # of those that are split over ranks (DTensors), this rank's pieces
        numbers = sum(own_piece(p).numel() for p in parameters)
        decay = group.get("weight_decay")  # of a population, one a member
        decays = 1 if (any(decay) if isinstance(decay, tuple) else decay) else 0
        if isinstance(optimizer, MuonAdamW) and group["kind"] == "muon":
            steps = group["steps"]
            each = 8 + (3 if group["nesterov"] else 0) + decays + 2 * steps
            elementwise += each * numbers
            for parameter in parameters:
                n_matrices, m, n = matrices_of(parameter)
                matmul += steps * n_matrices * (4 * m * m * n + 2 * m**3)
                elementwise += steps * n_matrices * 3 * m * m
        elif isinstance(optimizer, MuonAdamW | torch.optim.AdamW | torch.optim.Adam):
            elementwise += (13 + decays) * numbers
        else:
            return OptimizerFlops(unknown=(type(optimizer).__name__,))
    return OptimizerFlops(matmul, elementwise)


def matrices_of(parameter: Tensor) -> tuple[int, int, int]:
    """How many matrices a parameter stacks, and their shorter and longer side."""
    m, n = sorted(parameter.shape[-2:])
    return math.prod(parameter.shape[:-2]), m, n


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOPs a second of this machine at one large matrix product, the best of several.

    Args:
        device: where to multiply, with as many threads as torch is set to.
        dtype: of the matrices.
        seconds: about how long to try.
    """
    cuda = device.type == "cuda"
    size = 8192 if cuda else 1024
    a = torch.randn(size, size, device=device, dtype=dtype, generator=_generator(device))
    best, until = math.inf, time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, a)
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
        rounds += 1
    return 2 * size**3 / best


def _generator(device: torch.device) -> torch.Generator:
    """Random numbers of its own: training's go on as if nothing had been measured."""
    return torch.Generator(device).manual_seed(0)
