"""A checkpoint on disk, in either of its forms.

One file (``last.ckpt``) is a safetensors file. A folder of the same name, which sharded runs write, holds
``rank_0.safetensors``, ``rank_1.safetensors``, ...: each rank's pieces of the tensors, without a word between
the ranks while they write. In both, the metadata of the (first) file has

    format           pt
    toolmem.format   2
    toolmem.version  the toolmem that wrote it
    toolmem.state    JSON: all that is no tensor (``state.py``)

and of a folder's files

    toolmem.save     the same in all of them
    toolmem.ranks    how many they are
    toolmem.chunks   {NAME IN THE FILE: {"tensor": NAME, "offset": [...], "shape": shape of the whole}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.checkpoints import tensor_files
from toolmem.checkpoints.state import Flat
from toolmem.checkpoints.tensor_files import DamagedError, Entry, TensorFile
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT = 2
FIRST_SHARD = "rank_0.safetensors"


def metadata(tree: Mapping[str, Any] | None) -> dict[str, str]:
    """What a file's header says beside its tensors.

    Args:
        tree: all that is no tensor; None in files that have none of it.
    """
    found = {
        "format": "pt",
        "toolmem.format": str(FORMAT),
        "toolmem.version": toolmem.__version__,
    }
    if tree is not None:
        found["toolmem.state"] = json.dumps(tree, separators=(",", ":"), ensure_ascii=False)
    return found


def write_file(flat: Flat, path: Path) -> None:
    """Write a checkpoint as one file; not in one step, and not synced: see ``toolmem.files``."""
    tensor_files.write(path, flat.tensors, metadata(flat.tree))


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder that sharded runs write as a checkpoint."""
    return (path / FIRST_SHARD).is_file()


@dataclass(frozen=True)
class Chunk:
    """A piece of a tensor.

    Args:
        offset: of its first element in the whole tensor.
        file: where it is.
        name: what it is called there.
    """

    offset: tuple[int, ...]
    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        """Where it lies in its file."""
        return self.file.entries[self.name]

    def read(self) -> Tensor:
        """Its elements."""
        return self.file.read(self.name)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a checkpoint, as it lies on disk.

    Args:
        name: its own.
        shape: of the whole.
        dtype: as safetensors calls it.
        chunks: the pieces that it is in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """As torch calls it."""
        return tensor_files.dtypes()[self.dtype]

    def read(self) -> Tensor:
        """All of it, in memory of its own.

        Raises:
            DamagedError: when it is not what was written, or pieces are missing.
        """
        import torch

        first = self.chunks[0].read()
        if len(self.chunks) == 1 and tuple(first.shape) == self.shape:
            return first
        whole = torch.empty(self.shape, dtype=first.dtype)
        found = 0
        for chunk in self.chunks:
            piece = first if chunk is self.chunks[0] else chunk.read()
            where = tuple(
                slice(begin, begin + size)
                for begin, size in zip(chunk.offset, piece.shape, strict=True)
            )
            whole[where] = piece
            found += piece.numel()
        if found != whole.numel():
            raise DamagedError(
                f"{self.chunks[0].file.path.parent}: {whole.numel() - found} elements of the tensor "
                f"{self.name} are missing"
            )
        return whole


class Stored:
    """An open checkpoint: its state at hand, its tensors still on disk.

    Args:
        path: the file, or the folder.

    Raises:
        DamagedError: when it is not what was written.
        ToolmemError: when it is no checkpoint of ours, or of a format that this version does not know.
        OSError: when it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.files: list[TensorFile] = []
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        sharded = self.path.is_dir()
        first = self._open_file(self.path / FIRST_SHARD if sharded else self.path)
        text = first.metadata.get("toolmem.state")
        if text is None:
            raise ToolmemError(
                f"{self.path} is a safetensors file, but no checkpoint that toolmem wrote: `toolmem convert` "
                "takes weights from such files"
            )
        self.tree: dict[str, Any] = json.loads(text)
        if sharded:
            for rank in range(1, int(first.metadata["toolmem.ranks"])):
                self._open_file(self.path / f"rank_{rank}.safetensors")
            if len({file.metadata.get("toolmem.save") for file in self.files}) > 1:
                raise DamagedError(f"{self.path}: its files are of several saves")
            self.tensors = self._join()
        else:
            self.tensors = {
                name: StoredTensor(
                    name,
                    tuple(entry.shape),
                    entry.dtype,
                    (Chunk((0,) * len(entry.shape), first, name),),
                )
                for name, entry in first.entries.items()
            }

    def _open_file(self, path: Path) -> TensorFile:
        file = TensorFile(path)
        self.files.append(file)
        found = file.metadata.get("toolmem.format")
        if found is not None and found != str(FORMAT):
            raise ToolmemError(unknown_format(path, found, file.metadata.get("toolmem.version")))
        return file

    def _join(self) -> dict[str, StoredTensor]:
        chunks: dict[str, list[Chunk]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            for name, about in json.loads(file.metadata["toolmem.chunks"]).items():
                chunk = Chunk(tuple(about["offset"]), file, name)
                chunks.setdefault(about["tensor"], []).append(chunk)
                shapes[about["tensor"]] = tuple(about["shape"])
        return {
            name: StoredTensor(name, shapes[name], found[0].entry.dtype, tuple(found))
            for name, found in chunks.items()
        }

    def read(self, name: str) -> Tensor:
        """A tensor by its name.

        Raises:
            DamagedError: when it is not what was written, or missing.
        """
        if name not in self.tensors:
            raise DamagedError(f"{self.path}: the tensor {name} is missing")
        return self.tensors[name].read()

    def check(self) -> None:
        """Read all that there is, and keep nothing.

        Raises:
            DamagedError: naming the first tensor that is not what was written.
        """
        for file in self.files:
            file.check()

    def __enter__(self) -> Stored:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its files."""
        for file in self.files:
            file.close()


def unknown_format(path: str | Path, found: Any, version: Any) -> str:
    """The message for a format that only another version knows."""
    return (
        f"{path} has checkpoint format {found}, written by toolmem {version}; this version "
        f"({toolmem.__version__}) reads formats 1 to {FORMAT}: use a newer toolmem"
    )
