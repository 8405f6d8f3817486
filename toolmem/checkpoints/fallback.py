"""Which checkpoint a run goes on from, when the newest may be damaged."""

from __future__ import annotations

import warnings
from pathlib import Path

from toolmem.checkpoints.formats import UnreadableError, check, read_state
from toolmem.checkpoints.places import LAST, exists, folder_of, part_of
from toolmem.errors import ToolmemError

ASIDE = ".damaged"


def candidates(folder: str | Path) -> list[Path]:
    """A run's checkpoints that training can go on from, the newest first.

    Args:
        folder: of its checkpoints, or the run's.

    Raises:
        ToolmemError: when one is of a format that only a newer version knows.
    """
    folder = folder_of(folder)
    last = folder / LAST
    first = [path for path in (last, part_of(last, "old")) if exists(path)]  # while folders swap
    steps: list[tuple[int, Path]] = []
    for path in folder.glob("*.ckpt"):
        if path == last or path.name.startswith(".") or not exists(path):
            continue
        try:
            steps.append((int(read_state(path).get("global_step", 0)), path))
        except UnreadableError:
            steps.append((-1, path))
    steps.sort(key=lambda one: (-one[0], one[1].name))
    return first + [path for _, path in steps]


def newest_intact(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run that is as it was written; None where there is none at all.

    Damaged ones are put aside, so that they take no place among those that are kept, and warned of.

    Args:
        folder: of its checkpoints, or the run's.

    Raises:
        ToolmemError: when all of them are damaged, or one is of a format that only a newer version knows.
    """
    damaged: list[tuple[Path, str]] = []
    for path in candidates(folder):
        try:
            check(path)
        except UnreadableError as error:
            if isinstance(error.__cause__, MemoryError | PermissionError):  # no fault of the file
                raise
            damaged.append((path, str(error)))
            continue
        for other, reason in damaged:
            _put_aside(other)
            warnings.warn(
                f"{reason.partition(': it is truncated')[0]}: training goes on from {path.name}, step "
                f"{read_state(path).get('global_step', 0)}, and {other.name} is now "
                f"{other.name}{ASIDE}",
                RuntimeWarning,
                stacklevel=2,
            )
        if path == part_of(folder_of(folder) / LAST, "old"):  # else taken for unfinished
            path = path.rename(folder_of(folder) / LAST)
        return path
    if damaged:
        reason = damaged[0][1].partition(": it is truncated")[0]
        raise ToolmemError(
            f"no checkpoint in {folder_of(folder)} is whole. {reason}: "
            "start anew with another --name, or move the checkpoints away"
        )
    return None


def _put_aside(path: Path) -> None:
    try:
        path.rename(path.with_name(path.name + ASIDE))
    except OSError:  # another rank was quicker, or one of an earlier time is a folder
        return
