"""Starting from a run's weights: ``model.init_from: RUN``.

All of the run's parameters must be the model's and fit, and the other way round. A model that drafts
(``toolmem.models.drafting``) takes its base's from the run, and its heads too where the run's model is of
the same class; else they start anew. Adapters of the run's come merged, those of this run begin anew. What
else a run has (its optimizer, its step) is not taken: that is to go on with it, ``--resume``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolmem import checkpoints
from toolmem.class_path import import_class
from toolmem.data.tokenizers import ids_alone
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.drafting import Drafting
from toolmem.models.lora import is_adapter, start_adapters
from toolmem.training import compatibility

HEADS = "multi_token."
SHOWN = 4  # names of each kind that a message has room for


def base_for(
    class_path: str, init_args: Mapping[str, Any], init_from: str | Path | None
) -> dict[str, Any] | None:
    """The base that a model's ``init_args`` leave to the run that it starts from.

    Args:
        class_path: of the model.
        init_args: as the recipe gives them.
        init_from: the run.

    Returns:
        ``class_path`` and ``init_args``; None where nothing is left open.

    Raises:
        ToolmemError: when the run is not there, or cannot be read.
    """
    if init_from is None or not leaves_base_open(class_path, init_args):
        return None
    file, checkpoint = _read(init_from)
    spec = checkpoints.about_of(checkpoint, file)["model"]
    return dict(spec["init_args"].get("base") or spec)


def model_for(init_from: str | Path) -> dict[str, Any]:
    """The model of a run, for a recipe that leaves ``model.model`` to the run that it starts from.

    Args:
        init_from: the run.

    Returns:
        ``class_path`` and ``init_args``, but for ``vocab_size``, which the data decides.

    Raises:
        ToolmemError: when the run is not there, or cannot be read.
    """
    file, checkpoint = _read(init_from, parts=(checkpoints.KEY,))
    spec = checkpoints.about_of(checkpoint, file)["model"]
    options = {key: value for key, value in spec["init_args"].items() if key != "vocab_size"}
    return {"class_path": spec["class_path"], "init_args": options}


def leaves_base_open(class_path: str, init_args: Mapping[str, Any]) -> bool:
    """Whether a model drafts for a base that its ``init_args`` do not give."""
    if init_args.get("base") is not None:
        return False
    return issubclass(import_class(class_path, "model.model.class_path"), Drafting)


def load_initial_weights(
    model: LanguageModel, init_from: str | Path, data: Mapping[str, Any]
) -> None:
    """Give a model the weights of a run.

    Args:
        model: changed in place.
        init_from: a run's folder, or a checkpoint.
        data: what this run's DataModule says of itself (``checkpoint_info``).

    Raises:
        ToolmemError: for another tokenizer, or naming the parameters that are missing, unexpected, or of
            another shape.
    """
    file, checkpoint = _read(init_from)
    about = checkpoints.about_of(checkpoint, file)
    compatibility.check_tokenizer(_ids_alone(about["data"]), _ids_alone(data), file)
    saved = dict(checkpoints.weights_of(checkpoint))
    own = model.state_dict()
    anew = isinstance(model, Drafting) and about["model"]["class_path"] != checkpoints.class_path(
        model
    )
    if anew:
        saved = {name: value for name, value in saved.items() if not name.startswith(HEADS)}
    wanted = [name for name in own if not (is_adapter(name) or (anew and name.startswith(HEADS)))]
    faults = [
        _list("it has no", (name for name in wanted if name not in saved)),
        _list("this model has no", (name for name in saved if name not in own)),
        _list(
            "of another shape:",
            (
                f"{name} {list(saved[name].shape)}, here {list(own[name].shape)}"
                for name in wanted
                if name in saved and saved[name].shape != own[name].shape
            ),
        ),
    ]
    if any(faults):
        raise ToolmemError(
            f"model.init_from: the weights in {file} do not fit this model: "
            f"{'; '.join(fault for fault in faults if fault)}. Set model.model as that run has it "
            "(its config.yaml says how)"
        )
    model.load_state_dict(saved, strict=False)
    start_adapters(model)
    if isinstance(model, Drafting) and anew:
        model.start_heads()


def _ids_alone(data: Mapping[str, Any]) -> dict[str, Any]:
    """What data says of its tokenizer's ids."""
    return {"tokenizer": ids_alone(data.get("tokenizer") or {})}


def _read(
    init_from: str | Path, parts: tuple[str, ...] = ("state_dict", checkpoints.KEY)
) -> tuple[Path, dict[str, Any]]:
    try:
        file = checkpoints.resolve(init_from)
        return file, checkpoints.read(file, parts=parts)
    except ToolmemError as error:
        raise ToolmemError(
            f"model.init_from: {error}; train that run first, or name another"
        ) from error


def _list(what: str, names: Iterable[str]) -> str:
    """Names in words; nothing where there are none."""
    found = list(names)
    if not found:
        return ""
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{what} {', '.join(found[:SHOWN])}{more}"
