"""``parallelize``: what ``LanguageModelModule.configure_model`` does under ``ModelParallelStrategy``."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.drafting import Drafting
from toolmem.training.parallel.layout import keep_own_order
from toolmem.training.parallel.ranks import DATA, TENSOR
from toolmem.training.parallel.tensor import apply_tensor_parallel, stacks


def parallelize(
    model: LanguageModel,
    mesh: DeviceMesh,
    sequence_parallel: bool = False,
    param_dtype: torch.dtype | None = None,
) -> None:
    """Split a model over the ranks of ``mesh``, in place.

    Args:
        model: with the same weights on every rank, on the mesh's device.
        mesh: of the dimensions ``data_parallel``, over which parameters, gradients and optimizer states
            are spread (FSDP2, arXiv 2304.11277), and ``tensor_parallel``, over which layers are.
        sequence_parallel: split the stream between layers over tokens as well.
        param_dtype: what parameters are gathered in, under autocast to it; their own when None.

    Raises:
        ToolmemError: for what cannot be split, naming the key.
    """
    if isinstance(model, Drafting):
        raise ToolmemError(
            "trainer.strategy is ModelParallelStrategy, and model.model drafts for another model (Medusa, "
            "EAGLE): its heads cannot be split over ranks; use trainer.strategy: ddp"
        )
    data, tensor = mesh[DATA], mesh[TENSOR]
    if sequence_parallel and tensor.size() == 1:
        raise ToolmemError(
            "model.sequence_parallel needs trainer.strategy.init_args.tensor_parallel_size above 1"
        )
    if tensor.size() > 1:
        apply_tensor_parallel(model, tensor, sequence_parallel)
    if data.size() > 1 or tensor.size() == 1:
        apply_fully_sharded(model, data, param_dtype)
    keep_own_order(model)


def apply_fully_sharded(
    model: LanguageModel, mesh: DeviceMesh, param_dtype: torch.dtype | None = None
) -> None:
    """Spread parameters over ranks that read different data, and gather them block by block.

    Args:
        model: changed in place; its parameters may be split over tensor-parallel ranks already.
        mesh: of one dimension.
        param_dtype: what parameters are gathered in; their own when None.
    """
    # Gradients are summed in float32, and autocast sees to what operations read: the stream stays float32.
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    for stack in stacks(model):
        for block in stack:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    # Embedding, head and the last norm stay gathered from forward to backward: the head is no part of
    # ``hidden``, and is asked after it.
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
