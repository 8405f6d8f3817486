"""What a checkpoint holds; writing and reading it; and a model rebuilt from it alone.

A checkpoint is plain data and tensors, never code, in safetensors files (``stored.py``). Beside what
Lightning keeps (weights, optimizers, schedules, loops, callbacks, the loader's state) it has

    random    random numbers of Python, NumPy, torch and CUDA, of each rank
    config    the run's config.yaml
    toolmem   {format     2
               version    the toolmem that wrote it
               model      {"class_path": "toolmem.models.Transformer", "init_args": {...}}
               data       {"tokenizer": {...}, "factbase": {"fingerprint": ...} | None, "setting": ..., ...}
               loggers    {NAME: run id}
               ...}
"""

from toolmem.checkpoints.fallback import newest_intact
from toolmem.checkpoints.formats import KEY, check, migrate, read, read_state, write
from toolmem.checkpoints.models import (
    WEIGHTS_PREFIX,
    LoadedCheckpoint,
    about_of,
    build_model,
    class_path,
    describe,
    load,
    weights_of,
)
from toolmem.checkpoints.places import exists, kept, resolve, run_folder
from toolmem.checkpoints.stored import FORMAT
from toolmem.checkpoints.tokenizers import tokenizer_spec
from toolmem.data import tokenizers

__all__ = [
    "FORMAT",
    "KEY",
    "WEIGHTS_PREFIX",
    "LoadedCheckpoint",
    "about_of",
    "build_model",
    "check",
    "class_path",
    "describe",
    "exists",
    "kept",
    "load",
    "migrate",
    "newest_intact",
    "read",
    "read_state",
    "resolve",
    "run_folder",
    "tokenizer_spec",
    "weights_of",
    "write",
]

if tokenizer_spec not in tokenizers.readers:  # so data.init_args.tokenizer may name a checkpoint
    tokenizers.readers.append(tokenizer_spec)
