"""Where a run's checkpoints are, and how one takes another's place.

    checkpoints/
      last.ckpt       the newest
      last-1.ckpt     the newest before it, and so on as far as Checkpointing.keep_last goes
      best.ckpt
      step_N.ckpt

Each is a file, or a folder where ranks wrote their own shards. None is ever changed: a new one takes the
name. So names of one step may share a file (hard links), where the file system has such.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from pathlib import Path

from toolmem.checkpoints.stored import is_sharded
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, sync_folder

LAST = "last.ckpt"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def exists(path: Path) -> bool:
    """Whether there is a checkpoint of either form."""
    return path.is_file() or is_sharded(path)


def present(path: Path) -> str:
    """In words, what checkpoints are there instead of the one at ``path``."""
    folder = path if path.is_dir() and not is_sharded(path) else path.parent
    found = sorted(p.name for p in folder.glob("*.ckpt")) if folder.is_dir() else []
    if found:
        return f"{folder} holds {', '.join(found[:8])}"
    if folder.is_dir():
        return f"{folder} holds no *.ckpt file"
    return f"the folder {folder} does not exist"


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by ``path``: a file, a folder of shards, a ``checkpoints`` folder, or a run's.

    Of a run's folder, ``last.ckpt`` is taken.

    Raises:
        ToolmemError: when there is none.
    """
    path = Path(path)
    for candidate in (path, path / LAST, path / "checkpoints" / LAST):
        if exists(candidate):
            return candidate
    if not path.exists():
        raise ToolmemError(f"no such checkpoint or run folder: {path}")
    raise ToolmemError(
        f"no checkpoint in {path}: {present(folder_of(path))}; name a run's folder or a .ckpt"
    )


def folder_of(path: str | Path) -> Path:
    """The folder of a run's checkpoints.

    Args:
        path: it, or the run's.
    """
    path = Path(path)
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def kept(path: str | Path) -> list[Path]:
    """Every checkpoint of a run in the order of training: what it kept by step, then the last.

    The last may be of the same step as the one before it. Of one checkpoint, that alone.

    Args:
        path: a run's folder, or a checkpoint.

    Raises:
        ToolmemError: when there is none.
    """
    path = Path(path)
    if exists(path):
        return [path]
    folder = folder_of(path)
    numbered = {file.stem.removeprefix("step_"): file for file in folder.glob("step_*.ckpt")}
    by_step = [numbered[n] for n in sorted((n for n in numbered if n.isdigit()), key=int)]
    last = folder / LAST
    found = by_step + ([last] if exists(last) else [])
    return found or [resolve(path)]


def run_folder(path: str | Path) -> Path:
    """The run's folder that a checkpoint belongs to."""
    file = resolve(path)
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def earlier(path: Path, number: int) -> Path:
    """Where the ``number``-th before the newest at ``path`` is kept."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def keep_earlier(path: Path, count: int) -> None:
    """Before a new one takes the name ``path``, keep what has it, and those before.

    At no moment is the name without a checkpoint, where the file system has hard links.

    Args:
        path: of the newest.
        count: how many to keep, the new one included.
    """
    if count < 2 or not exists(path):
        return
    for number in range(count - 1, 1, -1):
        if exists(earlier(path, number - 1)):
            replace(earlier(path, number - 1), earlier(path, number))
    copy(path, earlier(path, 1))


def copy(source: Path, target: Path) -> None:
    """Give a checkpoint another name too; it takes no more space where there are hard links.

    Raises:
        ToolmemError: when the folder cannot be written or the disk is full.
    """
    if source.is_dir():
        temporary = part_of(target)
        try:
            temporary.mkdir()
            for file in source.iterdir():
                _link(file, temporary / file.name)
            replace(temporary, target)
        finally:
            remove(temporary)
    else:
        make_room(target)
        with atomic_path(target, sync=False) as file:
            _link(source, file)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (
            errno.EPERM,
            errno.EOPNOTSUPP,
            errno.EMLINK,
            errno.EXDEV,
            errno.ENOSYS,
        ):
            raise
        shutil.copyfile(source, target)
        with open(target, "rb") as stream:
            os.fsync(stream.fileno())


def part_of(target: Path, token: str = "") -> Path:
    """A name beside ``target`` for what is to take its place, which `remove_unfinished` knows."""
    return target.with_name(f".{target.name}.{token or os.getpid()}.part")


def make_room(target: Path) -> None:
    """Move a folder away that has the name a file is to take."""
    if target.is_dir():
        aside = part_of(target, "old")
        replace(target, aside)
        remove(aside)


def replace(source: Path, target: Path) -> None:
    """Let ``source`` take the name ``target``, whatever has it now: files and folders.

    In one step; but a folder takes another's place in two where the system cannot exchange names.
    """
    if target.is_dir() or (source.is_dir() and target.exists()):
        if _exchange(source, target):
            remove(source)
            sync_folder(target.parent)
            return
        aside = part_of(target, "old")
        remove(aside)
        target.rename(aside)
        source.rename(target)
        remove(aside)
    else:
        source.replace(target)
    sync_folder(target.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Let two names change places in one step, where the system can (Linux's renameat2)."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return (
        renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
    )


def remove(path: Path) -> None:
    """Remove a checkpoint of either form, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
