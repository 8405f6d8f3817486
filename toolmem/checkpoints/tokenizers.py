"""The tokenizer of a checkpoint, for data that is to have the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolmem.checkpoints.formats import KEY, read
from toolmem.checkpoints.models import about_of
from toolmem.checkpoints.places import resolve
from toolmem.errors import ToolmemError


def tokenizer_spec(path: str | Path) -> dict[str, Any]:
    """What `toolmem.data.tokenizer_from_spec` makes a checkpoint's tokenizer of; no weights are read.

    Args:
        path: a run's folder, or a checkpoint.

    Raises:
        ToolmemError: when it is missing or damaged, or its model has no tokenizer.
    """
    file = resolve(path)
    spec = about_of(read(file, parts=(KEY,)), file)["data"].get("tokenizer")
    if not isinstance(spec, dict):
        raise ToolmemError(f"{file} does not say which tokenizer its model was trained with")
    return spec
