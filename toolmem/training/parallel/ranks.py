"""Which processes read different data, and which share the work on the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

DATA, TENSOR = "data_parallel", "tensor_parallel"  # Lightning's names of its mesh's dimensions


@dataclass(frozen=True)
class Ranks:
    """A process among the others.

    Args:
        data_rank: its number among those that read different data.
        data_size: how many there are.
        tensor_rank: its number among those that read the same data and share a model's layers.
        tensor_size: how many there are.
        data_group: processes that have the same part of the model; None for all there are.
        tensor_group: processes that read the same data; None where each reads its own.
    """

    data_rank: int = 0
    data_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    data_group: ProcessGroup | None = None
    tensor_group: ProcessGroup | None = None

    @classmethod
    def of_mesh(cls, mesh: DeviceMesh) -> Ranks:
        """Those of ``ModelParallelStrategy``."""
        data, tensor = mesh[DATA], mesh[TENSOR]
        return cls(
            data.get_local_rank(),
            data.size(),
            tensor.get_local_rank(),
            tensor.size(),
            data.get_group(),
            tensor.get_group(),
        )

    @classmethod
    def of_trainer(cls, trainer: Any) -> Ranks:
        """Those of a trainer's strategy."""
        mesh = getattr(trainer.strategy, "_device_mesh", None)
        if mesh is not None:
            return cls.of_mesh(mesh)
        return cls(trainer.global_rank, trainer.world_size)
