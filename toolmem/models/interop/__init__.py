"""Other programs' models: what is ours of theirs, by name and by option, and the other way round."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Adapter": "toolmem.models.interop.adapter",
        "ARCHITECTURES": "toolmem.models.interop.architectures",
        "Architecture": "toolmem.models.interop.architectures",
        "architecture_of": "toolmem.models.interop.architectures",
        "GGUFFile": "toolmem.models.interop.gguf",
        "Rule": "toolmem.models.interop.rules",
        "take": "toolmem.models.interop.rules",
        "give": "toolmem.models.interop.rules",
    },
)
