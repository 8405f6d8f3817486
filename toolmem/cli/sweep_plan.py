"""What a sweep would train, checked before anything is, and what it would cost."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.cli.functions import quiet
from toolmem.console import stdout
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.sweeps.folder import SweepFolder
    from toolmem.sweeps.grid import Planned
    from toolmem.sweeps.plans import Plan
    from toolmem.sweeps.recipe import SweepRecipe

BATCHES = 4  # that tokens and FLOPs of a step are the mean of
TIMED_STEPS = 40
TIMED_FLOPS = (
    5e10  # of the largest step that is timed; what costs more is reckoned from what costs less
)


def check(sweep: SweepRecipe) -> None:
    """Refuse what cannot be trained before anything is: every value of every axis, every model.

    Raises:
        ToolmemError: naming the run and the key.
    """
    from toolmem.sweeps.grid import expand
    from toolmem.sweeps.search import check_order

    runs = expand(sweep, sweep.seeds[:1])
    for run in covering(runs):
        try:
            check_recipe(run.recipe)
        except ToolmemError as error:
            raise ToolmemError(f"{run.name}: {error}") from error
    sizes = model_sizes(runs)
    if sweep.search is not None:
        check_order(sweep, sizes)


def covering(runs: Sequence[Planned]) -> list[Planned]:
    """A few of the runs, in which every value of every axis comes up."""
    seen: set[tuple[str, str]] = set()
    chosen = []
    for run in runs:
        values = {(axis, repr(label)) for axis, label in run.settings.items()}
        if not values <= seen:
            seen |= values
            chosen.append(run)
    return chosen


def check_recipe(recipe: dict[str, Any]) -> None:
    """Parse a recipe as ``toolmem fit`` does.

    Raises:
        ToolmemError: for what it refuses.
    """
    from toolmem.cli.fit import run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        try:
            with quiet():
                run("fit", ["fit", "--config", str(path), "--print_config"])
        except SystemExit:
            return


def model_sizes(runs: Sequence[Planned]) -> dict[str, int]:
    """Parameters of each run's model; every distinct model is made once.

    Raises:
        ToolmemError: for a model that cannot be, naming the run.
    """
    from toolmem.cli.inspect_recipe import build

    sizes: dict[str, int] = {}
    by_model: dict[str, int] = {}
    keys = model_keys(runs)
    for run in runs:
        key = keys[run.name]
        if key not in by_model:
            try:
                model = build(run.recipe, "its recipe")
            except ToolmemError as error:
                raise ToolmemError(f"{run.name}: {error}") from error
            by_model[key] = sum(p.numel() for p in model.parameters())
        sizes[run.name] = by_model[key]
    return sizes


def model_keys(runs: Sequence[Planned]) -> dict[str, str]:
    """By run, the same for runs of the same model.

    Raises:
        ToolmemError: for data that do not tell their vocabulary, naming the run.
    """
    from toolmem.cli.inspect_recipe import started, vocab_size_of

    sizes: dict[str, int] = {}  # many runs have the same data
    keys = {}
    for run in runs:
        shape = data_key(run.recipe)
        if shape not in sizes:
            try:
                sizes[shape] = vocab_size_of(started(run.recipe).get("data"), "its recipe")
            except ToolmemError as error:
                raise ToolmemError(f"{run.name}: {error}") from error
        section = run.recipe.get("model") or {}
        model = [section.get("model"), section.get("init_from"), sizes[shape]]
        keys[run.name] = json.dumps(model, sort_keys=True, default=str)
    return keys


def data_key(recipe: Mapping[str, Any]) -> str:
    """The same for recipes whose data differ in their seed alone, which no model depends on."""
    from toolmem.recipe_files import flattened

    data = flattened(recipe.get("data") or {})
    kept = {key: value for key, value in data.items() if key.rpartition(".")[2] != "seed"}
    return json.dumps(kept, sort_keys=True, default=str)


# ---- what it would cost


@dataclass(frozen=True)
class StepCost:
    """What one optimizer step takes on the mean.

    Args:
        tokens: that are not padding.
        flops: the model's, forward and backward, exact.
    """

    tokens: float
    flops: float


def step_costs(runs: Sequence[Planned]) -> dict[str, StepCost]:
    """What a step of each run takes, from a few of its batches; what is alike is looked at once."""
    from toolmem.class_path import construct
    from toolmem.cli.inspect_recipe import build, init_args_of
    from toolmem.models.model_flops import ModelFlops
    from toolmem.recipe_files import get_key
    from toolmem.training.callbacks.flops import step_flops

    models = model_keys(runs)
    batches: dict[str, list[Any]] = {}
    counters: dict[str, ModelFlops] = {}  # one of them learns from batch to batch
    costs: dict[tuple[str, str], StepCost] = {}
    found = {}
    for run in runs:
        model, shape = models[run.name], data_key(run.recipe)
        if (model, shape) not in costs:
            data = run.recipe["data"]
            if shape not in batches:
                module = construct(data["class_path"], init_args_of(data), {}, "data")
                module.prepare_data()
                module.setup("fit")
                batches[shape] = list(islice(iter(module.train_dataloader()), BATCHES))
            if model not in counters:
                counters[model] = ModelFlops(build(run.recipe, "its recipe"))
            tokens = sum(batch.n_tokens for batch in batches[shape]) / len(batches[shape])
            # one batch is counted, which takes a while, and the others go by their tokens
            first = batches[shape][0]
            counted = step_flops(counters[model], first)[0] / first.n_tokens
            costs[model, shape] = StepCost(tokens, tokens * counted)
        times = get_key(run.recipe, "trainer.accumulate_grad_batches", 1)
        cost = costs[model, shape]
        found[run.name] = StepCost(times * cost.tokens, times * cost.flops)
    return found


def steps_of(recipe: Mapping[str, Any]) -> int | None:
    """Steps that a recipe trains: ``trainer.max_steps``, or those of its ``exposures``; None for neither."""
    from toolmem.cli.inspect_recipe import make_data
    from toolmem.data.exposures import steps_of_exposures
    from toolmem.recipe_files import get_key

    exposures = recipe.get("exposures")
    if exposures is None:
        steps = get_key(recipe, "trainer.max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None
    return steps_of_exposures(make_data(recipe["data"]), exposures)


def timed_step(run: Planned, tokens: float, threads: int) -> float:
    """Seconds of a step of training, by ``toolmem fit`` itself, in a folder that is thrown away.

    Args:
        run: whose step.
        tokens: of a step.
        threads: that a worker has.
    """
    import torch

    from toolmem.cli.fit import run as fit
    from toolmem.cli.sweep_worker import fit_config
    from toolmem.sweeps.outcome import Logged

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            job = {"name": "timed", "recipe": run.recipe, "runs": folder, "until": TIMED_STEPS}
            config = fit_config(job)
            config["recall"] = {"every_n_steps": 0}
            config.pop("exposures", None)
            config["checkpointing"] = {"monitor": None, "every_n_steps": 10**9}
            config["trainer"] |= {
                "max_steps": max(steps_of(run.recipe) or 0, TIMED_STEPS),
                "log_every_n_steps": TIMED_STEPS,
                "limit_val_batches": 0,
            }
            fit("fit", config)
            rate = Logged(Path(folder) / "timed" / "metrics.csv").value(
                "throughput/tokens_per_s", "last"
            )
    finally:
        torch.set_num_threads(before)
    if not rate:
        raise ToolmemError(f"{run.name}: no speed was logged in {TIMED_STEPS} steps")
    return tokens / rate


def seconds_by_flops(runs: Sequence[Planned], costs: Mapping[str, StepCost], threads: int) -> Any:
    """Seconds of a step as a straight line over its FLOPs, through the cheapest run and the dearest of
    those whose step takes a moment.
    """

    def flops_of(run: Planned) -> float:
        return costs[run.name].flops

    cheapest = min(runs, key=flops_of)
    quick = [run for run in runs if flops_of(run) <= TIMED_FLOPS]
    dearest = max(quick, key=flops_of, default=cheapest)
    low, high = costs[cheapest.name], costs[dearest.name]
    first = timed_step(cheapest, low.tokens, threads)
    if high.flops <= low.flops:
        return lambda flops: first * max(1.0, flops / low.flops)
    last = timed_step(dearest, high.tokens, threads)
    slope = (last - first) / (high.flops - low.flops)
    return lambda flops: max(first + slope * (flops - low.flops), min(first, last))


@dataclass
class Totals:
    """What runs take together: their number, tokens, FLOPs and seconds of one worker."""

    runs: float = 0.0
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def add(self, times: float, steps: int, cost: StepCost, seconds: float) -> None:
        """Add a run, so many times."""
        self.runs += times
        self.tokens += times * steps * cost.tokens
        self.flops += times * steps * cost.flops
        self.seconds += times * steps * seconds


def show_plan(sweep: SweepRecipe, plan: Plan, folder: SweepFolder, workers: int) -> None:
    """Print what the sweep would train, and what it would cost on this machine.

    Args:
        sweep: the recipe.
        plan: of it.
        folder: where results may be.
        workers: processes.
    """
    from toolmem.sweeps.grid import expand
    from toolmem.sweeps.workers import share_cores

    runs = expand(sweep, sweep.seeds[:1])
    sizes = model_sizes(runs)
    rows = {row["name"]: row for row in [*folder.results.rows(), *folder.left_results()]}
    done = len(plan.mine(rows))
    counts = list(run_counts(sweep, plan, runs))
    expected, most = Totals(), Totals()
    steps = {run.name: steps_of(run.recipe) for run in runs}
    if known := all(steps.values()):
        costs = step_costs(runs)
        threads = len(share_cores(workers)[0])
        seconds_of = seconds_by_flops(runs, costs, threads)
        for run, share, at_most in counts:
            n, cost = steps[run.name] or 0, costs[run.name]
            seconds = seconds_of(cost.flops)
            expected.add(share, n, cost, seconds)
            most.add(at_most, n, cost, seconds)
    if not known or sweep.search is None:
        expected.runs = most.runs = len(runs) * len(sweep.seeds)
    if sweep.search is not None:
        expected.runs = sum(share for _, share, _ in counts)
        most.runs = sum(at_most for _, _, at_most in counts)

    def both(name: str, form: str) -> str:
        values = [format(getattr(totals, name), form) for totals in (expected, most)]
        return values[0] if sweep.search is None else f"about {values[0]}, at most {values[1]}"

    in_all = sum(sizes[run.name] * at_most for run, _, at_most in counts)
    lines = [
        f"runs: {both('runs', ',.0f')}, of which {done:,} have a result",
        f"parameters: {min(sizes.values()):,} to {max(sizes.values()):,}"
        + (f", {in_all:,.0f} in all runs" if sweep.search is None else ""),
    ]
    if known:
        hours = [seconds / 3600 / workers for seconds in (expected.seconds, most.seconds)]
        least, dearest = (
            1000 * seconds_of(pick(cost.flops for cost in costs.values())) for pick in (min, max)
        )
        lines += [
            f"tokens: {both('tokens', ',.0f')}",
            f"FLOPs: {both('flops', '.2e')}",
            f"hours on this machine: about {hours[0]:.2g}"
            + (f", at most {hours[1]:.2g}" if sweep.search or sweep.halving else "")
            + f", with {workers} workers of {threads} threads ({least:.1f} to {dearest:.1f} ms a step, "
            f"measured; evaluation and what ends early are not counted)",
        ]
    else:
        lines += [
            "tokens, FLOPs, hours: unknown where neither trainer.max_steps nor exposures is given"
        ]
    for line in lines:
        stdout().print(line, highlight=False, soft_wrap=True)


def run_counts(
    sweep: SweepRecipe, plan: Plan, runs: Sequence[Planned]
) -> Iterable[tuple[Planned, float, float]]:
    """How often each run of the first seed is trained over all seeds: expected, and at most.

    What halving ends early counts by the share of its steps.
    """
    from toolmem.sweeps.halving import HalvingPlan
    from toolmem.sweeps.recipe import MEMBER
    from toolmem.sweeps.search import SearchPlan

    n_seeds = len(sweep.seeds)
    if isinstance(plan, SearchPlan):
        shares = plan.share_of_members()
        labels = {label: index for index, label in enumerate(plan.members)}
        largest = max(labels.values())
        each = len(plan.search.reach)
        for run in runs:
            member = labels[run.settings[MEMBER]]
            share = min(float(n_seeds), each * shares[member])
            yield run, share, float(plan.most_runs()) if member == largest else 0.0
    elif isinstance(plan, HalvingPlan):
        for run in runs:
            share = n_seeds * plan.share_of_steps(run)
            yield run, share, share
    else:
        for run in runs:
            yield run, float(n_seeds), float(n_seeds)
