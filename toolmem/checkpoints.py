"""What a checkpoint holds, and how a model is rebuilt from it alone.

A checkpoint is one file of plain data (``torch.load(..., weights_only=True)`` reads it). Beside what
Lightning keeps (weights, optimizer, loops, callbacks) it has the key ``toolmem``::

    format    1
    version   the toolmem that wrote it
    model     {"class_path": "toolmem.models.Transformer", "init_args": {...}}
    data      {"tokenizer": {...}, "factbase": {"fingerprint": ...} | None, "setting": ..., ...}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.class_path import import_class, path_of
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    import torch

    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel

FORMAT = 1
KEY = "toolmem"
WEIGHTS_PREFIX = "model."  # LanguageModelModule keeps its model under this name


def class_path(instance: object) -> str:
    """The import path of an instance's class, short where the class is exported by its package."""
    return path_of(type(instance))


def describe(model: LanguageModel, data: Mapping[str, Any]) -> dict[str, Any]:
    """What must be kept beside the weights so that a checkpoint rebuilds its model alone.

    Args:
        model: the model; its ``init_args`` must be plain data.
        data: a DataModule's ``checkpoint_info()``.
    """
    return {
        "format": FORMAT,
        "version": toolmem.__version__,
        "model": {"class_path": class_path(model), "init_args": dict(model.init_args)},
        "data": dict(data),
    }


def write(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Write a checkpoint in one step: temporary name, synced to disk, renamed.

    Raises:
        ToolmemError: when the folder cannot be written or the disk is full.
    """
    import torch

    with atomic_path(path) as temporary:
        try:
            torch.save(checkpoint, temporary)
        except RuntimeError as error:
            # torch's zip writer reports a full disk as a RuntimeError of its own
            raise OSError(28, f"writing failed ({error})") from error


def read(path: str | Path, map_location: torch.device | str | None = "cpu") -> dict[str, Any]:
    """Read a checkpoint file.

    Raises:
        ToolmemError: when it is missing, truncated, corrupt, or no checkpoint.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ToolmemError(f"no checkpoint at {path}: {_present(path)}")
    try:
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds here, all of them: cannot be read
        raise ToolmemError(
            f"{path} cannot be read as a checkpoint ({_first_line(error)}): it is truncated, corrupt "
            "or something else; use an earlier checkpoint of the run, or train again"
        ) from error
    if not isinstance(checkpoint, dict):
        raise ToolmemError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint")
    return checkpoint


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _present(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    found = sorted(p.name for p in folder.glob("*.ckpt")) if folder.is_dir() else []
    if found:
        return f"{folder} holds {', '.join(found[:8])}"
    if folder.is_dir():
        return f"{folder} holds no *.ckpt file"
    return f"the folder {folder} does not exist"


def resolve(path: str | Path) -> Path:
    """The checkpoint file meant by ``path``: a file, a ``checkpoints`` folder, or a run's folder.

    Of a folder, ``last.ckpt`` is taken.

    Raises:
        ToolmemError: when there is none.
    """
    path = Path(path)
    for candidate in (path, path / "last.ckpt", path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    if not path.exists():
        raise ToolmemError(f"no such checkpoint or run folder: {path}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    raise ToolmemError(
        f"no checkpoint in {path}: {_present(folder)}; name a run's folder or a .ckpt"
    )


def kept(path: str | Path) -> list[Path]:
    """Every checkpoint of a run in the order of training: what it kept by step, then the last.

    The last may be of the same step as the one before it. Of a checkpoint file, that file alone.

    Args:
        path: a run's folder, or a checkpoint file.

    Raises:
        ToolmemError: when there is none.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    numbered = {file.stem.removeprefix("step_"): file for file in folder.glob("step_*.ckpt")}
    by_step = [numbered[n] for n in sorted((n for n in numbered if n.isdigit()), key=int)]
    last = folder / "last.ckpt"
    found = by_step + ([last] if last.is_file() else [])
    return found or [resolve(path)]


def run_folder(path: str | Path) -> Path:
    """The run's folder that a checkpoint file belongs to."""
    file = resolve(path)
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A model rebuilt from a checkpoint, with what it was trained on.

    Args:
        path: the file.
        model: in evaluation mode, weights loaded.
        tokenizer: the one it was trained with.
        data: the DataModule's ``checkpoint_info()`` at training time.
        step: optimizer steps taken.
    """

    path: Path
    model: LanguageModel
    tokenizer: Tokenizer
    data: dict[str, Any]
    step: int


def load(path: str | Path, device: torch.device | str = "cpu") -> LoadedCheckpoint:
    """Rebuild the model of a checkpoint, from the checkpoint alone.

    Args:
        path: a ``.ckpt`` file, or a run's folder.
        device: where to put the model.

    Raises:
        ToolmemError: when the file is missing, damaged or not ours, or does not fit its own model.
    """
    from toolmem.data.tokenizers import tokenizer_from_spec

    path = resolve(path)
    checkpoint = read(path)
    about = about_of(checkpoint, path)
    model = build_model(about["model"], path)
    try:
        model.load_state_dict(weights_of(checkpoint))
    except RuntimeError as error:
        raise ToolmemError(f"the weights in {path} do not fit its own model: {error}") from error
    try:
        tokenizer = tokenizer_from_spec(about["data"]["tokenizer"])
    except ToolmemError as error:
        raise ToolmemError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ToolmemError(
            f"{path} does not say which tokenizer its model was trained with: the file was edited; "
            "use another checkpoint"
        ) from error
    if tokenizer.vocab_size != model.vocab_size:
        raise ToolmemError(
            f"{path}: its model has vocab_size {model.vocab_size}, its tokenizer "
            f"{tokenizer.vocab_size}: the file was edited or mixed up; use another checkpoint"
        )
    return LoadedCheckpoint(
        path,
        model.to(device).eval(),
        tokenizer,
        about["data"],
        int(checkpoint.get("global_step", 0)),
    )


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint, by the model's own names."""
    return {
        name.removeprefix(WEIGHTS_PREFIX): value
        for name, value in checkpoint.get("state_dict", {}).items()
        if name.startswith(WEIGHTS_PREFIX)
    }


def about_of(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """The ``toolmem`` part of a checkpoint, checked.

    Raises:
        ToolmemError: when the file is not ours, of a format this version does not know, or of a
            population of models.
    """
    about = checkpoint.get(KEY)
    if not isinstance(about, dict) or "model" not in about or "data" not in about:
        raise ToolmemError(
            f"{path} is a checkpoint, but not one that toolmem wrote (no key {KEY!r})"
        )
    if about.get("format") != FORMAT:
        raise ToolmemError(
            f"{path} has checkpoint format {about.get('format')}, written by toolmem "
            f"{about.get('version')}; this version ({toolmem.__version__}) reads format {FORMAT}"
        )
    if "population" in about:
        n = len(about["population"]["members"])
        raise ToolmemError(
            f"{path} holds a population of {n} models: name one of them, which have folders of their own, "
            f"members/0 to members/{n - 1} in the run's, once they are done"
        )
    return about


def build_model(spec: Mapping[str, Any], where: str | Path) -> LanguageModel:
    """Build a model, with fresh weights, from its class path and arguments.

    Args:
        spec: ``{"class_path": ..., "init_args": {...}}``.
        where: the file or key that the spec comes from, for messages.

    Raises:
        ToolmemError: when the class is unknown or not to be trusted, is no LanguageModel, or refuses its
            arguments.
    """
    from toolmem.models import LanguageModel

    cls = import_class(str(spec["class_path"]), f"{where}: the model class", LanguageModel)
    try:
        return cls(**spec["init_args"])
    except TypeError as error:
        raise ToolmemError(f"{where}: {spec['class_path']}: {error}") from error
