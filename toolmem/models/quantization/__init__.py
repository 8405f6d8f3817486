"""Models in fewer bits: what each weight is stored as, and how many bits the whole takes, exactly.

``storage.py`` says what a stored model is, which weights are rounded, and what the others take; a
quantiser is a file beside it that returns a `Stored`.
"""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Storage": "toolmem.models.quantization.formats",
        "Stored": "toolmem.models.quantization.storage",
        "as_stored": "toolmem.models.quantization.formats",
        "rounded_to_nearest": "toolmem.models.quantization.round_to_nearest",
        "rounded_weights": "toolmem.models.quantization.storage",
    },
)
