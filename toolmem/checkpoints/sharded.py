"""Checkpoints of sharded runs: each rank writes its own pieces, and any number of ranks reads its own.

Where pieces lie, and which of them a rank needs, is worked out by ``torch.distributed.checkpoint``: its
planners know every layout of a ``DTensor`` (FSDP2, tensor parallelism, both). Its own files are pickles, so
ours are written in their stead (``stored.py``). While writing, ranks do not talk: rank 0 waits until the
files of all are there, and then gives the folder its name. So it may be done in the background.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, load
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.distributed.tensor import DTensor, Replicate
from torch.futures import Future

from toolmem.checkpoints import tensor_files
from toolmem.checkpoints.stored import Stored, metadata
from toolmem.checkpoints.tensor_files import DamagedError
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, sync_folder

if TYPE_CHECKING:
    from toolmem.checkpoints.state import Flat

PATIENCE = 1800.0  # seconds that rank 0 waits for the others' files


@dataclass(frozen=True)
class Piece:
    """What a rank writes of a tensor.

    Args:
        tensor: the piece, in memory or on disk.
        name: of the whole.
        offset: of its first element in the whole.
        shape: of the whole.
    """

    tensor: Any
    name: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


def pieces(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Piece]:
    """What this rank is to write: its own pieces, and of what several ranks have, the first one's.

    Args:
        tensors: by name; those that are no ``DTensor`` are the same on every rank.
        rank: this one's.

    Returns:
        by the name in the rank's file.
    """
    found: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            if rank == 0:
                found[name] = Piece(tensor, name, (0,) * tensor.ndim, tuple(tensor.shape))
            continue
        place = tensor.device_mesh.get_coordinate()
        if place is None or any(
            coordinate and isinstance(placement, Replicate)
            for coordinate, placement in zip(place, tensor.placements, strict=True)
        ):
            continue
        planner = DefaultSavePlanner()
        planner.set_up_planner({name: tensor}, is_coordinator=False)
        for item in planner.create_local_plan().items:
            assert item.tensor_data is not None
            chunk = item.tensor_data.chunk
            if math.prod(chunk.sizes) == 0:
                continue
            offset = tuple(chunk.offsets)
            local = planner.resolve_data(item)
            assert isinstance(local, Tensor)
            key = f"{name}@{','.join(map(str, offset))}"
            found[key] = Piece(local.detach(), name, offset, tuple(tensor.shape))
    return found


def write_shard(
    folder: Path,
    rank: int,
    ranks: int,
    save: str,
    tree: Mapping[str, Any],
    own: Mapping[str, Piece],
    tensors: Mapping[str, Any],
) -> None:
    """Write one rank's file; when that fails, say so to rank 0.

    Args:
        folder: of the checkpoint that is being written; it exists.
        rank: this one's.
        ranks: how many there are.
        save: a word that the files of this save have in common.
        tree: all that is no tensor; rank 0 writes it.
        own: what the rank writes, by name in its file.
        tensors: the same names, the elements to write.

    Raises:
        ToolmemError: when the disk is full, or otherwise refuses.
    """
    path = folder / f"rank_{rank}.safetensors"
    about = {
        key: {"tensor": piece.name, "offset": piece.offset, "shape": piece.shape}
        for key, piece in own.items()
    }
    header = metadata(tree if rank == 0 else None) | {
        "toolmem.save": save,
        "toolmem.ranks": str(ranks),
        "toolmem.chunks": json.dumps(about, separators=(",", ":")),
    }
    try:
        with atomic_path(path) as temporary:
            tensor_files.write(temporary, tensors, header)
    except ToolmemError as error:
        _say_failed(folder, rank, error)
        raise


def _say_failed(folder: Path, rank: int, error: ToolmemError) -> None:
    try:
        (folder / f"rank_{rank}.failed").write_text(str(error), encoding="utf-8")
    except OSError:  # not even that: rank 0 loses its patience
        return


def wait_for_all(folder: Path, ranks: int, patience: float = PATIENCE) -> None:
    """Rank 0: until every rank's file is there.

    Args:
        folder: of the checkpoint that is being written.
        ranks: how many there are.
        patience: seconds.

    Raises:
        ToolmemError: when one of them failed, or takes too long.
    """
    end = time.monotonic() + patience
    missing = list(range(ranks))
    while missing:
        missing = [r for r in missing if not (folder / f"rank_{r}.safetensors").is_file()]
        for rank in missing:
            failure = folder / f"rank_{rank}.failed"
            if failure.is_file():
                raise ToolmemError(f"rank {rank} failed: {failure.read_text(encoding='utf-8')}")
        if missing and time.monotonic() > end:
            raise ToolmemError(
                f"{folder}: the files of ranks {missing[:8]} are not there after {patience:.0f} s: is the "
                "folder shared by all nodes?"
            )
        if missing:
            time.sleep(0.01)
    sync_folder(folder)


def write_folder(flat: Flat, folder: Path, ranks: int) -> None:
    """Write whole tensors as ``ranks`` files, as so many ranks would: each tensor cut along its rows.

    Args:
        flat: the checkpoint; no ``DTensor``. What is on disk is read a tensor at a time, once a file.
        folder: to write in; it exists.
        ranks: how many files.

    Raises:
        ToolmemError: when the disk is full, or otherwise refuses.
    """
    for rank in range(ranks):
        own: dict[str, Piece] = {}
        for name, tensor in flat.tensors.items():
            shape = tuple(tensor.shape)
            offset = (0,) * len(shape)
            if math.prod(shape) == 0 or not shape:
                if rank == 0:
                    own[name] = Piece(tensor, name, offset, shape)
                continue
            size = -(-shape[0] // ranks)
            begin, end = rank * size, min((rank + 1) * size, shape[0])
            if begin < end:
                offset = (begin, *offset[1:])
                rows = _Rows(tensor, begin, end)
                own[f"{name}@{','.join(map(str, offset))}"] = Piece(rows, name, offset, shape)
        write_shard(
            folder, rank, ranks, "whole", flat.tree, own, {k: p.tensor for k, p in own.items()}
        )


@dataclass(frozen=True)
class _Rows:
    """Some rows of a tensor, in memory or on disk."""

    whole: Any
    begin: int
    end: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.end - self.begin, *self.whole.shape[1:])

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.whole.dtype if isinstance(self.whole, Tensor) else self.whole.torch_dtype

    def read(self) -> Tensor:
        whole = self.whole if isinstance(self.whole, Tensor) else self.whole.read()
        return whole[self.begin : self.end]


class _Reader(StorageReader):
    """``torch.distributed.checkpoint``'s view of a checkpoint of ours, of either form."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Which pieces there are of each tensor."""
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=one.torch_dtype),
                    torch.Size(one.shape),
                    [
                        ChunkStorageMetadata(
                            torch.Size(chunk.offset), torch.Size(chunk.entry.shape)
                        )
                        for chunk in one.chunks
                    ],
                )
                for name, one in self.stored.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any
    ) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is asked for, reading each piece once."""
        asked: dict[tuple[str, tuple[int, ...]], list[Any]] = {}
        for item in plan.items:
            offset = tuple(item.storage_index.offset or ())
            asked.setdefault((item.storage_index.fqn, offset), []).append(item)
        for (name, offset), items in asked.items():
            chunks = self.stored.tensors[name].chunks
            piece = next(chunk for chunk in chunks if chunk.offset == offset).read()
            for item in items:
                target = planner.resolve_tensor(item).detach()
                source = piece
                for dim, (begin, size) in enumerate(
                    zip(item.storage_offsets, item.lengths, strict=True)
                ):
                    source = source.narrow(dim, begin, size)
                target.copy_(source)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        """Nothing is found by its id."""
        return False


def fill(stored: Stored, targets: Mapping[str, Tensor]) -> None:
    """Read tensors into others of the same shape, which may be ``DTensor``s of any layout.

    Each rank reads the pieces that it needs; nothing is sent.

    Args:
        stored: the checkpoint.
        targets: by name; changed in place.

    Raises:
        DamagedError: when something is missing, or not what was written.
    """
    if not targets:
        return
    for name, target in targets.items():
        kept = stored.tensors.get(name)
        size = math.prod(target.shape)
        if kept is None or sum(math.prod(chunk.entry.shape) for chunk in kept.chunks) != size:
            raise DamagedError(f"{stored.path}: the tensor {name} is missing, or pieces of it")
    load(
        dict(targets),
        storage_reader=_Reader(stored),
        planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        no_dist=True,
    )
