"""``toolmem plan``: what a recipe's training holds in memory and sends, and on what devices it fits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import call
from toolmem.cli.inspect_recipe import (
    build,
    init_args_of,
    read_recipe,
    split_changes,
    split_configs,
)
from toolmem.errors import ToolmemError
from toolmem.units import bytes_of

if TYPE_CHECKING:
    from toolmem.models import LanguageModel
    from toolmem.training.memory_plan import Layout, MemoryPlan, Step

EXAMPLE = "toolmem plan --config recipes/smollm.yaml --devices 8 --memory 32GB"
# what Python, torch and CUDA hold, and what the allocator cannot use
RESERVE = 0.08
HALVES = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}
BATCHES = 4  # of data that do not say how long their rows are


def plan(
    config: str,
    devices: int = 1,
    memory: str = "32GB",
    rows: int | None = None,
    seq_len: int | None = None,
    precision: str | None = None,
    json: str | None = None,
) -> None:
    """Work out what training by a recipe takes of each device, and on how many it fits.

    ``--model.model.KEY VALUE``, ``--data.KEY VALUE`` and a further ``--config`` change the recipe, as in
    ``toolmem fit``.

    Args:
        config: the recipe.
        devices: how many there are.
        memory: of each device, as 32GB or 80GiB.
        rows: of a micro-batch, over all devices; the data's batch_size when None.
        seq_len: tokens in a row; the data's when None.
        precision: 32-true, 16-mixed or bf16-mixed; the recipe's trainer.precision when None.
        json: a file to write the figures to.

    Raises:
        ToolmemError: for a recipe that cannot be read, or a model that cannot be made.
    """
    plan_recipe(read_recipe(config, {}), config, devices, memory, rows, seq_len, precision, json)


def plan_recipe(
    recipe: Mapping[str, Any],
    config: str,
    devices: int,
    memory: str,
    rows: int | None,
    seq_len: int | None,
    precision: str | None,
    json: str | None,
) -> None:
    """The same, of a recipe that was read already."""
    if devices < 1:
        raise ToolmemError(f"devices is {devices}: it must be 1 or more")
    limit = bytes_of(memory, "memory") * (1 - RESERVE)
    made = planned(recipe, config, rows, seq_len, precision)
    found, refused = rows_of(made, devices, limit)
    if json is not None:
        from toolmem.files import write_json

        write_json(json, {"parameters": count(made.model), "layouts": found, "refused": refused})
    show(made, found, refused, devices, memory, config)


def planned(
    recipe: Mapping[str, Any],
    config: str,
    rows: int | None,
    seq_len: int | None,
    precision: str | None,
) -> MemoryPlan:
    """The plan of a recipe; its model has shapes alone.

    Raises:
        ToolmemError: for a recipe that cannot be trained.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    from toolmem.class_path import construct
    from toolmem.training.memory_plan import MemoryPlan
    from toolmem.training.optimizers import OptimizerConfig

    with FakeTensorMode():
        model = build(recipe, config).train()
    chosen = (recipe.get("model") or {}).get("optimizer")
    if not isinstance(chosen, Mapping) or "class_path" not in chosen:
        raise ToolmemError(
            f"{config}: model.optimizer.class_path is missing: it decides what is kept"
        )
    optimizer = construct(
        chosen["class_path"], init_args_of(chosen), {}, "model.optimizer", OptimizerConfig
    )
    return MemoryPlan(model, optimizer, step_of(recipe, model, config, rows, seq_len, precision))


def step_of(
    recipe: Mapping[str, Any],
    model: LanguageModel,
    config: str,
    rows: int | None,
    seq_len: int | None,
    precision: str | None,
) -> Step:
    """What is done in a step of a recipe.

    Raises:
        ToolmemError: for sizes that cannot be.
    """
    import torch

    from toolmem.recipe_files import get_key
    from toolmem.training.memory_plan import Step

    precision = str(precision or get_key(recipe, "trainer.precision", None) or "32-true")
    if precision not in (*HALVES, "32-true"):
        raise ToolmemError(f"precision is {precision}: choose 32-true, 16-mixed or bf16-mixed")
    half = getattr(torch, HALVES[precision]) if precision in HALVES else None
    gathered = get_key(recipe, "model.fsdp_param_dtype", None)
    data = init_args_of(recipe.get("data"))
    share = 1.0
    n_rows = data.get("batch_size") if rows is None else rows
    seq = data.get("seq_len") if seq_len is None else seq_len
    if n_rows is None or seq is None:
        longest, batch_rows, share = shape_of_batches(recipe)
        n_rows = batch_rows if n_rows is None else n_rows
        seq = longest if seq is None else seq
    if n_rows < 1 or not 1 <= seq <= model.max_seq_len:
        raise ToolmemError(
            f"{config}: {n_rows} rows of {seq} tokens: rows must be 1 or more, and tokens at most the "
            f"model's max_seq_len {model.max_seq_len}"
        )
    return Step(
        n_rows,
        seq,
        round(share * n_rows * seq),
        get_key(recipe, "trainer.accumulate_grad_batches", 1),
        half,
        None if gathered is None else getattr(torch, gathered),
    )


def shape_of_batches(recipe: Mapping[str, Any]) -> tuple[int, int, float]:
    """The longest row of a few batches, their rows, and the largest share of tokens that bear loss."""
    from toolmem.class_path import construct

    data = recipe["data"]
    module = construct(data["class_path"], init_args_of(data), {}, "data")
    module.prepare_data()
    module.setup("fit")
    batches = list(islice(iter(module.train_dataloader()), BATCHES))
    return (
        max(batch.tokens.shape[1] for batch in batches),
        max(batch.tokens.shape[0] for batch in batches),
        max(float(batch.loss_mask.float().mean()) for batch in batches),
    )


def count(model: LanguageModel) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def rows_of(
    made: MemoryPlan, devices: int, limit: float
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """A row of figures for each way to share the work, and why some tensor-parallel sizes are not there."""
    from toolmem.training.memory_plan import layouts, with_checkpointing

    found, refused = layouts(made.model, devices)
    return [figures(made, layout, limit) for layout in with_checkpointing(found)], refused


def figures(made: MemoryPlan, layout: Layout, limit: float) -> dict[str, Any]:
    """Bytes of one device under a layout, and whether they fit."""
    memory = made.memory(layout)
    return {
        "layout": layout.name,
        "checkpointing": layout.checkpointing,
        "parameters": memory.parameters,
        "gathered": memory.gathered,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "passing": max(memory.logits, memory.passing),
        "total": memory.total,
        "fits": memory.total <= limit,
        "most_rows": made.most_rows(layout, limit),
        "sent": made.communication(layout),
    }


def show(
    made: MemoryPlan,
    found: Sequence[Mapping[str, Any]],
    refused: Mapping[int, str],
    devices: int,
    memory: str,
    config: str,
) -> None:
    """Print the figures as a table, and what they come to."""
    from rich.table import Table

    from toolmem.console import stdout
    from toolmem.training.memory_plan import cache_bytes

    console, step = stdout(), made.step
    unit, size = next(
        (unit, size)
        for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
        if size == 1e3 or max(row["total"] for row in found) >= 10 * size
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    table.add_column("recompute", no_wrap=True)
    for name in ("lasting", "kept", "passing", "total", "fits", "rows", "sent"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in found:
        lasting = row["parameters"] + row["gathered"] + row["gradients"] + row["optimizer"]
        parts = (lasting, row["activations"], row["passing"], row["total"])
        table.add_row(
            row["layout"],
            row["checkpointing"],
            *(f"{part / size:,.1f}" for part in parts),
            "yes" if row["fits"] else "no",
            f"{row['most_rows']:,}",
            f"{row['sent'] / size:,.1f}" if row["sent"] else "-",
            style=None if row["fits"] else "dim",
        )
    precision = (
        "float32" if step.dtype is None else f"{str(step.dtype).removeprefix('torch.')}, mixed"
    )
    head = [
        f"{config}: {count(made.model):,} parameters, {type(made.built).__name__}, {precision}",
        f"{step.rows} rows of {step.seq:,} tokens at once over all devices, {step.loss_tokens:,} of the "
        f"tokens with loss, {step.micro_batches} times a step",
    ]
    tail = [
        f"{unit} of one device. lasting: parameters, gradients, optimizer, what FSDP2 gathers; kept: "
        "activations; passing: logits, or what one operation or block works on; sent: in a step. rows: the "
        f"most at once over all devices that fit into {memory} each, of which {RESERVE:.0%} is left to torch "
        "and the allocator",
        f"generation: {amount(cache_bytes(made.model, 1, made.model.max_seq_len))} of float32 cache a lane "
        f"of {made.model.max_seq_len:,} tokens",
        *([not_there(refused)] if refused else []),
        verdict(found, devices, memory),
    ]
    for line in head:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(table)
    for line in tail:
        console.print(line, highlight=False, soft_wrap=True)


def not_there(refused: Mapping[int, str]) -> str:
    """Why some tensor-parallel sizes are not in the table, by the first of them."""
    sizes = ", ".join(map(str, refused))
    return f"no TP {sizes}: {next(iter(refused.values()))}"


def verdict(found: Sequence[Mapping[str, Any]], devices: int, memory: str) -> str:
    """The layout to begin with, in words."""
    fitting = [row for row in found if row["fits"]]
    if not fitting:
        best = max(found, key=lambda row: row["most_rows"])
        if best["most_rows"]:
            return (
                f"nothing fits so; {best['layout']} with checkpointing {best['checkpointing']} fits with "
                f"{best['most_rows']} rows at once (data.batch_size; trainer.accumulate_grad_batches "
                "makes up for it)"
            )
        return f"nothing fits on {devices} x {memory}: take more devices, or a smaller model"
    # what is done twice, or sent, costs time: DDP before FSDP2 before TP, no checkpointing before some
    first = fitting[0]
    return f"fits: {first['layout']}, checkpointing {first['checkpointing']}, to begin with"


def amount(n_bytes: float) -> str:
    """Bytes as people read them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem plan``.

    Args:
        command: ``plan``.
        argv: the words after it.
    """
    words, changes = split_changes(argv)
    words, more = split_configs(words)

    @functools.wraps(plan)
    def changed(config: str, **options: Any) -> None:
        plan_recipe(read_recipe(config, changes, more), config, **options)

    call(changed, words, prog=f"toolmem {command}", example=EXAMPLE)
    return 0
