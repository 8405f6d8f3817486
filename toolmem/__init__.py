"""toolmem: should a language model store facts in its weights, or learn to ask a tool for them?

``import toolmem`` is light: rooms load when they are first used.
"""

from toolmem._lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "load": "toolmem.run",
        "Run": "toolmem.run",
        "ToolmemError": "toolmem.errors",
        "allow_packages": "toolmem.class_path",
    },
)
__all__ += ["__version__"]
