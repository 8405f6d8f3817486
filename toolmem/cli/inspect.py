"""``toolmem inspect``: what a recipe's model has and costs, told without training or building data."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call, plain
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models import LanguageModel
    from toolmem.models.model_flops import BodyCount, ModelFlops

EXAMPLE = "toolmem inspect --config recipes/facts_in_tool.yaml --model.model.dim 64"
SMALL_STEP = 2e10  # FLOPs: a second, on a slow core
# What a tokenizer's name is when a recipe does not give it, in the DataModules that have one.
TOKENIZED = {"toolmem.data.FactsDataModule": "byte", "toolmem.data.TextDataModule": "byte"}


def inspect(config: str, json: str | None = None, seq_len: int | None = None) -> None:
    """Show parameters, FLOPs per token and decoding memory of a recipe's model.

    ``--model.model.KEY VALUE`` and ``--data.KEY VALUE`` change the recipe, as in ``toolmem fit``.
    ``toolmem inspect init`` looks at a model's first weights instead.

    Args:
        config: the recipe.
        json: a file to write the figures to.
        seq_len: tokens in a row, on which attention's FLOPs depend; the data's seq_len, or else the
            model's max_seq_len when None.

    Raises:
        ToolmemError: for a recipe that cannot be read, or a model that cannot be made.
    """
    inspect_changed(config, json, seq_len, {})


def inspect_changed(
    config: str, json: str | None, seq_len: int | None, changes: Mapping[str, str]
) -> None:
    """The same, with some of the recipe's keys changed."""
    recipe = read_recipe(config, changes)
    if seq_len is None:
        seq_len = _init_args(recipe.get("data")).get("seq_len")
    figures = measure(build(recipe, config), seq_len)
    if json is not None:
        from toolmem.files import write_json

        write_json(json, figures.as_dict())
    show(figures, config)


# -- the recipe


def read_recipe(path: str, changes: Mapping[str, str]) -> dict[str, Any]:
    """A recipe as plain data.

    Args:
        path: the YAML file.
        changes: dotted key -> new value as YAML; ``init_args`` may be left out of keys.

    Raises:
        ToolmemError: for a file that is missing, or is no recipe.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ToolmemError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ToolmemError(f"--config {path}: this is not a text file") from error
    recipe = _load(text, f"--config {path}")
    if not isinstance(recipe, dict):
        raise ToolmemError(f"--config {path}: a recipe is a mapping of keys (model, data, ...)")
    for key, value in changes.items():
        _change(recipe, key, _load(value, f"--{key}"))
    return recipe


def _load(text: str, source: str) -> Any:
    """YAML as jsonargparse reads it (1e-3 is a number)."""
    from jsonargparse import get_loader
    from yaml import YAMLError

    try:
        return get_loader("yaml")(text)
    except YAMLError as error:
        raise ToolmemError(f"{source}: this is not YAML ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}{getattr(error, 'problem', None) or error}"


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


def _init_args(section: Any) -> dict[str, Any]:
    return (section.get("init_args") or {}) if isinstance(section, Mapping) else {}


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
    path, options = data["class_path"], _init_args(data)
    size = options.get("vocab_size") or options.get("train_tokenizer")
    if size is not None:
        return int(size)
    if path in TOKENIZED:
        from toolmem.data.tokenizers import make_tokenizer

        return make_tokenizer(options.get("tokenizer") or TOKENIZED[path]).vocab_size
    from toolmem.class_path import construct  # by its own word; this may take seconds

    return int(construct(path, options, {}, "data").vocab_size)


def build(recipe: Mapping[str, Any], config: str) -> LanguageModel:
    """The recipe's model, with first weights that mean nothing.

    Args:
        recipe: as ``read_recipe`` returns it.
        config: its path, for messages.

    Raises:
        ToolmemError: for what is missing, or cannot be.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from toolmem.class_path import import_class
    from toolmem.models import LanguageModel

    section = recipe.get("model")
    chosen = section.get("model") if isinstance(section, Mapping) else None
    if not isinstance(chosen, Mapping) or "class_path" not in chosen:
        raise ToolmemError(
            f"{config}: model.model.class_path is missing: it names the architecture"
        )
    options = dict(_init_args(chosen))
    if options.get("vocab_size") is not None:
        raise ToolmemError(
            "model.model.init_args.vocab_size is decided by the data (its tokenizer): leave it out"
        )
    options["vocab_size"] = vocab_size_of(recipe.get("data"), config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.model", type=LanguageModel)
    try:
        parsed = parser.parse_object({"model": {"model": {**chosen, "init_args": options}}})
    except ArgumentError as error:
        raise ToolmemError(f"{config}: {plain(error)}") from error
    model = parsed.model.model
    kind = import_class(model.class_path, "model.model.class_path")
    arguments = model.init_args.as_dict()

    with without_numbers():
        return kind(**arguments)


def without_numbers() -> Any:
    """In here ``torch.nn.init`` does nothing: memory is asked for, but not written to."""
    from torch.overrides import TorchFunctionMode

    class WithoutNumbers(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if getattr(func, "__module__", "") == "torch.nn.init":
                return args[0] if args else (kwargs or {})["tensor"]
            return func(*args, **(kwargs or {}))

    return WithoutNumbers()


def flop_counter(model: LanguageModel, seq_len: int) -> ModelFlops:
    """What counts a model's FLOPs soonest: a small model is run, a large one goes to the meta device.

    Shapes alone make torch import its compiler, which takes longer than a small model's step.
    """
    import torch

    from toolmem.models.model_flops import ModelFlops

    # FLOPs of a step, but for attention, are about six a parameter and token.
    small = 6 * sum(p.numel() for p in model.parameters()) * seq_len < SMALL_STEP
    if not small:
        model.to("meta")
    elif model.embedding.weight.device.type == "cpu":
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # what memory held before may be slow to multiply
                parameter.normal_(std=0.02, generator=generator)
    return ModelFlops(model, run=small)


# -- the figures


@dataclass(frozen=True)
class Figures:
    """What a model has and costs.

    Args:
        params: parameters by group.
        params_active: parameters that one token uses.
        seq_len: tokens in a row that FLOPs are of.
        flops: exact FLOPs of the forward pass for a token, by group.
        flops_training: exact FLOPs forward and backward for a token, each bearing loss.
        cache_bytes_per_token: decoding memory that grows with a lane's length.
        cache_bytes_fixed: decoding memory of a lane that does not.
        cache_dtype: what decoding states are kept in.
        uncounted: operations that have no formula.
    """

    params: dict[str, int]
    params_active: int
    seq_len: int
    flops: dict[str, Fraction]
    flops_training: Fraction
    cache_bytes_per_token: Fraction
    cache_bytes_fixed: Fraction
    cache_dtype: str
    uncounted: tuple[str, ...]

    @property
    def params_total(self) -> int:
        """All parameters."""
        return sum(self.params.values())

    @property
    def params_non_embedding(self) -> int:
        """Parameters outside the tables of tokens, at the input and, untied, at the head."""
        return self.params_total - self.params.get("embedding", 0) - self.params.get("head", 0)

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "params_total": self.params_total,
            "params_active": self.params_active,
            "params_non_embedding": self.params_non_embedding,
            "params_by_group": {name: n for name, n in self.params.items() if n},
            "seq_len": self.seq_len,
            "flops_forward_per_token": number(sum(self.flops.values(), Fraction())),
            "flops_training_per_token": number(self.flops_training),
            "flops_forward_by_group": {name: number(n) for name, n in self.flops.items()},
            "cache_bytes_per_token": number(self.cache_bytes_per_token),
            "cache_bytes_fixed": number(self.cache_bytes_fixed),
            "cache_dtype": self.cache_dtype,
            "uncounted_operations": list(self.uncounted),
        }


def number(value: Fraction) -> int | float:
    """A whole number as it is, another as a float."""
    return value.numerator if value.denominator == 1 else float(value)


def measure(model: LanguageModel, seq_len: int | None = None) -> Figures:
    """Take a model's figures.

    Args:
        model: it is changed.
        seq_len: tokens in a row; the model's ``max_seq_len`` when None.

    Raises:
        ToolmemError: for a length that the model cannot take.
    """
    seq_len = model.max_seq_len if seq_len is None else seq_len
    if not 1 <= seq_len <= model.max_seq_len:
        raise ToolmemError(
            f"seq_len is {seq_len}: it must be at least 1 and at most the model's max_seq_len "
            f"{model.max_seq_len}"
        )
    params, active = model.parameter_counts(), model.active_parameters()
    fixed, growing = cache_bytes(model)
    counted = flop_counter(model, seq_len)
    body, head = counted.body(1, seq_len), counted.head()
    asked = 1 + len(model.multi_token.blocks) if model.multi_token is not None else 1
    training = exact(body, backward=True) / seq_len + asked * (head.forward + head.gradient)
    if asked > 1:  # only training predicts more than the next token
        model.multi_token = None
        body = flop_counter(model, seq_len).body(1, seq_len)
    return Figures(
        params,
        active,
        seq_len,
        {**by_group(body), "head": Fraction(head.forward)},
        training,
        growing,
        fixed,
        str(model.embedding.weight.dtype).removeprefix("torch."),
        tuple(sorted(counted.unknown)),
    )


def exact(body: BodyCount, backward: bool) -> Fraction:
    """Exact FLOPs of one full row."""
    from toolmem.models.model_flops import full_row

    return Fraction(body.exact(body.seq, full_row, backward))


def by_group(body: BodyCount) -> dict[str, Fraction]:
    """Exact FLOPs of the forward pass for a token of one full row, by group."""
    from toolmem.models.model_flops import full_row

    found = {name: Fraction(flops) for name, flops in body.groups.items() if flops}
    for pair in body.pairs:
        scores = pair.forward * full_row(pair.window, pair.seq)
        found[pair.group] = found.get(pair.group, Fraction()) + scores
    return {name: flops / body.seq for name, flops in found.items()}


def cache_bytes(model: LanguageModel) -> tuple[Fraction, Fraction]:
    """Bytes of a lane's decoding state: what does not grow with its length, and what a token adds."""
    short = model.max_seq_len
    sizes = [
        model.new_cache(1, length, device="meta").size_in_bytes() for length in (short, 2 * short)
    ]
    growing = Fraction(sizes[1] - sizes[0], short)
    return sizes[0] - short * growing, growing


# -- the screen


def show(figures: Figures, config: str) -> None:
    """Print the figures."""
    from rich.table import Table

    from toolmem.console import stdout

    console = stdout()
    total, forward = figures.params_total, sum(figures.flops.values(), Fraction())
    table = Table(title=config, title_justify="left", box=None, pad_edge=False)
    table.add_column("part")
    for name in ("parameters", "share", "FLOPs/token, forward", "share"):
        table.add_column(name, justify="right")
    groups = [name for name, n in figures.params.items() if n or figures.flops.get(name)]
    groups += [name for name in figures.flops if name not in groups]
    for name in groups:
        n, flops = figures.params.get(name, 0), figures.flops.get(name, Fraction())
        table.add_row(
            name, f"{n:,}", share(n, total), f"{float(flops):,.0f}", share(flops, forward)
        )
    table.add_row("total", f"{total:,}", "", f"{float(forward):,.0f}", "", style="bold")
    console.print(table)
    lines = [
        f"parameters: {figures.params_active:,} active, {figures.params_non_embedding:,} without "
        "embedding and head",
        f"FLOPs/token: {float(forward):,.0f} forward, {float(figures.flops_training):,.0f} training, "
        f"exact, in rows of {figures.seq_len:,} tokens that all bear loss",
        f"cache: {float(figures.cache_bytes_per_token):,.0f} bytes a token and "
        f"{float(figures.cache_bytes_fixed):,.0f} a lane, in {figures.cache_dtype}",
    ]
    if figures.uncounted:
        lines.append(f"not counted, having no formula: {', '.join(figures.uncounted)}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def share(part: int | Fraction, whole: int | Fraction) -> str:
    """A part of a whole in percent."""
    return f"{100 * float(part) / float(whole):.1f} %" if whole else ""


# -- entry


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


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem inspect``.

    Args:
        command: ``inspect``.
        argv: the words after it; ``init`` first hands over to ``inspect_init``.
    """
    if argv[:1] == ["init"]:
        import importlib

        return importlib.import_module("toolmem.cli.inspect_init").main(argv[1:]) or 0
    words, changes = split_changes(argv)

    @functools.wraps(inspect)
    def changed(config: str, json: str | None = None, seq_len: int | None = None) -> None:
        inspect_changed(config, json, seq_len, changes)

    call(changed, words, prog=f"toolmem {command}", example=EXAMPLE)
    return 0
