"""Reading checkpoints of every format that there was, and writing the newest.

1   one ``torch.save`` file (toolmem 0.1)
2   safetensors files (``stored.py``); random numbers and the config kept, optimizer states by name
"""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.checkpoints.places import exists, keep_earlier, make_room, present
from toolmem.checkpoints.state import Flat, flatten, unflatten
from toolmem.checkpoints.stored import FORMAT, Stored, is_sharded, unknown_format, write_file
from toolmem.checkpoints.tensor_files import DamagedError
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    import torch

KEY = "toolmem"


# What reading stumbles by where a file is damaged, or was made to look like one.
FORGED = (
    DamagedError, OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError,
    MemoryError,
)  # fmt: skip


class UnreadableError(ToolmemError):
    """A checkpoint is truncated, corrupt, or something else."""


def write(checkpoint: Mapping[str, Any], path: str | Path, durable: bool = True) -> None:
    """Write a checkpoint in one step: temporary name, synced to disk, renamed.

    Args:
        checkpoint: plain data and tensors within each other.
        path: of the file.
        durable: sync the folder too: after a power cut the new file is there, and not perhaps the old one.

    Raises:
        ToolmemError: when the folder cannot be written or the disk is full, or it holds something else
            than plain data.
    """
    write_flat(flatten(checkpoint), Path(path), durable=durable)


def write_flat(flat: Flat, path: Path, keep: int = 1, durable: bool = True) -> None:
    """The same of one that was taken apart.

    Args:
        flat: the checkpoint.
        path: of the file.
        keep: how many of the name to keep, this one included (``last-1.ckpt``, ...).
        durable: sync the folder, too.
    """
    with atomic_path(path, durable=durable) as temporary:
        write_file(flat, temporary)
        keep_earlier(path, keep)
        make_room(path)


def read(
    path: str | Path,
    map_location: torch.device | str | None = "cpu",
    parts: Collection[str] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint, of whatever form and format; nothing in it is ever run.

    Args:
        path: a file, or a folder of shards.
        map_location: the device to put tensors on.
        parts: keys to read, the others being left on disk; None reads all.

    Raises:
        ToolmemError: when it is missing, truncated, corrupt, or no checkpoint.
    """
    path = Path(path)
    if not exists(path):
        raise ToolmemError(f"no checkpoint at {path}: {present(path)}")
    if not is_sharded(path) and is_torch_file(path):
        checkpoint = _read_torch(path, map_location)
        return {key: checkpoint[key] for key in checkpoint if parts is None or key in parts}
    with explained(path), Stored(path) as stored:
        found: dict[str, torch.Tensor] = {}

        def tensor(name: str) -> torch.Tensor:
            if name not in found:
                found[name] = stored.read(name).to(map_location or "cpu")
            return found[name]

        return {
            key: unflatten(value, tensor)
            for key, value in stored.tree.items()
            if parts is None or key in parts
        }


def read_state(path: str | Path) -> dict[str, Any]:
    """All of a checkpoint that is no tensor: quick, whatever its size. Where tensors were is None.

    Raises:
        ToolmemError: when it is missing, corrupt, or no checkpoint.
    """
    path = Path(path)
    if not exists(path) or (not is_sharded(path) and is_torch_file(path)):
        return read(path)
    with explained(path), Stored(path) as stored:
        return unflatten(_without_tensors(stored.tree), _no_tensor)


def _without_tensors(tree: Any) -> Any:
    if isinstance(tree, list):
        return [_without_tensors(one) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1 and next(iter(tree)) in ("$tensor", "$array"):
        return None
    return {key: _without_tensors(one) for key, one in tree.items()}


def _no_tensor(name: str) -> torch.Tensor:
    raise AssertionError(name)


def check(path: str | Path) -> None:
    """Read a checkpoint through, and keep nothing.

    Raises:
        ToolmemError: when it is missing, truncated, corrupt, or no checkpoint.
    """
    path = Path(path)
    if not exists(path) or (not is_sharded(path) and is_torch_file(path)):
        if path.is_file() and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise unreadable(path, DamagedError(f"{damaged} in it is damaged"))
        read(path)
        return
    with explained(path), Stored(path) as stored:
        stored.check()


def is_torch_file(path: Path) -> bool:
    """Whether a file is of ``torch.save``."""
    with open(path, "rb") as stream:
        head = stream.read(9)
    # a zip file, and what torch wrote before 1.6; but a safetensors file begins with the length of its
    # header, which may have these bytes, too, and then with the header
    return head[:2] in (b"PK", b"\x80\x02") and head[8:] != b"{"


def _read_torch(path: Path, map_location: Any) -> dict[str, Any]:
    import torch

    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here, all of them: cannot be read
        raise unreadable(path, error) from error
    if not isinstance(checkpoint, dict):
        raise ToolmemError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return migrate(checkpoint, path)


def migrate(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Bring a checkpoint of an older format to the newest; one that is not ours is left as it is.

    What an old one has not got (random numbers, the config) stays missing. Its optimizer states are by
    number, which whoever goes on training takes as well.

    Raises:
        ToolmemError: for a format that only a newer version knows.
    """
    about = checkpoint.get(KEY)
    if not isinstance(about, dict) or about.get("format") == FORMAT:
        return checkpoint
    if about.get("format") != 1:
        raise ToolmemError(unknown_format(path, about.get("format"), about.get("version")))
    return {**checkpoint, KEY: {**about, "format": FORMAT}}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """In here what reading a damaged checkpoint stumbles by becomes an `UnreadableError`."""
    try:
        yield
    except FORGED as error:
        if isinstance(error, ToolmemError) and not isinstance(error, DamagedError):
            raise  # it says more itself: an unknown format
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> UnreadableError:
    """The error for a checkpoint that is damaged."""
    reason = first_line(error).removeprefix(f"{path}: ")
    return UnreadableError(
        f"{path} cannot be read as a checkpoint ({reason}): it is truncated, corrupt "
        "or something else; use an earlier checkpoint of the run, or train again"
    )


def first_line(error: BaseException) -> str:
    """The first line of what an error says; its name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
