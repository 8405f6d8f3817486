"""Measuring what a model knows."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Recall": "toolmem.evaluation.recall",
        "RecallResult": "toolmem.evaluation.recall",
        "Score": "toolmem.evaluation.recall",
        "is_recalled": "toolmem.evaluation.recall",
        "measure_recall": "toolmem.evaluation.recall",
    },
)
