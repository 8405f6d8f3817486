"""A model rebuilt from a checkpoint alone."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import toolmem
from toolmem.checkpoints.formats import KEY, first_line, read
from toolmem.checkpoints.places import resolve
from toolmem.checkpoints.stored import FORMAT, unknown_format
from toolmem.class_path import import_class, path_of
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import torch

    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel

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
    checkpoint = read(path, parts=("state_dict", "global_step", KEY))
    about = about_of(checkpoint, path)
    weights = weights_of(checkpoint)
    _check_numbers(about["model"].get("init_args"), len(weights), path)
    model = meta_model(about["model"], weights.values(), path)
    step = checkpoint.get("global_step", 0)
    if not isinstance(step, int):
        raise ToolmemError(f"{path}: its step is {step!r:.40}: the file was edited; use another")
    checkpoint.clear()
    try:
        assign_weights(model, weights)
    except (RuntimeError, AttributeError, TypeError) as error:
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
        step,
    )


def _check_numbers(options: Any, n_tensors: int, where: str | Path) -> None:
    """No model has more layers than tensors, nor any option of more than 2³¹; a base's neither."""
    for key, value in options.items() if isinstance(options, Mapping) else ():
        _check_numbers(value, n_tensors, where)
        most = n_tensors if key == "n_layers" else 1 << 31
        if isinstance(value, int) and value > most:
            raise ToolmemError(
                f"the weights in {where} do not fit its own model, whose {key} is {value:,}: the file was "
                "edited; use another"
            )


def meta_model(
    spec: Mapping[str, Any], weights: Collection[Shaped], where: str | Path
) -> LanguageModel:
    """Build a model whose parameters have no memory yet: `assign_weights` gives them theirs.

    Buffers that no checkpoint keeps (rotary tables) are as they should be.

    Args:
        spec: ``{"class_path": ..., "init_args": {...}}``.
        weights: what it is to be given; it may not have many more.
        where: the file, for messages.

    Raises:
        ToolmemError: as `build_model`, and for a model that cannot be the one of these weights.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook

    me = threading.get_ident()
    made: dict[int, tuple[weakref.ref[Any], torch.nn.Parameter]] = {}

    def without_memory(_: Any, __: str, one: Any) -> Any:
        if threading.get_ident() != me or one is None or one.is_meta:
            return None
        earlier = made.get(id(one))
        if earlier is not None and earlier[0]() is one:
            return earlier[1]
        new = torch.nn.Parameter(one.detach().to("meta"), requires_grad=one.requires_grad)
        made[id(one)] = weakref.ref(one), new
        return new

    with no_larger_than(weights, where):
        hook = register_module_parameter_registration_hook(without_memory)
        try:
            return build_model(spec, where)
        finally:
            hook.remove()


def tied_names(model: LanguageModel) -> dict[str, str]:
    """Parameters that are another one under a further name: name -> the first name."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            found[name] = first[id(parameter)]
    return found


def assign_weights(model: LanguageModel, weights: dict[str, torch.Tensor]) -> None:
    """Give a model of `meta_model` its weights, which become its parameters and are not copied.

    What is of another dtype than the model's is converted, one at a time.

    Args:
        model: changed in place.
        weights: by the model's names; emptied, so that nothing is held twice.

    Raises:
        RuntimeError: when they do not fit.
    """
    own, ties = model.state_dict(), tied_names(model)
    for name in list(weights):
        if name in own and name not in ties and weights[name].dtype != own[name].dtype:
            weights[name] = weights[name].to(own[name].dtype)
    weights |= {
        name: weights[first] for name, first in ties.items() if {name, first} <= set(weights)
    }
    model.load_state_dict(weights, assign=True)
    weights.clear()
    for name, first in ties.items():
        holder, _, last = name.rpartition(".")
        setattr(model.get_submodule(holder), last, model.get_parameter(first))


class Shaped(Protocol):
    """A tensor, or one on disk."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""


@contextmanager
def no_larger_than(weights: Collection[Shaped], where: str | Path) -> Iterator[None]:
    """In here a model stops being made as soon as it cannot be the one of these weights.

    A file that says ``n_layers: 10**15`` must cost neither hours nor memory. Parameters are registered before
    they are filled, so what they ask for is not taken yet.

    Args:
        weights: in any order.
        where: the file, for messages.

    Raises:
        ToolmemError: when there are more parameters, or many more modules, than weights.
    """
    from torch.nn.modules import module as modules

    me = threading.get_ident()
    left = {
        "parameters": 1000 + 2 * sum(math.prod(weight.shape) for weight in weights),
        "modules": 1000 + 32 * len(weights),
    }

    def take(kind: str, n: int) -> None:
        if threading.get_ident() == me:
            left[kind] -= n
            if left[kind] < 0:
                raise ToolmemError(
                    f"the weights in {where} do not fit its own model, which has more {kind}: the file was "
                    "edited; use another"
                )

    hooks = [
        modules.register_module_parameter_registration_hook(
            lambda _, __, one: take("parameters", 0 if one is None else one.numel())
        ),
        modules.register_module_module_registration_hook(lambda *_: take("modules", 1)),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def weights_of(checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The model's weights in a checkpoint, by the model's own names; adapters are merged into them."""
    stored = checkpoint.get("state_dict")
    found = {
        name.removeprefix(WEIGHTS_PREFIX): value
        for name, value in (stored.items() if isinstance(stored, Mapping) else ())
        if name.startswith(WEIGHTS_PREFIX) and hasattr(value, "numel")
    }
    about = checkpoint.get(KEY)
    spec = about.get("model") if isinstance(about, Mapping) else None
    adapters = spec.get("lora") if isinstance(spec, Mapping) else None
    if not adapters:
        return found
    from toolmem.models.lora import merged_weights

    return merged_weights(found, adapters)


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
        raise ToolmemError(unknown_format(path, about.get("format"), about.get("version")))
    if not isinstance(about["model"], dict) or not isinstance(about["data"], dict):
        raise ToolmemError(
            f"{path} does not say what its model and its data are: the file was edited; use another"
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

    if not isinstance(spec, Mapping) or not isinstance(spec.get("init_args"), Mapping):
        raise ToolmemError(
            f"{where} does not say what its model is: the file was edited; use another"
        )
    cls = import_class(str(spec.get("class_path")), f"{where}: the model class", LanguageModel)
    try:
        return cls(**spec["init_args"])
    except ToolmemError:
        raise
    except Exception as error:  # of whatever kind the constructor stumbles by
        raise ToolmemError(f"{where}: {spec['class_path']}: {first_line(error)}") from error
