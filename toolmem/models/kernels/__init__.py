"""Plain C for decoding on a CPU: products of a few rows with a weight, attention over pages.

Built by the system's compiler on first use; without one, torch's own operations give the same results
(``TOOLMEM_KERNELS=0`` asks for them). Inference only: nothing here has a gradient.
"""

from toolmem.models.kernels import operators  # noqa: F401 - their registration
from toolmem.models.kernels.accelerate import accelerate
from toolmem.models.kernels.build import available
from toolmem.models.kernels.functions import MANY_ROWS, fast_linear, linear, paged_attention, usable

__all__ = [
    "MANY_ROWS",
    "accelerate",
    "available",
    "fast_linear",
    "linear",
    "paged_attention",
    "usable",
]
