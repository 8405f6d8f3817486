"""The members of a population: how each differs, what it begins with, and how it is written and asked as
a run of its own.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from toolmem import checkpoints
from toolmem.class_path import construct
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.training.callbacks.recall import RecallProbe
from toolmem.training.module import LanguageModelModule
from toolmem.training.optimizers import OptimizerConfig
from toolmem.training.schedules import Schedule
from toolmem.training.stacked import Stack


@dataclass(frozen=True)
class Member:
    """How a member's training differs from the recipe's.

    Args:
        seed: of its first weights: ``seed_everything`` of the run that would train it alone.
        optimizer: options of ``model.optimizer`` that are otherwise.
        schedule: options of ``model.schedule`` that are otherwise, or another schedule by ``class_path``
            and ``init_args``.
        max_steps: optimizer steps after which it is done; ``trainer.max_steps`` when None.
    """

    seed: int = 0
    optimizer: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    max_steps: int | None = None


def single_checkpoint(model: nn.Module, about: Mapping[str, Any], step: int) -> dict[str, Any]:
    """A checkpoint of weights alone, as ``checkpoints.load`` reads it.

    Args:
        model: its weights.
        about: what the checkpoint says of itself.
        step: optimizer steps taken.
    """
    weights = {
        checkpoints.WEIGHTS_PREFIX + name: value.detach().clone()
        for name, value in model.state_dict().items()
    }
    return {
        "state_dict": weights,
        "global_step": step,
        "epoch": 0,
        "pytorch-lightning_version": pl.__version__,
        checkpoints.KEY: dict(about),
    }


def export_member(path: str | Path, member: int, target: str | Path) -> None:
    """Write a member of a population's checkpoint as a checkpoint of its own.

    Args:
        path: the population's checkpoint, or its run folder.
        member: its number, from 0.
        target: the file to write.

    Raises:
        ToolmemError: when the checkpoint is not of a population, or has no such member.
    """
    file = checkpoints.resolve(path)
    checkpoint = checkpoints.read(file)
    about = dict(checkpoint.get(checkpoints.KEY, {}))
    population = about.pop("population", None)
    if population is None:
        raise ToolmemError(f"{file} is not a population's checkpoint")
    if not 0 <= member < len(population["members"]):
        raise ToolmemError(
            f"{file} has {len(population['members'])} members, none of number {member}"
        )
    model = checkpoints.build_model(about["model"], file)
    stack = Stack([model])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint["state_dict"]["stack." + stack.key(name)][member])
    of_member = population["members"][member]
    own = checkpoints.describe(model, about["data"]["members"][member])
    own |= {key: of_member[key] for key in ("optimizer", "schedule")}
    step = population["done_at"].get(member, checkpoint.get("global_step", 0))
    checkpoints.write(single_checkpoint(model, own, step), target)


def first_weights(model: LanguageModel, seed: int) -> LanguageModel:
    """A model of the same class and arguments, with the weights that a run of this seed begins with."""
    dtype, device = model.embedding.weight.dtype, model.embedding.weight.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = type(model)(**model.init_args)
    return made.to(device=device, dtype=dtype)


def refuse_model(model: LanguageModel) -> None:
    """Refuse a model whose members would not be what they are alone.

    Raises:
        ToolmemError: naming what stands in the way.
    """
    if model.init_args.get("dropout"):
        raise ToolmemError(
            "model.model.init_args.dropout: members share one stream of random numbers, so they would not "
            "be what they are alone; set it to 0"
        )
    for module in model.modules():
        if module is model:
            continue
        changes = hasattr(module, "after_optimizer_step") and getattr(
            module, "bias_update_rate", True
        )
        if changes:
            raise ToolmemError(
                f"model.model: {type(module).__name__} changes numbers after a step that are no parameters, "
                "which members cannot share (for experts, bias_update_rate: 0 does without): train it alone"
            )


def changed(config: Any, changes: Mapping[str, Any], key: str) -> Any:
    """A configuration with some of its options otherwise.

    Raises:
        ToolmemError: for an option that it does not have.
    """
    if "class_path" in changes:
        kind = Schedule if isinstance(config, Schedule) else OptimizerConfig
        return construct(str(changes["class_path"]), changes.get("init_args") or {}, {}, key, kind)
    known = [f.name for f in dataclasses.fields(config)]
    unknown = [name for name in changes if name not in known]
    if unknown:
        raise ToolmemError(
            f"{key}.{unknown[0]}: {type(config).__name__} has no such option; it has {', '.join(known)}"
        )
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in changes.items()}
    return dataclasses.replace(config, **plain)


class MemberTrainer:
    """What a callback sees of the trainer when it looks at one member.

    Args:
        trainer: the population's.
        datamodule: the member's.
        folder: the member's run folder.
        max_steps: the member's.
    """

    def __init__(self, trainer: pl.Trainer, datamodule: Any, folder: Path, max_steps: int) -> None:
        self._trainer = trainer
        self.datamodule = datamodule
        self.default_root_dir = str(folder)
        self.max_steps = max_steps
        self.should_stop = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._trainer, name)


class MemberModule(LanguageModelModule):
    """What a callback sees of the population when it looks at one member.

    Args:
        report: takes the metrics that are logged.
        model: with the member's weights in it.
        optimizer: the member's.
        schedule: the member's.
    """

    def __init__(
        self,
        report: Callable[[Mapping[str, float]], None],
        model: LanguageModel,
        optimizer: OptimizerConfig,
        schedule: Schedule,
    ) -> None:
        super().__init__(model, optimizer, schedule, attention_kernel=model.attention_kernel)
        self._report = report

    def report(self, metrics: Mapping[str, float]) -> None:
        """Hand metrics on."""
        self._report(metrics)


class MemberRecall:
    """The run's recall probe, asking one member.

    Args:
        probe: the run's, whose options it has.
        trainer: the member's view of the trainer.
        module: the member's view of the population.
    """

    def __init__(self, probe: RecallProbe, trainer: MemberTrainer, module: MemberModule) -> None:
        self.probe = copy.copy(probe)
        self.probe.rounds = copy.copy(probe.rounds)
        self.probe.load_state_dict(RecallProbe().state_dict())
        self.trainer: Any = trainer
        self.module = module

    def start(self) -> None:
        """Draw the questions and open the tools; ask before the first step, if it is wanted."""
        self.probe.on_train_start(self.trainer, self.module)
        self.probe.on_train_batch_start(self.trainer, self.module, None, 0)

    def ask(self) -> bool:
        """Ask, if it is time; is the member to end?"""
        self.probe.on_train_batch_end(self.trainer, self.module, None, None, 0)
        return self.trainer.should_stop

    def close(self) -> None:
        """Close the tools."""
        self.probe.teardown(self.trainer, self.module, "fit")
