"""Training any model: one LightningModule; optimizers, schedules, metrics, loggers, callbacks."""

from toolmem._lazy import attach
from toolmem.training.defaults import TRAINER_DEFAULTS

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LanguageModelModule": "toolmem.training.module",
        "GRPO": "toolmem.training.grpo",
        "PopulationModule": "toolmem.training.population",
        "export_member": "toolmem.training.members",
        "Member": "toolmem.training.members",
        "OptimizerConfig": "toolmem.training.optimizers",
        "AdamW": "toolmem.training.optimizers",
        "Muon": "toolmem.training.optimizers",
        "Schedule": "toolmem.training.schedules",
        "Constant": "toolmem.training.schedules",
        "Cosine": "toolmem.training.schedules",
        "InverseSqrt": "toolmem.training.schedules",
        "Linear": "toolmem.training.schedules",
        "WSD": "toolmem.training.schedules",
        "CSVLogger": "toolmem.training.loggers",
        "BatchSizeWarmup": "toolmem.training.callbacks",
        "Checkpointing": "toolmem.training.callbacks",
        "EMA": "toolmem.training.callbacks",
        "Flops": "toolmem.training.callbacks",
        "Guard": "toolmem.training.callbacks",
        "KnowledgeProbe": "toolmem.training.callbacks",
        "MemoryUse": "toolmem.training.callbacks",
        "NormProbe": "toolmem.training.callbacks",
        "Progress": "toolmem.training.callbacks",
        "RecallProbe": "toolmem.training.callbacks",
        "TaskProbe": "toolmem.training.callbacks",
        "Throughput": "toolmem.training.callbacks",
        "TokenLossProbe": "toolmem.training.callbacks",
    },
)
__all__ += ["TRAINER_DEFAULTS"]
