"""Muon for matrices and AdamW for everything else, as one ``torch.optim.Optimizer``.

Unusual about it: matrices of one shape, whichever layers they are from, are
orthogonalised together in one batched iteration, so that a step of a tiny model costs a few dozen
kernels and not a few dozen per matrix. A parameter of more than two dimensions is a stack of
matrices. Of parameters that are split over ranks the momentum is put together, as many matrices at once,
and each rank takes its piece of the outcome. Torch's own ``torch.optim.Muon`` takes single matrices
only, and always iterates in bfloat16.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7
# Matrices are stacked up to this many numbers: beyond it a matmul is busy enough by itself, and a
# stack would only cost memory.
STACK_LIMIT = 2**22

AdjustRate = Literal["original", "match_rms_adamw"]


def iteration_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to orthogonalise in: bfloat16 on GPUs that are fast at it, else the tensor's own,
    but float32 at least (CPUs, Volta).
    """
    if tensor.dtype == torch.float64:
        return torch.float64
    if tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device)[0] >= 8:
        return torch.bfloat16
    return torch.float32


def orthogonalize(
    matrices: Tensor,
    steps: int = 5,
    dtype: torch.dtype | None = None,
    coefficients: tuple[float, float, float] = COEFFICIENTS,
) -> Tensor:
    """Push each matrix's singular values towards 1 by a quintic Newton-Schulz iteration.

    Args:
        matrices: (..., m, n).
        steps: iterations.
        dtype: what to compute in, and of the result; None to choose by device
            (``iteration_dtype``).
        coefficients: of x, x^3 and x^5; the usual ones are steep at 0 and only bring singular
            values into about 0.7 to 1.2 (https://kellerjordan.github.io/posts/muon/).
    """
    a, b, c = coefficients
    m, n = matrices.shape[-2:]
    x = matrices.to(dtype or iteration_dtype(matrices)).reshape(
        math.prod(matrices.shape[:-2]), m, n
    )
    if m > n:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=EPSILON)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    if m > n:
        x = x.mT
    return x.reshape(matrices.shape)


def rate_ratio(shape: Sequence[float], adjust: AdjustRate) -> float:
    """What the learning rate is multiplied with for matrices of a shape.

    ``original``: sqrt(max(1, m / n)); ``match_rms_adamw``: 0.2 sqrt(max(m, n)), with which an
    update is about as large as AdamW's, so that both share one learning rate (arXiv 2502.16982).
    """
    m, n = shape[-2:]
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return math.sqrt(max(1.0, m / n))


def own_piece(tensor: Tensor) -> Tensor:
    """What the rank holds of a tensor that is split (a ``DTensor``), sharing memory; of others, all."""
    whole: Any = tensor
    return whole.to_local() if hasattr(tensor, "placements") else tensor


class MuonAdamW(Optimizer):
    """Muon and AdamW side by side; a parameter group's ``kind`` says which of them it is for.

    Args:
        params: groups with ``kind`` ("muon" or "adamw"), ``params``, ``weight_decay`` and any of
            the below. Muon's parameters are matrices or stacks of them, (..., m, n).
        lr: learning rate of groups that name none.
        momentum: Muon's.
        nesterov: Muon's momentum looks ahead.
        steps: Newton-Schulz iterations.
        adjust: how Muon's rate depends on the shape (``rate_ratio``).
        dtype: what Muon iterates in; None to choose by device.
        betas: AdamW's.
        eps: AdamW's.
        fused: AdamW as one kernel.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-2,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        adjust: AdjustRate = "match_rms_adamw",
        dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        self.dtype = dtype  # no hyperparameter of a group: checkpoints hold plain data only
        shared = {"lr": lr, "weight_decay": 0.0, "kind": "adamw"}
        own: dict[str, dict[str, Any]] = {
            "muon": {"momentum": momentum, "nesterov": nesterov, "steps": steps, "adjust": adjust},
            "adamw": {"betas": tuple(betas), "eps": eps, "fused": fused},
        }
        groups = [own[group.get("kind", "adamw")] | group for group in params]
        super().__init__(groups, shared)
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["kind"] == "muon" and parameter.ndim < 2:
                    raise ValueError(
                        f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; ``closure``, if any, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            if group["kind"] == "muon":
                self._muon(group, params)
            else:
                self._adamw(group, params)
        return loss

    def _muon(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        grads = [own_piece(parameter.grad) for parameter in params]  # type: ignore[arg-type]
        buffers = []
        for parameter in params:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(own_piece(state["momentum_buffer"]))
        pieces = [own_piece(parameter) for parameter in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        if group["weight_decay"]:
            torch._foreach_mul_(pieces, 1 - lr * group["weight_decay"])
        # Updates are made some at a time: of all of them they would be another copy of the gradients.
        for shape, members in self._stacks(params):
            updates = [buffers[i] for i in members]
            if group["nesterov"]:
                updates = list(torch._foreach_lerp([grads[i] for i in members], updates, momentum))
            like = params[members[0]] if hasattr(params[members[0]], "placements") else None
            batch = self._orthogonal(updates, group["steps"], like)
            alpha = -lr * rate_ratio(shape, group["adjust"])
            targets = [pieces[i] for i in members]
            if batch[0].dtype == targets[0].dtype:
                torch._foreach_add_(targets, batch, alpha=alpha)
            else:  # an update of fewer bits is multiplied in the parameter's own
                for target, update in zip(targets, batch, strict=True):
                    target.add_(update, alpha=alpha)

    def _stacks(self, params: list[Tensor]) -> Iterator[tuple[torch.Size, list[int]]]:
        """Numbers of parameters that are alike, of one shape and split over ranks in one way: as many at
        once as are worth it.
        """
        alike: dict[tuple[torch.Size, Any], list[int]] = defaultdict(list)
        for index, parameter in enumerate(params):
            alike[parameter.shape, getattr(parameter, "placements", None)].append(index)
        for (shape, _), members in alike.items():
            at_once = max(1, STACK_LIMIT // max(shape.numel(), 1))
            for start in range(0, len(members), at_once):
                yield shape, members[start : start + at_once]

    def _orthogonal(self, updates: list[Tensor], steps: int, like: Any = None) -> list[Tensor]:
        """Orthogonalise updates of one shape together.

        Args:
            updates: of matrices, or this rank's pieces of them.
            steps: iterations.
            like: a ``DTensor`` of which the updates are pieces; None where they are whole.
        """
        if like is not None:
            from toolmem.training.parallel import matrices

            if not matrices.holds_whole_matrices(like):
                whole = matrices.gathered(updates, like=like)
                return matrices.own_pieces(orthogonalize(whole, steps, self.dtype), like=like)
        stack = updates[0].unsqueeze(0) if len(updates) == 1 else torch.stack(updates)
        return list(orthogonalize(stack, steps, self.dtype).unbind(0))

    def _adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        averages, squares, steps = [], [], []
        for parameter in params:
            state = self.state[parameter]
            if not state:
                device = parameter.device if group["fused"] else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            averages.append(own_piece(state["exp_avg"]))
            squares.append(own_piece(state["exp_avg_sq"]))
            steps.append(state["step"])
        beta1, beta2 = group["betas"]
        adamw(
            [own_piece(parameter) for parameter in params],
            [own_piece(parameter.grad) for parameter in params],  # type: ignore[arg-type]
            averages,
            squares,
            [],
            steps,
            fused=group["fused"],
            foreach=not group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
