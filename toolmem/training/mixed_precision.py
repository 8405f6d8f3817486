"""Mixed precision with a loss scale that all ranks agree on, and steps left out that are counted.

Lightning's own plugin asks each rank alone whether its gradients are finite. Under DDP that is enough,
since gradients were averaged. Where the model is split over ranks (``ModelParallelStrategy``, which
refuses ``16-mixed`` for that reason) each holds other pieces: here the finding is put together before
anyone steps.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class GradScaler(torch.amp.GradScaler):
    """torch's, for gradients of which each rank may hold pieces; it counts the steps that it leaves out.

    Args:
        device: type of device, ``cuda`` or ``cpu``.
        kwargs: as torch's: ``init_scale``, ``growth_interval``, ...
    """

    def __init__(self, device: str, **kwargs: Any) -> None:
        super().__init__(device, **kwargs)
        self.skipped_steps = 0

    def _unscale_grads_(
        self, optimizer: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        pieces = [
            grad.to_local() if isinstance(grad, DTensor) else grad
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (grad := parameter.grad) is not None
        ]
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for piece in pieces:
            by_kind.setdefault((piece.device, piece.dtype), []).append(piece)
        found = {piece.device: found_inf.to(piece.device) for piece in pieces}
        for (device, _), some in by_kind.items():
            torch._amp_foreach_non_finite_check_and_unscale_(
                some, found[device], inv_scale.to(device)
            )
        if not found:  # a rank without gradients has its say too
            found = {found_inf.device: found_inf}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for one in found.values():
                dist.all_reduce(one, dist.ReduceOp.MAX)
        return found

    def _maybe_opt_step(
        self, optimizer: Optimizer, optimizer_state: dict[str, Any], *args: Any, **kwargs: Any
    ) -> float | None:
        if any(one.item() for one in optimizer_state["found_inf_per_device"].values()):
            self.skipped_steps += 1
            return None
        return optimizer.step(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the number of steps left out."""
        return super().state_dict() | {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint's, also from one of torch's own scaler."""
        super().load_state_dict(state_dict)
        self.skipped_steps = int(state_dict.get("skipped_steps", 0))


def precision_plugin(precision: object, accelerator: object) -> MixedPrecision | None:
    """What stands in for Lightning's own plugin; None for a precision that is not mixed, and on MPS.

    Args:
        precision: ``trainer.precision``.
        accelerator: ``trainer.accelerator``.
    """
    if precision not in ("16-mixed", "bf16-mixed"):
        return None
    cuda = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if not cuda and accelerator != "cpu" and torch.backends.mps.is_available():
        return None
    return MixedPrecision(precision, "cuda" if cuda else "cpu")


class MixedPrecision(LightningMixedPrecision):
    """``16-mixed`` and ``bf16-mixed`` for every strategy: parameters float32, matmuls narrower.

    With ``16-mixed`` a step whose gradients are not finite on some rank is left out on all of them, and
    the loss scale is halved (arXiv 1710.03740).

    Args:
        precision: ``16-mixed`` or ``bf16-mixed``.
        device: type of device, ``cuda`` or ``cpu``.
        init_scale: of the loss, for ``16-mixed``.
    """

    def __init__(
        self,
        precision: Literal["16-mixed", "bf16-mixed"],
        device: str,
        init_scale: float = 2.0**16,
    ) -> None:
        scaler = GradScaler(device, init_scale=init_scale) if precision == "16-mixed" else None
        super().__init__(precision, device, scaler)

    def metrics(self) -> dict[str, float]:
        """``precision/loss_scale`` and ``precision/skipped_steps``, where there is a loss scale."""
        if not isinstance(self.scaler, GradScaler):
            return {}
        return {
            "precision/loss_scale": self.scaler.get_scale(),
            "precision/skipped_steps": self.scaler.skipped_steps,
        }
