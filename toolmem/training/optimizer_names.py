"""Optimizer states by the parameters' names.

torch numbers parameters in the order of the optimizer's groups, which says nothing to another program, or
to a run of another layout. In checkpoints they go by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from toolmem.errors import ToolmemError

WRAPPERS = (
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
)  # of activation checkpointing, of torch.compile


def plain_name(name: str) -> str:
    """A parameter's name without those of wrappers around its module."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_names(module: nn.Module, optimizer: Optimizer) -> list[str] | None:
    """Names of an optimizer's parameters, in its own order; None when it has others than the module's.

    Args:
        module: whose parameters they are.
        optimizer: of them.
    """
    names = {id(parameter): plain_name(name) for name, parameter in module.named_parameters()}
    found = [names.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
    return None if None in found else found  # type: ignore[return-value]


def by_name(state: dict[str, Any], names: list[str] | None) -> dict[str, Any]:
    """A state with names for numbers; as it is where it has other keys than numbers.

    Args:
        state: an optimizer's ``state_dict``.
        names: `parameter_names`.
    """
    if names is None or not _numbered(state, len(names)):
        return state
    groups = [
        {**group, "params": [names[number] for number in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        **state,
        "state": {names[number]: one for number, one in state["state"].items()},
        "param_groups": groups,
    }


def _numbered(state: Mapping[str, Any], count: int) -> bool:
    numbers = [n for group in state.get("param_groups", ()) for n in group["params"]]
    return numbers == list(range(count)) and all(n in range(count) for n in state["state"])


def by_number(
    state: dict[str, Any], optimizer: Optimizer, names: list[str] | None, path: str
) -> dict[str, Any]:
    """What `by_name` made, for an optimizer to load; one with numbers is left as it is.

    Args:
        state: of a checkpoint.
        optimizer: that is to load it.
        names: its `parameter_names`.
        path: the checkpoint, for messages.

    Raises:
        ToolmemError: when it is of other parameters.
    """
    saved = [name for group in state.get("param_groups", ()) for name in group["params"]]
    if names is None or not saved or not all(isinstance(name, str) for name in saved):
        return state
    numbers = {name: number for number, name in enumerate(names)}
    groups, start = [], 0
    for group, own in zip(state["param_groups"], optimizer.param_groups, strict=False):
        end = start + len(own["params"])
        differing = set(group["params"]) ^ set(names[start:end])
        if differing:
            raise ToolmemError(
                f"{path}: its optimizer has {sorted(differing)[0]} in another group of parameters than this "
                "run's, or not at all: set model.optimizer as it was, or start a new run"
            )
        groups.append({**group, "params": list(range(start, end))})
        start = end
    return {
        **state,
        "state": {numbers[name]: one for name, one in state["state"].items()},
        "param_groups": groups,
    }
