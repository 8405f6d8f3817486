"""Generation: sampling, search, the naive loop, and the engine that must equal it."""

from toolmem._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "Constraint": "toolmem.generation.sampling",
        "DraftHeads": "toolmem.generation.speculative",
        "DraftModel": "toolmem.generation.speculative",
        "Engine": "toolmem.generation.engine",
        "EngineFull": "toolmem.generation.requests",
        "Event": "toolmem.generation.requests",
        "Generated": "toolmem.generation.reference",
        "Greedy": "toolmem.generation.sampling",
        "History": "toolmem.generation.sampling",
        "Handle": "toolmem.generation.requests",
        "Hypothesis": "toolmem.generation.beam",
        "Node": "toolmem.generation.tree",
        "PromptLookup": "toolmem.generation.lookup",
        "Ranks": "toolmem.generation.processes",
        "Request": "toolmem.generation.requests",
        "Sampler": "toolmem.generation.sampling",
        "Sampling": "toolmem.generation.sampling",
        "SharedToolbox": "toolmem.generation.lockstep",
        "beam_search": "toolmem.generation.beam",
        "choose": "toolmem.generation.sampling",
        "contrastive_search": "toolmem.generation.contrastive",
        "fork_all": "toolmem.generation.tree",
        "generate": "toolmem.generation.once",
        "generate_in_lockstep": "toolmem.generation.lockstep",
        "generate_naive": "toolmem.generation.reference",
        "n_best": "toolmem.generation.beam",
        "stream": "toolmem.generation.once",
    },
)
