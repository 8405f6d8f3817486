"""Does a checkpoint belong to the run that wants to load it?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolmem import checkpoints
from toolmem.errors import ToolmemError


def describe(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data: ``class_path`` and ``init_args``."""
    arguments = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }
    return {"class_path": checkpoints.class_path(config), "init_args": arguments}


def check(
    saved: Mapping[str, Any], current: Mapping[str, Any], path: str | Path, *, training: bool
) -> None:
    """Compare what a checkpoint says of itself with the run that loads it.

    Args:
        saved: the checkpoint's ``toolmem`` part.
        current: what this run would write there.
        path: the checkpoint, for messages.
        training: the run goes on training, so how must agree too, not only what.

    Raises:
        ToolmemError: naming the first value that differs, and the key to change.
    """
    check_tokenizer(saved["data"], current["data"], path)
    if ("lora" in current["model"]) != ("lora" in saved["model"]):
        has, lacks = ("this run", path) if "lora" in current["model"] else (path, "this run")
        raise ToolmemError(
            f"model.lora: {has} has adapters and {lacks} has none: set it as it was, or start from the "
            "checkpoint by model.init_from"
        )
    _check_part(saved["model"], current["model"], "model.model", path)
    mine, theirs = current["data"].get("factbase"), saved["data"].get("factbase")
    if mine and theirs and mine.get("fingerprint") != theirs.get("fingerprint"):
        detail = [d for d in differences(theirs, mine) if d[0] != "fingerprint"]
        reason = named(detail[0]) if detail else f"fingerprint {_short(theirs)}, not {_short(mine)}"
        raise ToolmemError(
            f"{path} was trained on other facts ({reason}): set data.init_args.people, seed and "
            "alpha as they were"
        )
    if not training:
        return
    for name in ("setting", "templates"):
        found, wanted = plain(saved["data"].get(name)), plain(current["data"].get(name))
        if found != wanted:
            raise ToolmemError(
                f"{path} was trained with data {name} {_cut(found)}, this run has "
                f"{_cut(wanted)}: set data.init_args.{name} as it was, or start a new run"
            )
    for name in ("optimizer", "schedule"):
        if name in saved:
            _check_part(saved[name], current[name], f"model.{name}", path)


def check_tokenizer(saved: Mapping[str, Any], current: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint whose token ids mean something else.

    Args:
        saved: what the checkpoint says of its data.
        current: the same of this run.
        path: the checkpoint, for messages.

    Raises:
        ToolmemError: naming the first difference.
    """
    found, wanted = (plain(data.get("tokenizer")) for data in (saved, current))
    if found and wanted and found != wanted:
        difference = next(differences(found, wanted), ("", found, wanted))
        raise ToolmemError(
            f"{path} was trained with another tokenizer ({named(difference)}): "
            "set data.init_args.tokenizer to the checkpoint's"
        )


def _check_part(
    saved: Mapping[str, Any], current: Mapping[str, Any], key: str, path: str | Path
) -> None:
    for name, found, wanted in differences(plain(saved), plain(current)):
        raise ToolmemError(
            f"{key}.{name} is {wanted!r} in this run and {found!r} in {path}: set it to {found!r}, "
            "or start a new run"
        )


def _short(factbase: Mapping[str, Any]) -> str:
    return str(factbase.get("fingerprint"))[:12]


def named(difference: tuple[str, Any, Any]) -> str:
    """A difference in words."""
    name, found, wanted = difference
    return f"{name} {_cut(found)}, not {_cut(wanted)}"


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def plain(value: Any) -> Any:
    """``value`` with tuples as lists, since saving keeps no difference that matters."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """The leaves of ``saved`` that are otherwise in ``current``, as (dotted name, saved, current).

    A key that only ``current`` has is an option younger than the checkpoint.
    """
    for key in sorted(saved):
        found, wanted = saved.get(key), current.get(key)
        if isinstance(found, Mapping) and isinstance(wanted, Mapping):
            yield from differences(found, wanted, f"{prefix}{key}.")
        elif found != wanted:
            yield f"{prefix}{key}", found, wanted
