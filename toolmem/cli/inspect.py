"""``toolmem inspect``: what a recipe's model has and costs, told without training or building data."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.cli.inspect_recipe import (
    base_of,
    build,
    init_args_of,
    read_recipe,
    split_changes,
    split_configs,
    vocab_size_of,  # noqa: F401 (other commands take it from here)
)
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models import LanguageModel
    from toolmem.models.model_flops import BodyCount, ModelFlops

EXAMPLE = "toolmem inspect --config recipes/facts_in_tool.yaml --model.model.dim 64"
SMALL_STEP = 2e10  # FLOPs: a second, on a slow core
SHORT = ((1, 8), (1, 3), (2, 5))  # rows and tokens that tell how the work grows


def inspect(config: str, json: str | None = None, seq_len: int | None = None) -> None:
    """Show parameters, FLOPs per token and decoding memory of a recipe's model.

    ``--model.model.KEY VALUE``, ``--data.KEY VALUE`` and a further ``--config`` change the recipe, as in
    ``toolmem fit``.
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
    config: str,
    json: str | None,
    seq_len: int | None,
    changes: Mapping[str, str],
    more: Sequence[str] = (),
) -> None:
    """The same, with some of the recipe's keys changed, by words and by further recipes."""
    recipe = read_recipe(config, changes, more)
    if seq_len is None:
        seq_len = init_args_of(recipe.get("data")).get("seq_len")
    figures = measure(build(recipe, config), seq_len)
    _, note = base_of(recipe, config)
    if json is not None:
        from toolmem.files import write_json

        write_json(json, figures.as_dict())
    show(figures, config, note)


def counted_row(model: LanguageModel, seq_len: int) -> tuple[ModelFlops, BodyCount]:
    """FLOPs of one row, the quickest way: a small model is run on it, a large one on short rows.

    Shapes alone make torch import its compiler, which takes longer than a small model's step. They are
    for a large model whose short rows do not tell what a long one costs.
    """
    import torch

    from toolmem.models.model_flops import ModelFlops

    # FLOPs of a step, but for attention, are about six a parameter and token.
    small = 6 * sum(p.numel() for p in model.parameters()) * seq_len < SMALL_STEP
    flops = ModelFlops(model, run=True)
    if small:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():  # what memory held before may be slow to multiply
                parameter.normal_(std=0.02, generator=generator)
        return flops, flops.body(1, seq_len)
    shapes = [shape for shape in SHORT if shape[1] <= seq_len]
    bodies = [flops.body(*shape) for shape in shapes]
    if len(shapes) == len(SHORT) and all(
        bodies[0].at(*shape).same_mathematics(body)
        for shape, body in zip(shapes, bodies, strict=True)
    ):
        return flops, bodies[0].at(1, seq_len)
    model.to("meta")
    flops = ModelFlops(model)
    return flops, flops.body(1, seq_len)


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
    model.eval()  # what depends on a whole batch, as an expert's capacity, is off
    params, active = model.parameter_counts(), model.active_parameters()
    fixed, growing = cache_bytes(model)
    counted, body = counted_row(model, seq_len)
    head = counted.head()
    training = exact(body, backward=True) / seq_len + head.both
    if model.multi_token is not None:  # only training predicts more than the next token
        training += len(model.multi_token.blocks) * counted.head_ahead().both
        model.multi_token = None
        _, body = counted_row(model, seq_len)
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


def show(figures: Figures, config: str, note: str = "") -> None:
    """Print the figures, and a line more."""
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
    for line in [*lines, note] if note else lines:
        console.print(line, highlight=False, soft_wrap=True)


def share(part: int | Fraction, whole: int | Fraction) -> str:
    """A part of a whole in percent."""
    return f"{100 * float(part) / float(whole):.1f} %" if whole else ""


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
    words, more = split_configs(words)

    @functools.wraps(inspect)
    def changed(config: str, json: str | None = None, seq_len: int | None = None) -> None:
        inspect_changed(config, json, seq_len, changes, more)

    call(changed, words, prog=f"toolmem {command}", example=EXAMPLE)
    return 0
