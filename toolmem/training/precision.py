"""Which number formats this machine can train in."""

from __future__ import annotations

from toolmem.errors import ToolmemError

# Volta (V100) is 7.0; bfloat16 arithmetic came with Ampere, 8.0. torch.cuda.is_bf16_supported()
# counts emulation, which is slower than float32, so it is not asked.
BF16_CAPABILITY = (8, 0)


def has_fast_bf16(device: int = 0) -> bool:
    """Whether this CUDA device multiplies bfloat16 in hardware."""
    import torch

    return torch.cuda.get_device_capability(device) >= BF16_CAPABILITY


def check_precision(precision: object, accelerator: object = "auto") -> None:
    """Refuse a precision that this machine only emulates.

    Args:
        precision: ``trainer.precision``.
        accelerator: ``trainer.accelerator``.

    Raises:
        ToolmemError: for bfloat16 on a GPU without it (V100), naming what to use.
    """
    import torch

    wants_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if not (wants_gpu and str(precision).startswith("bf16")) or has_fast_bf16():
        return
    name = torch.cuda.get_device_name(0)
    major, minor = torch.cuda.get_device_capability(0)
    raise ToolmemError(
        f"trainer.precision {precision}: {name} (compute capability {major}.{minor}, Volta or older) "
        "has no bfloat16; use trainer.precision 16-mixed, or 32-true"
    )
