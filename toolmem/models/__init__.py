"""Architectures: plain ``nn.Module``s that know nothing of Lightning, tokenizers or files."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "LanguageModel": "toolmem.models.language_model",
        "Transformer": "toolmem.models.transformer",
        "Cache": "toolmem.models.cache",
    },
)
