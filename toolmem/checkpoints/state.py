"""Plain data and tensors within each other, taken apart: a tree that JSON can hold, and tensors by name.

What JSON has no word for is an object of one key that begins with ``$``::

    {"$tensor": NAME}            the tensor of that name
    {"$array": NAME}             the same, as a NumPy array
    {"$tuple": [...]}            a tuple
    {"$items": [[KEY, VALUE]]}   a mapping whose keys are not all strings, or begin with ``$``
    {"$float": "nan"}            also ``inf`` and ``-inf``

A tensor's name is the path to it, parted by dots. One that is met twice is kept once, under its first name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Flat:
    """A checkpoint taken apart.

    Args:
        tree: what JSON can hold.
        tensors: by name; in memory, or on disk still.
    """

    tree: dict[str, Any]
    tensors: Mapping[str, Any] = field(default_factory=dict)


def flatten(state: Mapping[str, Any]) -> Flat:
    """Take a checkpoint apart; tensors are not copied.

    Args:
        state: mappings, lists, tuples, strings, numbers, None, tensors and NumPy arrays.

    Raises:
        ToolmemError: for anything else, naming where it is.
    """
    return _Flattening().of(state)


class _Flattening:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[Any, str] = {}

    def of(self, state: Mapping[str, Any]) -> Flat:
        import numpy as np
        import torch

        self.tensor, self.array, self.scalar = torch.Tensor, np.ndarray, np.generic
        self.from_numpy = torch.from_numpy
        return Flat(
            {str(key): self.node(value, str(key)) for key, value in state.items()}, self.tensors
        )

    def node(self, value: Any, path: str) -> Any:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            value = float(value)
            return value if math.isfinite(value) else {"$float": str(value)}
        if isinstance(value, self.tensor):
            return {"$tensor": self.name(value, path)}
        if isinstance(value, Mapping):
            if all(type(key) is str and key[:1] != "$" for key in value):
                return {key: self.node(one, f"{path}.{key}") for key, one in value.items()}
            return {
                "$items": [
                    [self.node(key, f"{path} (a key)"), self.node(one, f"{path}.{key}")]
                    for key, one in value.items()
                ]
            }
        if isinstance(value, list):
            return [self.node(one, f"{path}.{i}") for i, one in enumerate(value)]
        if isinstance(value, tuple):
            return {"$tuple": [self.node(one, f"{path}.{i}") for i, one in enumerate(value)]}
        if isinstance(value, self.array):
            return {"$array": self.name(self.from_numpy(value), path)}
        if isinstance(value, self.scalar):
            return self.node(value.item(), path)
        raise ToolmemError(
            f"a checkpoint holds plain data only, and {path} is a {type(value).__module__}."
            f"{type(value).__qualname__}: let what it belongs to keep numbers, strings, lists, mappings "
            "and tensors in its state_dict"
        )

    def name(self, tensor: Tensor, path: str) -> str:
        identity = _identity(tensor)
        if identity in self.names:
            return self.names[identity]
        name, n = path, 2
        while name in self.tensors:  # {"a": {"b": x}, "a.b": y}
            name, n = f"{path}#{n}", n + 1
        self.tensors[name] = tensor.detach()
        if identity is not None:
            self.names[identity] = name
        return name


def _identity(tensor: Tensor) -> Any:
    """Equal for tensors that are one and the same memory; None where that cannot be told."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.numel() == 0 or local.is_meta or local.layout is not _strided():
        return None
    placements = getattr(tensor, "placements", None)
    return local.data_ptr(), local.dtype, tuple(tensor.shape), tuple(local.stride()), placements


def _strided() -> Any:
    import torch

    return torch.strided


def unflatten(tree: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Put together what `flatten` took apart.

    Args:
        tree: a tree, or a part of it.
        tensor: gives a tensor by its name; called once for each place that it is wanted in.
    """
    if isinstance(tree, list):
        return [unflatten(one, tensor) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) == 1:
        [(key, value)] = tree.items()
        if key == "$tensor":
            return tensor(value)
        if key == "$tuple":
            return tuple(unflatten(one, tensor) for one in value)
        if key == "$float":
            return float(value)
        if key == "$items":
            return {unflatten(k, tensor): unflatten(v, tensor) for k, v in value}
        if key == "$array":
            return tensor(value).numpy()
    return {key: unflatten(value, tensor) for key, value in tree.items()}


def names_in(tree: Any) -> list[str]:
    """The names of all tensors in a tree, each once, in their order."""
    found: dict[str, None] = {}

    def look(node: Any) -> None:
        if isinstance(node, list):
            for one in node:
                look(one)
        elif isinstance(node, dict):
            for key, one in node.items():
                if key in ("$tensor", "$array") and isinstance(one, str):
                    found[one] = None
                else:
                    look(one)

    look(tree)
    return list(found)
