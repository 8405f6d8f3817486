"""Tools as a recipe names them, so that training, evaluation and a checkpoint open the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolmem.class_path import construct, import_class
from toolmem.errors import ToolmemError
from toolmem.tools.base import Toolbox

KEY = "data.init_args.tools"

# What a model is given where its recipe says nothing.
DEFAULT_TOOLS: tuple[dict[str, Any], ...] = (
    {"class_path": "toolmem.tools.SqlTool"},
    {"class_path": "toolmem.tools.Calculator"},
)


def check_tools(specs: Sequence[Mapping[str, Any]] | None) -> None:
    """Refuse, before anything is trained, what ``open_toolbox`` could not open.

    Args:
        specs: ``{"class_path": ..., "init_args": {...}}`` each; None is the default.

    Raises:
        ToolmemError: naming the place in the recipe.
    """
    if specs is not None and not specs:
        raise ToolmemError(f"{KEY} is empty: name at least one tool, or leave it out")
    for index, spec in enumerate(specs or ()):
        key = f"{KEY}[{index}]"
        if not isinstance(spec, Mapping) or "class_path" not in spec:
            raise ToolmemError(
                f"{key} is {spec!r}: write class_path, and init_args if it needs any"
            )
        kind = import_class(str(spec["class_path"]), key)
        missing = [name for name in ("accepts", "call", "close") if not hasattr(kind, name)]
        if missing:
            raise ToolmemError(f"{key}: {spec['class_path']} is no tool: it has no {missing[0]}")


def open_toolbox(specs: Sequence[Mapping[str, Any]] | None, factbase: Path) -> Toolbox:
    """The tools of a recipe, ready to be asked; close it after use.

    Args:
        specs: ``{"class_path": ..., "init_args": {...}}`` each, asked in this order; None is the
            database and the calculator.
        factbase: handed as ``path`` to a tool that takes one and has none.

    Raises:
        ToolmemError: for a class that is not there, or options that it does not take.
    """
    check_tools(specs)
    given = {"path": factbase}
    return Toolbox(
        [
            construct(
                str(spec["class_path"]), spec.get("init_args") or {}, given, f"{KEY}[{index}]"
            )
            for index, spec in enumerate(DEFAULT_TOOLS if specs is None else specs)
        ]
    )
