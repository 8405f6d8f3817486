"""Our checkpoint files for Lightning's ``ModelParallelStrategy`` (FSDP2, tensor parallelism).

Lightning's own writes pickles. Here state dicts are what modules and optimizers say themselves, with a
``DTensor`` wherever a tensor is sharded; ``toolmem.checkpoints.sharded`` writes and reads the pieces.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from lightning.pytorch.strategies.fsdp import FSDPStrategy
from torch import Tensor
from torch.optim import Optimizer

from toolmem.checkpoints import places
from toolmem.checkpoints.background import WhenBusy
from toolmem.checkpoints.formats import explained, is_torch_file
from toolmem.checkpoints.state import Flat, flatten, unflatten
from toolmem.checkpoints.stored import Stored, StoredTensor
from toolmem.errors import ToolmemError
from toolmem.training.checkpoint_io import AtomicCheckpointIO, Saving
from toolmem.training.optimizer_names import plain_name

SHARDED_PARTS = ("state_dict", "current_model_state", "optimizer_states")


def take_over(strategy: Strategy, when_busy: WhenBusy = "wait") -> AtomicCheckpointIO | None:
    """Let a strategy write and read our files.

    Args:
        strategy: the trainer's; changed in place.
        when_busy: of saves in the background.

    Returns:
        what writes; None where the strategy or the user has ways of their own.
    """
    if isinstance(strategy, FSDPStrategy | DeepSpeedStrategy):
        return None
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO(when_busy)
    if not isinstance(strategy.checkpoint_io, AtomicCheckpointIO):
        return None
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, ShardedCheckpoints):
        # The user names Lightning's class in a recipe, and has built it before we see it.
        kind = type(strategy)
        strategy.__class__ = type(kind.__name__, (ShardedCheckpoints, kind), {})
    return strategy.checkpoint_io


class ShardedCheckpoints(ModelParallelStrategy):
    """Lightning's strategy, but for how it saves and loads."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Optimizers are restored after the model, as everywhere."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module says; every rank must call it."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer says; every rank must call it."""
        return (
            optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        ).state_dict()

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Hand it to the module."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Hand them to the optimizers."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(state)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write each rank's pieces to a folder, or, with ``save_distributed_checkpoint: false``, one file.

        Args:
            checkpoint: plain data and tensors.
            filepath: of the folder or file.
            storage_options: a `Saving`, or None.

        Raises:
            ToolmemError: without a `Saving`, when it cannot be written.
        """
        saving = storage_options or Saving()
        path = Path(self.broadcast(str(filepath)))
        flat = flatten(checkpoint)
        if self._save_distributed_checkpoint:
            self._save_pieces(flat, path, saving)
        else:
            self._save_whole(flat, path, saving)
        if storage_options is None and (error := self._io.writer.take_error()) is not None:
            raise error

    @property
    def _io(self) -> AtomicCheckpointIO:
        assert isinstance(self.checkpoint_io, AtomicCheckpointIO)
        return self.checkpoint_io

    def _save_whole(self, flat: Flat, path: Path, saving: Saving) -> None:
        from torch.distributed.tensor import DTensor

        whole: dict[str, Tensor] = {}
        for name, tensor in flat.tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_global_zero:
                whole[name] = full.cpu() if isinstance(tensor, DTensor) else full
        if self.is_global_zero:
            self._io.save_flat(Flat(flat.tree, whole), path, saving)

    def _save_pieces(self, flat: Flat, path: Path, saving: Saving) -> None:
        from toolmem.checkpoints.sharded import pieces, wait_for_all, write_shard

        rank, ranks = self.global_rank, self.world_size
        self._io.writer.copied()
        token = self.broadcast(secrets.token_hex(4))
        folder = places.part_of(path, token)
        own = pieces(flat.tensors, rank)
        folder.mkdir(parents=True, exist_ok=True)  # whoever comes first

        def write(tensors: Mapping[str, Tensor]) -> None:
            try:
                write_shard(folder, rank, ranks, token, flat.tree, own, tensors)
                if rank == 0:
                    wait_for_all(folder, ranks)
                    places.keep_earlier(path, saving.keep_last)
                    places.replace(folder, path)
                    for other in saving.also:
                        places.copy(path, other)
            finally:
                if rank == 0:
                    places.remove(folder)

        self._io.run(
            {key: piece.tensor for key, piece in own.items()},
            write,
            Saving(
                background=saving.background,
                later=lambda key: saving.later(own[key].name),
                # ranks that are not equally quick must not choose otherwise
                replaceable=False,
            ),
        )

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint of either form, however many ranks wrote it: each rank what it needs of it.

        Raises:
            ToolmemError: when it is missing, truncated or corrupt, or of an old format.
        """
        self._io.writer.wait()
        path = Path(self.broadcast(str(checkpoint_path)))
        if not places.exists(path):
            raise ToolmemError(f"no checkpoint at {path}: {places.present(path)}")
        if path.is_file() and is_torch_file(path):
            raise ToolmemError(
                f"{path} is of format 1, which sharded runs do not read: `toolmem convert` it first"
            )
        with explained(path), Stored(path) as stored:
            found = self._read(stored)
            return unflatten(stored.tree, found.__getitem__)

    def _read(self, stored: Stored) -> dict[str, Tensor]:
        """All tensors, each sharded as the parameter that it belongs to."""
        from torch.distributed.tensor import DTensor

        from toolmem.checkpoints.sharded import fill

        assert self.lightning_module is not None
        parameters = {
            plain_name(name): parameter
            for name, parameter in self.lightning_module.named_parameters()
        }
        found, sharded = {}, {}
        for name, one in stored.tensors.items():
            like = _parameter_of(one, parameters)
            if isinstance(like, DTensor):
                dtype = one.torch_dtype
                found[name] = sharded[name] = torch.empty_like(like.detach(), dtype=dtype)
            else:
                found[name] = one.read()
        fill(stored, sharded)
        return found


def _parameter_of(stored: StoredTensor, parameters: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter whose name is in a tensor's, and whose shape it has: itself, its average, or what an
    optimizer keeps of it.
    """
    words = stored.name.split(".")
    if words[0] not in SHARDED_PARTS:
        return None
    for end in (len(words), len(words) - 1):
        for begin in range(1, end):
            name = ".".join(words[begin:end])
            for key in (name, f"model.{name}"):
                parameter = parameters.get(key)
                if parameter is not None and tuple(parameter.shape) == stored.shape:
                    return parameter
    return None
