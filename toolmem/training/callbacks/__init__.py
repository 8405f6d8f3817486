"""What happens beside training: speed, recall, checkpoints, progress."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "BatchSizeWarmup": "toolmem.training.callbacks.batch_size",
        "EMA": "toolmem.training.callbacks.ema",
        "Checkpointing": "toolmem.training.callbacks.checkpointing",
        "Flops": "toolmem.training.callbacks.flops",
        "Guard": "toolmem.training.callbacks.guard",
        "KnowledgeProbe": "toolmem.training.callbacks.knowledge",
        "MemoryUse": "toolmem.training.callbacks.memory",
        "NormProbe": "toolmem.training.callbacks.norms",
        "Preempted": "toolmem.training.callbacks.preemption",
        "Preemption": "toolmem.training.callbacks.preemption",
        "Profiling": "toolmem.training.callbacks.profiling",
        "Progress": "toolmem.training.callbacks.progress",
        "RecallProbe": "toolmem.training.callbacks.recall",
        "RoundProbe": "toolmem.training.callbacks.round_probe",
        "SkippedDocuments": "toolmem.training.callbacks.skipped_documents",
        "StopAt": "toolmem.training.callbacks.stopping",
        "TaskProbe": "toolmem.training.callbacks.tasks",
        "Throughput": "toolmem.training.callbacks.throughput",
        "TokenLossProbe": "toolmem.training.callbacks.token_losses",
    },
)
