"""What happens beside training: speed, recall, checkpoints, progress."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Checkpointing": "toolmem.training.callbacks.checkpointing",
        "Progress": "toolmem.training.callbacks.progress",
        "RecallProbe": "toolmem.training.callbacks.recall",
        "Throughput": "toolmem.training.callbacks.throughput",
    },
)
