"""Generation: sampling, the naive loop, and the batched generator that must equal it."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Constraint": "toolmem.generation.sampling",
        "Event": "toolmem.generation.batched",
        "Generated": "toolmem.generation.reference",
        "Greedy": "toolmem.generation.sampling",
        "History": "toolmem.generation.sampling",
        "Hypothesis": "toolmem.generation.beam",
        "Sampler": "toolmem.generation.sampling",
        "Sampling": "toolmem.generation.sampling",
        "beam_search": "toolmem.generation.beam",
        "choose": "toolmem.generation.sampling",
        "contrastive_search": "toolmem.generation.contrastive",
        "generate": "toolmem.generation.batched",
        "generate_naive": "toolmem.generation.reference",
        "n_best": "toolmem.generation.beam",
        "stream": "toolmem.generation.batched",
    },
)
