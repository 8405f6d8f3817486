"""Measuring what a model knows."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "DraftAccuracy": "toolmem.evaluation.drafts",
        "Knowledge": "toolmem.evaluation.knowledge",
        "Recall": "toolmem.evaluation.recall",
        "RecallResult": "toolmem.evaluation.recall",
        "Score": "toolmem.evaluation.recall",
        "draft_accuracy": "toolmem.evaluation.drafts",
        "is_recalled": "toolmem.evaluation.recall",
        "measure_knowledge": "toolmem.evaluation.knowledge",
        "measure_recall": "toolmem.evaluation.recall",
        "KindLoss": "toolmem.evaluation.token_losses",
        "TokenLossTest": "toolmem.evaluation.token_losses",
        "measure_token_losses": "toolmem.evaluation.token_losses",
        "token_kinds": "toolmem.evaluation.token_losses",
    },
)
