"""Parallel training, applied to models from outside: sharded data parallelism (FSDP2), tensor parallelism,
sequence parallelism, for Lightning's ``ModelParallelStrategy``; and what DDP needs.
"""

from toolmem.training.parallel.apply import parallelize
from toolmem.training.parallel.ranks import Ranks

__all__ = ["Ranks", "parallelize"]
