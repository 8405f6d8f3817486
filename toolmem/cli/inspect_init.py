"""``toolmem inspect init``: how large activations are at first, by layer and width, drawn."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call, limit_imports, plain
from toolmem.cli.inspect_recipe import build, read_recipe, split_changes, split_configs
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.analysis.initialization import WidthScan
    from toolmem.models import LanguageModel
    from toolmem.training import OptimizerConfig

EXAMPLE = (
    "toolmem inspect init --config recipes/facts_in_weight.yaml --widths [64,128,256] --steps 3"
)
# What grows with the width where a recipe gives it, in a model and in the parts of a hybrid. Heads grow
# in width where their number is given, and in number else.
GROWING = {
    "dim", "hidden_dim", "dense_hidden_dim", "dt_rank", "kv_rank", "q_rank", "rope_dim",
    "mla_kv_rank", "mla_q_rank", "mla_rope_dim",
}  # fmt: skip
N_WIDTHS, WIDE = 4, 512
ROWS, SEQ = 4, 32


def inspect_init(
    config: str,
    widths: list[int] | None = None,
    steps: int = 0,
    seeds: int = 1,
    out: str = "init.png",
    json: str | None = None,
) -> None:
    """Draw the size of activations by layer and width, as first weights make it.

    ``--model.model.KEY VALUE``, ``--data.KEY VALUE`` and a further ``--config`` change the recipe, as in
    ``toolmem fit``; ``--model.model.initialization`` is what to compare. With ``--steps`` it is also the
    coordinate check of muP: how much some steps of the recipe's optimizer change each activation, and
    the slope of that against the width, which should be 0.

    Args:
        config: the recipe.
        widths: values of dim, as [64,128,256]; four around the recipe's own when None. What is as wide as
            the model in its own way (hidden_dim, a head's width) grows with it.
        steps: optimizer steps on one batch of random tokens; 0 for none.
        seeds: models of each width; mean squares are averaged over them.
        out: the picture's file, .png, .svg or .pdf.
        json: a file to write the figures to.

    Raises:
        ToolmemError: for a recipe that cannot be read, or a width that the model cannot have.
    """
    inspect_init_changed(config, widths, steps, seeds, out, json, {}, ())


def inspect_init_changed(
    config: str,
    widths: list[int] | None,
    steps: int,
    seeds: int,
    out: str,
    json: str | None,
    changes: Mapping[str, str],
    more: Sequence[str],
) -> None:
    """The same, with some of the recipe's keys changed, by words and by further recipes."""
    from toolmem.analysis.initialization import draw, scan_widths
    from toolmem.analysis.pictures import picture_file
    from toolmem.console import stdout

    picture_file(out)  # before anything is measured
    for name, value, least in (("steps", steps, 0), ("seeds", seeds, 1)):
        if value < least:
            raise ToolmemError(f"{name} is {value}: it must be at least {least}")
    recipe = read_recipe(config, changes, more)
    model = build(recipe, config)
    chosen = check_widths(usual_widths(model.dim) if widths is None else widths)
    optimizer = optimizer_of(recipe, config) if steps else None
    seq = min(SEQ, model.max_seq_len)
    scan = scan_widths(
        functools.partial(widened, model), chosen,
        optimizer=optimizer, steps=steps, seeds=seeds, rows=ROWS, seq=seq,
    )  # fmt: skip
    if json is not None:
        from toolmem.files import write_json

        write_json(json, scan.as_dict())
    title = f"{' + '.join((config, *more))}: {model.init_args.get('initialization')}"
    show(scan, title, steps)
    stdout().print(draw(scan, out, title, steps), highlight=False, markup=False, soft_wrap=True)


def usual_widths(dim: int) -> list[int]:
    """Four widths in steps of two: from the recipe's own up to 512, then from its own down."""
    widths = [dim]
    while len(widths) < N_WIDTHS and widths[-1] * 2 <= WIDE:
        widths.append(widths[-1] * 2)
    while len(widths) < N_WIDTHS and widths[0] % 2 == 0:
        widths.insert(0, widths[0] // 2)
    return widths


def check_widths(widths: Sequence[int]) -> list[int]:
    """Widths that a slope can be taken over, rising.

    Raises:
        ToolmemError: for fewer than two, one twice, or one that is no width.
    """
    if len(set(widths)) < 2 or len(set(widths)) < len(widths) or min(widths) < 1:
        raise ToolmemError(
            f"widths: {list(widths)}: give two or more different ones, each at least 1"
        )
    return sorted(widths)


def widened(model: LanguageModel, width: int) -> LanguageModel:
    """A model as another, ``width`` wide.

    Raises:
        ToolmemError: when the model cannot be of that width.
    """
    try:
        return type(model)(**_grown(model.init_args, model.dim, width))
    except ToolmemError as error:
        raise ToolmemError(f"widths: {width}: {error}") from error


def _grown(options: Mapping[str, Any], dim: int, width: int) -> dict[str, Any]:
    """Options of a model, or of a part, ``dim`` wide, made those of one ``width`` wide."""
    growing = GROWING | {"head_dim"} if "n_heads" in options else GROWING
    found = dict(options)
    for name, value in options.items():
        if isinstance(value, Mapping):
            found[name] = _grown(value, dim, width)
        elif name in growing and isinstance(value, int):  # 0 and None say: not there, by default
            if value * width % dim:
                raise ToolmemError(f"{name} {value} of dim {dim} cannot grow along: change {name}")
            found[name] = value * width // dim
    return found


def optimizer_of(recipe: Mapping[str, Any], config: str) -> OptimizerConfig:
    """The recipe's optimizer.

    Args:
        recipe: as ``read_recipe`` returns it.
        config: its path, for messages.

    Raises:
        ToolmemError: where there is none, or it cannot be.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    from toolmem.training import OptimizerConfig

    chosen = recipe["model"].get("optimizer")
    if not isinstance(chosen, Mapping) or "class_path" not in chosen:
        raise ToolmemError(
            f"{config}: model.optimizer.class_path is missing: steps need an optimizer"
        )
    limit_imports()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--model.optimizer", type=OptimizerConfig)
    try:
        parsed = parser.parse_object({"model": {"optimizer": dict(chosen)}})
    except ArgumentError as error:
        raise ToolmemError(f"{config}: {plain(error)}") from error
    made: OptimizerConfig = parser.instantiate_classes(parsed).model.optimizer
    return made


def show(scan: WidthScan, title: str, steps: int) -> None:
    """Print sizes by width, and their slopes."""
    from rich.table import Table

    from toolmem.console import stdout

    console = stdout()
    console.print(title, highlight=False, markup=False, soft_wrap=True)
    parts = [("root mean square at the start", scan.start)]
    if scan.change:
        parts.append((f"root mean square of what {steps} steps change", scan.change))
    for part, sizes in parts:
        table = Table(box=None, pad_edge=False)
        table.add_column("dim")
        for name in (*map(str, scan.widths), "slope"):
            table.add_column(name, justify="right")
        slopes = scan.slopes(sizes)
        for name, values in sizes.items():
            shown = (f"{value:.3g}" for value in values)
            table.add_row(name, *shown, f"{slopes[name]:+.2f}")
        console.print(f"\n{part}:", highlight=False)
        console.print(table)


def main(argv: list[str]) -> int:
    """Entry of ``toolmem inspect init``.

    Args:
        argv: the words after it.
    """
    words, changes = split_changes(argv)
    words, more = split_configs(words)

    @functools.wraps(inspect_init)
    def changed(**values: Any) -> None:
        inspect_init_changed(**values, changes=changes, more=more)

    call(changed, words, prog="toolmem inspect init", example=EXAMPLE)
    return 0
