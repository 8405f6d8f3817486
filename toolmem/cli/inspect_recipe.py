"""A recipe read for ``toolmem inspect``: its keys changed, and its model made without training or data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import limit_imports, plain
from toolmem.errors import ToolmemError
from toolmem.recipe_files import parse_yaml

if TYPE_CHECKING:
    from toolmem.models import LanguageModel

# What a tokenizer's name is when a recipe does not give it, in the DataModules that have one.
POPULATION = "toolmem.data.PopulationDataModule"
FACTS = "toolmem.data.FactsDataModule"
TOKENIZED = {FACTS: "byte", "toolmem.data.TextDataModule": "byte"}


def split_changes(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Part the words that change the recipe from those that are the command's own.

    Args:
        argv: the words after the command.

    Raises:
        ToolmemError: for a key without a value.
    """
    words: list[str] = []
    changes: dict[str, str] = {}
    rest = iter(argv)
    for word in rest:
        if not word.startswith(("--model.model", "--data.")):
            words.append(word)
            continue
        key, given, value = word.removeprefix("--").partition("=")
        changes[key] = value if given else next(rest, "")
        if not changes[key]:
            raise ToolmemError(f"--{key} needs a value")
    return words, changes


def split_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the first recipe, with all other words, from recipes that say what they change in it.

    Args:
        words: the words after the command.
    """
    kept: list[str] = []
    configs: list[str] = []
    rest = iter(words)
    for word in rest:
        name, given, value = word.partition("=")
        value = value if given else next(rest, "") if name == "--config" else ""
        if name == "--config" and value:
            configs.append(value)
        else:
            kept.append(word)
    return [*(["--config", configs[0]] if configs else []), *kept], configs[1:]


def read_recipe(path: str, changes: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, Any]:
    """A recipe as plain data.

    Args:
        path: the YAML file.
        changes: dotted key -> new value as YAML; ``init_args`` may be left out of keys.
        more: files that say only what they change, in turn.

    Raises:
        ToolmemError: for a file that is missing, or is no recipe.
    """
    recipe = _read(path)
    for other in more:
        _merge(recipe, _read(other))
    for key, value in changes.items():
        _change(recipe, key, parse_yaml(value, f"--{key}"))
    return started(recipe)


def started(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with what it leaves to the run that it starts from (``model.init_from``): the model, and the
    data's tokenizer, as ``toolmem fit`` fills them in.

    Raises:
        ToolmemError: where the model is left to a run that is not there.
    """
    from toolmem import checkpoints
    from toolmem.training.initial_weights import model_for

    section, data = recipe.get("model"), recipe.get("data")
    init_from = section.get("init_from") if isinstance(section, Mapping) else None
    filled = dict(recipe)
    if init_from is None or not isinstance(section, Mapping):
        return filled
    chosen = section.get("model") or {}
    if isinstance(chosen, Mapping) and "class_path" not in chosen:
        base = model_for(init_from)
        options = {**base["init_args"], **init_args_of(chosen)}
        filled["model"] = {**section, "model": {**base, "init_args": options}}
    if isinstance(data, Mapping) and data.get("class_path") == FACTS:
        options = init_args_of(data)
        with suppress(ToolmemError):
            if (
                "tokenizer" not in options
                and checkpoints.tokenizer_spec(init_from)["type"] != "byte"
            ):
                options["tokenizer"] = str(init_from)
        filled["data"] = {**data, "init_args": options}
    return filled


def _merge(recipe: dict[str, Any], other: Mapping[str, Any]) -> None:
    """Another class takes other options: it keeps none of the one before."""
    if "class_path" in other and other["class_path"] != recipe.get("class_path"):
        recipe.pop("init_args", None)
    for name, value in other.items():
        if isinstance(value, Mapping) and isinstance(recipe.get(name), dict):
            _merge(recipe[name], value)
        else:
            recipe[name] = value


def _read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ToolmemError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ToolmemError(f"--config {path}: this is not a text file") from error
    recipe = parse_yaml(text, f"--config {path}")
    if not isinstance(recipe, dict):
        raise ToolmemError(f"--config {path}: a recipe is a mapping of keys (model, data, ...)")
    return recipe


def _change(recipe: dict[str, Any], key: str, value: Any) -> None:
    section = ("model", "model") if key.startswith("model.model") else ("data",)
    place = recipe
    for name in section:
        place = place.setdefault(name, {})
    rest = key.split(".")[len(section) :]
    if not rest:
        place["class_path"] = value
        return
    if rest != ["class_path"] and rest[0] != "init_args":
        rest = ["init_args", *rest]
    for name in rest[:-1]:
        place = place.setdefault(name, {})
    place[rest[-1]] = value


def init_args_of(section: Any) -> dict[str, Any]:
    """The options that a section of a recipe gives; none where it gives none."""
    found = (section.get("init_args") or {}) if isinstance(section, Mapping) else {}
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise ToolmemError(f"init_args is {found!r:.80}: write options, key: value")
    return dict(found)


def _share_tokens(members: Any) -> bool:
    """Whether the members of a population leave the tokens of its data as they are."""
    return (
        isinstance(members, list)
        and bool(members)
        and all(isinstance(member, Mapping) for member in members)
        and not any(
            word in key for member in members for key in member for word in ("token", "vocab")
        )
    )


def vocab_size_of(data: Any, config: str) -> int:
    """How many token ids a recipe's data has, without building the data where its options tell.

    Args:
        data: the recipe's section ``data``.
        config: the recipe's path, for messages.

    Raises:
        ToolmemError: when it cannot be told.
    """
    if not isinstance(data, Mapping) or "class_path" not in data:
        raise ToolmemError(f"{config}: data.class_path is missing: it decides the vocabulary")
    path, options = str(data["class_path"]), init_args_of(data)
    size = options.get("vocab_size") or options.get("train_tokenizer")
    if size is not None:
        if not isinstance(size, int):
            raise ToolmemError(f"{config}: data: {size!r:.80} is no size of a vocabulary")
        return size
    if path in TOKENIZED:
        import toolmem.checkpoints  # noqa: F401 (a tokenizer may be a checkpoint's)
        from toolmem.data.tokenizers import make_tokenizer

        return make_tokenizer(str(options.get("tokenizer") or TOKENIZED[path])).vocab_size
    if path == POPULATION and _share_tokens(options.get("members")):
        return vocab_size_of(options.get("data"), config)
    return int(make_data(data).vocab_size)  # by its own word; this may take seconds


def make_data(data: Mapping[str, Any]) -> Any:
    """The DataModule of a recipe's section ``data``.

    Raises:
        ToolmemError: where it names no DataModule, or one that refuses its options.
    """
    from lightning.pytorch import LightningDataModule

    from toolmem.class_path import construct

    return construct(str(data["class_path"]), init_args_of(data), {}, "data", LightningDataModule)


def chosen_model(recipe: Mapping[str, Any], config: str) -> Mapping[str, Any]:
    """A recipe's section ``model.model``.

    Raises:
        ToolmemError: where it names no architecture.
    """
    section = recipe.get("model")
    chosen = section.get("model") if isinstance(section, Mapping) else None
    if isinstance(chosen, Mapping) and "class_path" in chosen:
        return chosen
    message = f"{config}: model.model.class_path is missing: it names the architecture"
    plain_one = Path(config).parent / "plain.yaml"
    if plain_one.is_file():
        message += (
            f". A recipe that says only what it changes comes second: --config {plain_one} "
            f"--config {config}"
        )
    raise ToolmemError(message)


def base_of(recipe: Mapping[str, Any], config: str) -> tuple[dict[str, Any] | None, str]:
    """What a recipe's model is to draft for, where it leaves that to a run (``model.init_from``).

    Before there is that run, it is as the recipe of its name has it that lies beside this one.

    Args:
        recipe: as ``read_recipe`` returns it.
        config: its path.

    Returns:
        ``class_path`` and ``init_args``, None where nothing is left open; and a line about where they
        are from, "" when from the run.

    Raises:
        ToolmemError: where there is neither.
    """
    from toolmem.training.initial_weights import base_for, leaves_base_open

    chosen, init_from = chosen_model(recipe, config), recipe["model"].get("init_from")
    path, options = str(chosen["class_path"]), init_args_of(chosen)
    if init_from is not None and leaves_base_open(path, options):
        beside = Path(config).parent / f"{Path(init_from).name}.yaml"
        if beside.is_file() and not Path(init_from).exists():
            base = chosen_model(_read(str(beside)), str(beside))
            said = f"base as in {beside}: {init_from} does not exist yet"
            return {"class_path": base["class_path"], "init_args": init_args_of(base)}, said
    return base_for(path, options, init_from), ""


def build(recipe: Mapping[str, Any], config: str) -> LanguageModel:
    """The recipe's model, with first weights that mean nothing.

    Args:
        recipe: as ``read_recipe`` returns it.
        config: its path, for messages, and for recipes beside it.

    Raises:
        ToolmemError: for what is missing, or cannot be.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from toolmem.class_path import import_class
    from toolmem.models import LanguageModel

    recipe = started(recipe)
    chosen = chosen_model(recipe, config)
    options = dict(init_args_of(chosen))
    base, _ = base_of(recipe, config)
    if base is not None:
        options["base"] = base
    if options.get("vocab_size") is not None:
        raise ToolmemError(
            "model.model.init_args.vocab_size is decided by the data (its tokenizer): leave it out"
        )
    options["vocab_size"] = vocab_size_of(recipe.get("data"), config)
    limit_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.model", type=LanguageModel)
    try:
        parsed = parser.parse_object({"model": {"model": {**chosen, "init_args": options}}})
    except ArgumentError as error:
        raise ToolmemError(f"{config}: {plain(error)}") from error
    model = parsed.model.model
    kind = import_class(model.class_path, "model.model.class_path", LanguageModel)
    arguments = model.init_args.as_dict()

    try:
        with without_numbers():
            return kind(**arguments)
    except ToolmemError:
        raise
    except Exception as error:  # of whatever kind the constructor stumbles by
        raise ToolmemError(
            f"{config}: model.model: {model.class_path} cannot be made ({type(error).__name__}: {error})"
        ) from error


@contextmanager
def without_numbers() -> Iterator[None]:
    """In here ``torch.nn.init`` does nothing: memory is asked for, but not written to."""
    from torch.nn import init
    from torch.overrides import TorchFunctionMode

    class WithoutNumbers(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if getattr(func, "__module__", "") == "torch.nn.init":
                return args[0] if args else (kwargs or {})["tensor"]
            return func(*args, **(kwargs or {}))

    drawn = init.trunc_normal_  # the one of them that asks no mode
    init.trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        with WithoutNumbers():
            yield
    finally:
        init.trunc_normal_ = drawn
