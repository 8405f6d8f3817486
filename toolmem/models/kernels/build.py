"""The C code, compiled on first use for the processor it runs on.

What is built is kept in the cache folder under a name made of all that decides it (source, flags,
compiler, processor) and renamed to it in one step, so that processes that build at once do no harm.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, cache_folder

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.c")
FLAGS = ("-O3", "-march=native", "-fPIC", "-shared", "-std=gnu11")
# Tried in order: without OpenMP one thread does all.
VARIANTS = (("-fopenmp",), ())
SECONDS = 300  # a compiler that takes longer is no help


class UnavailableError(Exception):
    """Why there are no kernels."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled code, or None where there is none: then plain torch serves.

    ``TOOLMEM_KERNELS=0`` switches it off; ``CC`` names another compiler than ``cc``.
    """
    if os.environ.get("TOOLMEM_KERNELS") == "0":
        return None
    try:
        return _declare(ctypes.CDLL(str(_built())))
    except (UnavailableError, OSError, ToolmemError) as reason:
        log.info("no kernels for decoding on the CPU, torch's own serve: %s", reason)
        return None


def available() -> bool:
    """Whether the compiled kernels are there; the first call may compile them (a few seconds)."""
    return library() is not None


def _built() -> Path:
    if sys.platform not in ("linux", "darwin"):
        raise UnavailableError(f"not built on {sys.platform}")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    version = _run([*compiler, "--version"])
    source = b"".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.c")))
    said = "no output"
    for variant in VARIANTS:
        flags = (*FLAGS, *variant)
        identity = [*compiler, version, *flags, _processor()]
        digest = hashlib.sha256("\n".join(identity).encode() + source).hexdigest()[:24]
        path = cache_folder() / "kernels" / f"{digest}.so"
        if path.exists():
            return path
        try:
            with atomic_path(path) as temporary:
                command = [*compiler, *flags, str(SOURCE), "-o", str(temporary), "-lm"]
                _run(command)
                ctypes.CDLL(str(temporary))  # that it can be loaded, before it is kept
            return path
        except (UnavailableError, OSError) as reason:
            said = str(reason)
    raise UnavailableError(said)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            check=True,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or ""
        raise UnavailableError(f"{error} {output}".strip()) from error
    return done.stdout


def _processor() -> str:
    """What ``-march=native`` depends on, as far as the system tells it."""
    names = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _declare(built: ctypes.CDLL) -> ctypes.CDLL:
    pointer, long, real, whole = ctypes.c_void_p, ctypes.c_long, ctypes.c_float, ctypes.c_int
    # x, m, weight, is it bfloat16, outputs, inputs, bias, y, threads
    built.linear.argtypes = [pointer, long, pointer, whole, long, long, pointer, pointer, whole]
    built.linear.restype = None
    # queries, keys and values, each with the step from row to row; pages of keys and values, how many;
    # tables, their columns, lengths; y; lanes, heads, key/value heads, head_dim, page size; scale,
    # softcap, threads
    arguments: list[Any] = (
        [pointer, long] * 3
        + [pointer, pointer, long]
        + [pointer, long, pointer, pointer]
        + [long] * 5
        + [real, real, whole]
    )
    built.paged_attention.argtypes = arguments
    built.paged_attention.restype = whole
    # shape, layers, ends, tokens, x, rows, cosines, sines, tables, their columns, lengths, slots, room,
    # kept
    whole_model: list[Any] = [pointer] * 5 + [long] + [pointer] * 3 + [long] + [pointer] * 4
    built.decode_blocks.argtypes = whole_model
    built.decode_blocks.restype = whole
    # logits, rows, vocabulary, tokens, log-probabilities
    built.likeliest.argtypes = [pointer, long, long, pointer, pointer]
    built.likeliest.restype = None
    # shape, where to write the numbers of room and of gradients
    built.train_sizes.argtypes = [pointer] * 3
    built.train_sizes.restype = None
    # shape, layers, the last norm's gain and epsilon, cosines, sines, x, y, room
    built.train_forward.argtypes = [pointer] * 3 + [real] + [pointer] * 5
    built.train_forward.restype = None
    # shape, layers, the last norm's gain, cosines, sines, dy, dx, room, gradients
    built.train_backward.argtypes = [pointer] * 9
    built.train_backward.restype = None
    built.read_all.argtypes = [pointer, long]
    built.read_all.restype = real
    return built
