"""Names of what can run attention (``attention_kernels.py``), apart from all that needs torch."""

from __future__ import annotations

from typing import Literal

Kernel = Literal["sdpa", "flex", "flash", "plain"]
KernelChoice = Literal["auto", "sdpa", "flex", "flash", "plain"]
