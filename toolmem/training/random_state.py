"""Random numbers of this process, kept and put back: a resumed run drops out what it would have."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist


def random_state(device: torch.device | None = None) -> dict[str, Any]:
    """Where Python's, NumPy's and torch's generators stand, as plain data and tensors.

    Args:
        device: the process's own; of a GPU its generator is kept, too.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device | None = None) -> None:
    """Put back what `random_state` returned."""
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(
        (
            numpy["kind"],
            numpy["keys"].numpy().astype(np.uint32),
            numpy["position"],
            numpy["has_gauss"],
            numpy["cached"],
        )
    )
    torch.set_rng_state(state["torch"].cpu())
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def random_states(device: torch.device | None = None) -> list[dict[str, Any]]:
    """`random_state` of every rank, in their order; every rank must call it."""
    own = random_state(device)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [own]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return found


def own_random_state(states: Sequence[Mapping[str, Any]], rank: int) -> Mapping[str, Any] | None:
    """The rank's part of what `random_states` returned; None where there were fewer ranks."""
    return states[rank] if rank < len(states) else None
