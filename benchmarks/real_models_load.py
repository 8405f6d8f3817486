"""What loading and converting SmolLM2-135M takes, each in a process of its own.

Processor's seconds, because others may be at work, and wall time; the peak of memory over that of a process
that has only imported what is needed, in sizes of the float32 weights.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

REPEATS = 3
SCRIPT = """
    import json, sys, time
    import torch, tokenizers, toolmem.run, toolmem.generation, toolmem.models.transformer
    import toolmem.checkpoints.exports, toolmem.checkpoints.pretrained, toolmem.data.hf_tokenizer
    from toolmem.cli.convert import convert
    torch.set_num_threads(1)
    from pathlib import Path

    def peak():  # of this program: what getrusage says has the parent's in it, which is large
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(one.split()[1]) for one in lines if one.startswith("VmHWM:")) * 1024

    action, source, target, size = sys.argv[1:]
    before, cpu, wall = peak(), time.process_time(), time.perf_counter()
    if action == "load":
        run = toolmem.load(source)
    else:
        convert(source, target)
    times = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps([*times, (peak() - before) / int(size)]))
"""


def load(gguf: Path, checkpoint: Path) -> dict[str, Any]:
    """Medians of a few repeats.

    Args:
        gguf: the model's file.
        checkpoint: it as a checkpoint.
    """
    from toolmem.checkpoints.pretrained import open_model

    with open_model(checkpoint) as model:
        size = 4 * sum(math.prod(one.shape) for one in model.tensors.values())
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, action, source, target in (
            ("load", "load", checkpoint, "-"),
            ("convert_gguf_in", "convert", gguf, "in.ckpt"),
            ("convert_folder_out", "convert", checkpoint, "out/"),
            ("convert_gguf_out", "convert", checkpoint, "out.gguf"),
        ):
            rounds = []
            for repeat in range(REPEATS):
                place = f"{folder}/{repeat}_{target}"
                command = [
                    sys.executable,
                    "-c",
                    textwrap.dedent(SCRIPT),
                    action,
                    str(source),
                    place,
                    str(size),
                ]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                rounds.append(json.loads(done.stdout.splitlines()[-1]))
            cpu, wall, memory = (statistics.median(column) for column in zip(*rounds, strict=True))
            found[f"{name}_seconds"] = round(wall, 2)
            found[f"{name}_processor_seconds"] = round(cpu, 2)
            found[f"{name}_memory"] = round(memory, 2)
    return found
