"""Writing files so that nobody ever sees half of one."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError


def explain_os_error(error: OSError, path: str | Path) -> ToolmemError:
    """Turn an operating system's refusal into a message that says what to do."""
    advice = {
        errno.ENOSPC: "the disk is full: free some space, or write elsewhere",
        errno.EDQUOT: "the disk quota is used up: free some space, or write elsewhere",
        errno.EACCES: "permission denied: choose a folder that you may write to",
        errno.EPERM: "permission denied: choose a folder that you may write to",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path",
        errno.EISDIR: "this is a folder: name a file",
        errno.ENAMETOOLONG: "the name is too long: choose a shorter one",
    }
    reason = advice.get(error.errno or 0, error.strerror or str(error))
    return ToolmemError(f"cannot write {path}: {reason}")


@contextmanager
def atomic_path(path: str | Path, *, sync: bool = True, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced to disk and renamed, else removed.

    Args:
        path: the file to be written; its folder is created when missing.
        sync: False where what lies at the temporary path is on disk already.
        durable: sync the folder too, so that the new file is there even after a power cut.

    Raises:
        ToolmemError: when the folder cannot be written or the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            dir=target.parent, prefix=f".{target.name[:64]}.", suffix=".part"
        )
        os.close(descriptor)
    except OSError as error:
        raise explain_os_error(error, target) from error
    temporary = Path(name)
    temporary.unlink()  # some writers (DuckDB) want to create the file themselves
    try:
        yield temporary
        if sync:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
        if target.exists():
            temporary.chmod(target.stat().st_mode & 0o777)
        temporary.replace(target)
        if durable:
            sync_folder(target.parent)
    except OSError as error:
        raise explain_os_error(error, target) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, where the file system can be asked to."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not of every network's file system
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a killed process had not yet written to its end in a folder that no other writes to."""
    for path in Path(folder).glob(".*.part"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path`` in one step."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` in one step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def cache_folder() -> Path:
    """Where what can be made again is kept: ``TOOLMEM_CACHE``, or ``~/.cache/toolmem``."""
    folder = os.environ.get("TOOLMEM_CACHE")
    if folder:
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "toolmem"
