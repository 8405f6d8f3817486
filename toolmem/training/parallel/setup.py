"""What a LightningModule does once processes have found each other: ``configure_model``."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention
from toolmem.training.parallel.apply import parallelize
from toolmem.training.parallel.files import read_single_files
from toolmem.training.parallel.ranks import Ranks

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from toolmem.training.module import LanguageModelModule


def set_up(module: LanguageModelModule, trainer: pl.Trainer) -> Ranks:
    """Make a module ready for its trainer's strategy, and say who this process is.

    Args:
        module: its model is split over ranks under ``ModelParallelStrategy``.
        trainer: whose strategy knows the processes.

    Raises:
        ToolmemError: for options that do not go with the strategy, naming the key.
    """
    # It warns of every gather over two dimensions that it is two gathers.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    mesh: DeviceMesh | None = module.device_mesh
    ranks = Ranks.of_trainer(trainer)
    if mesh is not None and not module.sharded:
        check_options(module, trainer)
        module.model.to(trainer.strategy.root_device)
        dtype = None if module.fsdp_param_dtype is None else getattr(torch, module.fsdp_param_dtype)
        parallelize(module.model, mesh, module.sequence_parallel, dtype)
        read_single_files(module, trainer.strategy)
    elif mesh is None and module.fsdp_param_dtype is not None:
        raise ToolmemError(
            "model.fsdp_param_dtype needs trainer.strategy: ModelParallelStrategy, with "
            "data_parallel_size above 1"
        )
    elif mesh is None and module.sequence_parallel:
        raise ToolmemError(
            "model.sequence_parallel needs trainer.strategy: ModelParallelStrategy, with "
            "tensor_parallel_size above 1"
        )
    # DDP would give all ranks rank zero's buffers, the count of tokens by expert among them; and it waits
    # for a gradient of every parameter.
    ignored = [*(name for name, _ in module.named_buffers()), *never_used(module)]
    module._ddp_params_and_buffers_to_ignore = ignored
    if ranks.data_rank and not module._resumed:
        # Ranks that read different data drop different units; those that share a layer drop the same.
        torch.manual_seed(torch.initial_seed() + ranks.data_rank)
    return ranks


def never_used(module: nn.Module) -> list[str]:
    """Names of parameters that no loss depends on: the first layer has no earlier values to mix in."""
    found = (
        f"{name}.value_mix" if name else "value_mix"
        for name, part in module.named_modules()
        if isinstance(part, Attention) and part.value_mix is not None
    )
    return list(itertools.islice(found, 1))


def check_options(module: Any, trainer: pl.Trainer) -> None:
    """Refuse what a model that is split over ranks cannot do.

    Raises:
        ToolmemError: naming the key.
    """
    from toolmem.training.callbacks.ema import EMA

    mixed = {"float16": "16-mixed", "bfloat16": "bf16-mixed"}.get(module.fsdp_param_dtype)
    if mixed is not None and trainer.precision != mixed:
        raise ToolmemError(
            f"model.fsdp_param_dtype is {module.fsdp_param_dtype}, which goes with trainer.precision "
            f"{mixed}, and that is {trainer.precision}: change one of them"
        )
    strategy = "trainer.strategy is ModelParallelStrategy, which splits the model over ranks"
    if type(module).__name__ in ("GRPO", "PopulationModule"):
        raise ToolmemError(
            f"{strategy}, and module {type(module).__name__} needs all of it in each process: use "
            "trainer.strategy: ddp, or one process"
        )
    if module.fused is True:
        raise ToolmemError(f"{strategy}: model.fused: true cannot run that; leave it out")
    if module.compile_model:
        raise ToolmemError(
            f"{strategy}: model.compile has not been made to go with that; leave it out"
        )
    if any(isinstance(callback, EMA) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        raise ToolmemError(
            f"{strategy}, and the callback toolmem.training.EMA keeps a copy of all of it: leave EMA out "
            "of trainer.callbacks, or use trainer.strategy: ddp"
        )
