"""Generation: sampling, the naive loop, and the batched generator that must equal it."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Event": "toolmem.generation.batched",
        "Generated": "toolmem.generation.reference",
        "Greedy": "toolmem.generation.sampling",
        "Sampler": "toolmem.generation.sampling",
        "Sampling": "toolmem.generation.sampling",
        "generate": "toolmem.generation.batched",
        "generate_naive": "toolmem.generation.reference",
        "stream": "toolmem.generation.batched",
    },
)
