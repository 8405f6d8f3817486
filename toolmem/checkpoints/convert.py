"""One form of checkpoint from another.

file      one safetensors file with everything in it, to go on from
folder    the same as N files, as N ranks write it; any number of ranks reads it
weights   a safetensors file of the weights alone, by the model's own names
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import toolmem
from toolmem.checkpoints import tensor_files
from toolmem.checkpoints.adapters import merged
from toolmem.checkpoints.formats import (
    KEY,
    explained,
    is_torch_file,
    read,
    read_state,
    write,
    write_flat,
)
from toolmem.checkpoints.models import WEIGHTS_PREFIX, about_of, build_model
from toolmem.checkpoints.places import part_of, remove, replace, resolve
from toolmem.checkpoints.state import Flat, flatten
from toolmem.checkpoints.stored import FORMAT, Stored, is_sharded
from toolmem.checkpoints.tensor_files import DamagedError, TensorFile
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    from toolmem.checkpoints.pretrained import Portable

Form = Literal["file", "folder", "weights"]
ABOUT = "toolmem.about"  # in a file of weights: what rebuilds their model


def convert(source: str | Path, target: str | Path, form: Form, ranks: int = 1) -> None:
    """Write a checkpoint in another form; a format of old becomes the newest.

    Whole checkpoints of the newest format pass through memory a tensor at a time. Adapters are merged,
    but not for a folder, from which training goes on.

    Args:
        source: a run's folder, a checkpoint of either form, or of an old format.
        target: what to write, in one step.
        form: of it.
        ranks: how many files a folder is to have.

    Raises:
        ToolmemError: when the source is missing, damaged or no checkpoint, or the target cannot be written.
    """
    path, target = resolve(source), Path(target)
    with explained(path), ExitStack() as stack:
        plain = None if form == "folder" else merged(path)
        if plain is not None:
            flat = flatten(plain)
        elif path.is_file() and is_torch_file(path):
            flat = flatten(read(path))
        else:
            stored = stack.enter_context(Stored(path))
            flat = Flat(stored.tree, stored.tensors)
        if form == "weights":
            about = about_of(read_state(path) if plain is None else plain, path)
            _write_weights(flat, about, target)
        elif form == "file":
            write_flat(flat, target)
        else:
            _write_folder(flat, target, ranks)


def write_model(model: Portable, target: Path, form: str, ranks: int | None = None) -> None:
    """Write a model that came from another program's form.

    Args:
        model: what to write.
        target: where to, in one step.
        form: ``checkpoint`` or ``weights``.
        ranks: how many files a checkpoint is to have as a folder; one file when None.

    Raises:
        ToolmemError: when its source is damaged, or the target cannot be written.
    """
    flat = model.flat()
    if form == "weights":
        _write_weights(flat, flat.tree[KEY], target)
    elif ranks is None:
        write_flat(flat, target)
    else:
        _write_folder(flat, target, ranks)


def _write_folder(flat: Flat, target: Path, ranks: int) -> None:
    from toolmem.checkpoints.sharded import write_folder

    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(target)
    try:
        temporary.mkdir()
        write_folder(flat, temporary, ranks)
        replace(temporary, target)
    finally:
        remove(temporary)


def _write_weights(flat: Flat, about: Mapping[str, Any], target: Path) -> None:
    wanted = {
        name.removeprefix(WEIGHTS_PREFIX): node["$tensor"]
        for name, node in flat.tree["state_dict"].items()
        if name.startswith(WEIGHTS_PREFIX)
    }
    # Tied weights are one tensor of two names; safetensors wants each name to have its own.
    weights = {name: flat.tensors[of] for name, of in wanted.items()}
    kept = {key: about[key] for key in ("format", "version", "model", "data")}
    with atomic_path(target, durable=True) as temporary:
        tensor_files.write(temporary, weights, {"format": "pt", ABOUT: json.dumps(kept)})


def import_weights(
    source: str | Path, target: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Make a checkpoint of weights alone: to generate from, evaluate, or start from (``model.init_from``).

    Args:
        source: a safetensors file, its names those of the model.
        target: the file to write.
        about: what its model is and what it was trained on, the ``toolmem`` part of a checkpoint; None
            where the file says so itself.

    Raises:
        ToolmemError: when it says nothing of its model, or has other parameters.
    """
    path = Path(source)
    with explained(path), TensorFile(path) as file:
        if about is None:
            if ABOUT not in file.metadata:
                raise ToolmemError(
                    f"{path} does not say which model its weights are of: name a run of the same model "
                    "by --like"
                )
            about = json.loads(file.metadata[ABOUT])
        weights = {name: file.read(name) for name in file.entries}
    kept = {key: about[key] for key in ("model", "data")}
    model = build_model(kept["model"], path)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ToolmemError(f"the weights in {path} do not fit their model: {error}") from error
    checkpoint = {
        "state_dict": {WEIGHTS_PREFIX + name: value for name, value in model.state_dict().items()},
        "global_step": 0,
        "epoch": 0,
        KEY: {"format": FORMAT, "version": toolmem.__version__, **kept},
    }
    write(checkpoint, target)


def is_weights_file(path: Path) -> bool:
    """Whether a path is a safetensors file that is no checkpoint."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
        with TensorFile(path) as file:
            return "toolmem.state" not in file.metadata
    except (OSError, DamagedError):
        return False


def form_of(path: Path) -> str:
    """A checkpoint's form in words."""
    if is_sharded(path):
        with Stored(path) as stored:
            return f"a folder of {len(stored.files)} files"
    return "one file of torch.save" if is_torch_file(path) else "one file"
