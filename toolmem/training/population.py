"""A population: many small models of one shape, trained side by side as one run.

Unusual about it:

- Every member is the model that ``toolmem fit`` would have trained alone: same first weights, same
  batches, its own loss over its own tokens, its own rates, clipping and schedule. Only rounding differs.
- The weights are stacks, a row a member (``stacked.py``), and one optimizer steps all of them
  (``stacked_optimizer.py``). What a step costs whatever the model's size is paid once for all members.
- ``model`` is an empty frame: a member's weights are put into it to be validated, asked or exported.
- A member that is done takes part in nothing any more, and its numbers stay as they are, bit for bit.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from toolmem import checkpoints
from toolmem.data.batch import Batch
from toolmem.data.modules.population import PopulationBatch, PopulationDataModule
from toolmem.errors import ToolmemError
from toolmem.models.context import Extras
from toolmem.training import compatibility
from toolmem.training.callbacks.recall import RecallProbe
from toolmem.training.loggers import CSVLogger
from toolmem.training.members import (
    Member,
    MemberModule,
    MemberRecall,
    MemberTrainer,
    changed,
    first_weights,
    refuse_model,
    single_checkpoint,
)
from toolmem.training.module import LanguageModelModule
from toolmem.training.stacked import Stack, groups_of, joint_gradients, why_not_joint
from toolmem.training.stacked_optimizer import (
    StackedOptimizer,
    StackedSchedule,
    clip_by_member,
    stacked_groups,
)

FOLDER = "members"  # in the run's folder: a run's folder for each member
# On a CPU a member runs with others where its batch, padded tokens times the width squared, is no more
# work than this: beyond, a pass is busy enough by itself. What was measured: benchmarks/population.py.
CPU_WORK = 400_000
CPU_LEAST, CPU_AT_ONCE = 4, 16  # fewer do not pay for what vmap costs; more were not tried


class PopulationModule(LanguageModelModule):
    """Trains a population of language models on a ``PopulationDataModule``.

    Logs ``train/loss``, ``val/loss`` and the like over all members, ``population/active``, and in a
    folder of each member's own, ``members/N``, what its run alone would have logged. A member that is
    done is written there as an ordinary checkpoint.

    Args:
        members: one entry a member, as many as ``data.init_args.members`` has.
        at_once: members that are run together at most; 1 runs them one after another. None is by device:
            on a CPU as many as a pass is worth it for, else all.
    """

    def __init__(
        self, *args: Any, members: list[Member], at_once: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if not members:
            raise ToolmemError("model.members is empty: give one entry a member, {} or more")
        if at_once is not None and at_once < 1:
            raise ToolmemError(f"model.at_once is {at_once}: it must be 1 or more")
        refuse_model(self.model)
        if self.lora is not None or self.layer_lr_decay != 1 or self.model.embedding._forward_hooks:
            raise ToolmemError(
                "model.lora, model.layer_lr_decay and model.neftune_alpha are not for populations: leave "
                "them out, or train one model"
            )
        self.members = members
        self.at_once = at_once
        self.optimizers_of = [
            changed(self.optimizer_config, member.optimizer, f"model.members[{number}].optimizer")
            for number, member in enumerate(members)
        ]
        self.schedules_of = [
            changed(self.schedule, member.schedule, f"model.members[{number}].schedule")
            for number, member in enumerate(members)
        ]
        for number, member in enumerate(members):
            if member.seed < 0 or (member.max_steps is not None and member.max_steps < 1):
                raise ToolmemError(
                    f"model.members[{number}]: seed is {member.seed}, max_steps {member.max_steps}: "
                    "they must be 0 or more, and 1 or more"
                )
        self.stack = Stack([first_weights(self.model, member.seed) for member in members])
        self._frame = dict(self.model.named_parameters())
        self.done_at: dict[int, int] = {}  # member -> steps that it took, of those that are done
        self.losses = torch.zeros(len(members), dtype=torch.float64)  # since the last report
        self.counts = torch.zeros(len(members), dtype=torch.int64)
        self.tokens = torch.zeros(len(members), dtype=torch.int64)  # not padding, since the start
        self.evaluated: dict[int, Tensor] = {}
        self._bearing = torch.zeros(len(members), dtype=torch.int64)  # in the gradients so far
        self._gradients: dict[str, Tensor] = {}
        self._logs: list[CSVLogger] = []
        self._probes: list[MemberRecall] = []
        self._probe_states: list[Any] = []
        self._found: list[Mapping[str, float]] = []  # in a round of asking
        self._joint = True

    @property
    def active(self) -> list[int]:
        """Numbers of the members that are not done."""
        return [member for member in range(len(self.members)) if member not in self.done_at]

    @property
    def active_share(self) -> float:
        """How many of all members they are."""
        return len(self.active) / len(self.members)

    @property
    def datamodule(self) -> PopulationDataModule:
        """The members' data."""
        return cast(PopulationDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]

    def folder(self, member: int) -> Path:
        """A member's own run folder."""
        return Path(self.trainer.default_root_dir) / FOLDER / str(member)

    # ---- setting up

    def setup(self, stage: str) -> None:
        """Refuse what cannot be trained so.

        Raises:
            ToolmemError: for other data, another number of members, more devices than one, a precision
                or a callback that is for one model.
        """
        super().setup(stage)
        data, trainer = getattr(self.trainer, "datamodule", None), self.trainer
        if not isinstance(data, PopulationDataModule):
            raise ToolmemError(
                "a population wants data for each member: use data.class_path "
                "toolmem.data.PopulationDataModule"
            )
        if len(data.members) != len(self.members):
            raise ToolmemError(
                f"model.members has {len(self.members)} entries, data.init_args.members "
                f"{len(data.members)}: give one entry a member in both"
            )
        if trainer.world_size > 1:
            raise ToolmemError(
                "a population trains on one device: set trainer.devices: 1, and share members among runs"
            )
        if str(trainer.precision).startswith("16"):
            raise ToolmemError(
                "trainer.precision is float16, whose loss scale members cannot share: use bf16 or 32"
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            name = type(callback).__name__
            probing = name == "NormProbe" and getattr(callback, "every_n_steps", False)
            if probing or isinstance(callback, WeightAveraging):
                raise ToolmemError(f"{name} looks at one model, not at a population: leave it out")

    def on_fit_start(self) -> None:
        """Start every member from another run's weights, where one is named; see what runs together.

        Raises:
            ToolmemError: when ``at_once`` asks for what this architecture cannot do.
        """
        if self.init_from is not None and not self._resumed:
            super().on_fit_start()
            for member in range(len(self.members)):
                self.stack.take(member, self._frame)
        reason = None
        if len(self.members) > 1 and self.at_once != 1:
            reason = why_not_joint(self.model, self.stack, self.device)
        if reason is not None and self.at_once is not None:
            raise ToolmemError(
                f"model.at_once is {self.at_once}, but members of {type(self.model).__name__} cannot run "
                f"together ({reason}): set it to 1, or leave it out"
            )
        self._joint = reason is None
        self._logs = []
        if any(isinstance(logger, CSVLogger) for logger in self.trainer.loggers):
            for member, data in enumerate(self.datamodule.members):
                folder = self.folder(member)
                folder.mkdir(parents=True, exist_ok=True)
                self._logs.append(CSVLogger(folder))
                if hasattr(data, "write_factbase"):
                    data.write_factbase(folder / "facts.duckdb")

    def configure_optimizers(self) -> Any:
        """Lightning's hook: one optimizer of all members, its rates set by each one's schedule."""
        total = self.trainer.max_steps
        of_run = total if total and total > 0 else None
        factors = [
            schedule.factors(member.max_steps or of_run)
            for schedule, member in zip(self.schedules_of, self.members, strict=True)
        ]
        groups, dtype = stacked_groups(self.optimizers_of, self.model, self.stack.named())
        optimizer = StackedOptimizer(groups, dtype)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": StackedSchedule(optimizer, factors), "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Put gradients back, and members that are done aside."""
        super().on_train_start()
        for member, log in enumerate(self._logs):
            log.rewind(self.done_at.get(member, self.trainer.global_step))
        for name, parameter in self.stack.named().items():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter)
        self._gradients = {}
        self._start_probes()
        self._set_aside()

    def _start_probes(self) -> None:
        """Ask each member what the run's recall probe would ask a model."""
        found = [c for c in self.trainer.callbacks if isinstance(c, RecallProbe)]  # type: ignore[attr-defined]
        self._probes = []
        for probe in found[:1]:
            for number, data in enumerate(self.datamodule.members):
                self.folder(number).mkdir(parents=True, exist_ok=True)
                trainer = MemberTrainer(
                    self.trainer,
                    data,
                    self.folder(number),
                    self.members[number].max_steps or self.trainer.max_steps,
                )
                report = functools.partial(self._note_recall, number)
                module = MemberModule(
                    report, self.model, self.optimizers_of[number], self.schedules_of[number]
                )
                self._probes.append(MemberRecall(probe, trainer, module))
                self._probes[-1].probe.show = probe.show and number == 0
        for asking, state in zip(self._probes, self._probe_states, strict=False):
            asking.probe.load_state_dict(state)
        self._found = []
        for number in self.active if self._probes else []:
            self.stack.give(number, self._frame)
            self._probes[number].start()
        self._report_found()

    def _ask(self) -> None:
        """Ask the members that are due; those whose probe would end their run are done."""
        self._found = []
        for number in self.active if self._probes else []:
            self.stack.give(number, self._frame)
            if self._probes[number].ask():
                self.finish(number)
        self._report_found()

    def _report_found(self) -> None:
        if self._found:  # the mean over the members that were asked
            names = set.intersection(*map(set, self._found))
            means = {
                name: statistics.fmean(found[name] for found in self._found)
                for name in self._found[0]
                if name in names
            }
            self.report(means)

    def _note_recall(self, member: int, metrics: Mapping[str, float]) -> None:
        self.report_member(member, metrics)
        self._found.append(metrics)

    def teardown(self, stage: str) -> None:
        """Close the members' tools."""
        for probe in self._probes:
            probe.close()

    # ---- training

    def training_step(self, batch: PopulationBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        """The active members' summed losses; their gradients are kept for ``backward``."""
        batches = {m: one for m, one in batch.members.items() if m not in self.done_at}
        self._gradients = {}
        loss = torch.zeros((), device=self.device)
        for group in self._groups(batches):
            if len(group) == 1:
                sums, gradients = self._alone(group[0], batches[group[0]])
            else:
                sums, gradients = joint_gradients(
                    self.model, self.stack, group, [batches[m] for m in group], self.z_loss
                )
            self._gather(group, gradients)
            self.losses[group] += sums.double().cpu()
            loss = loss + sums.sum()
        total = 0
        for member, one in batches.items():
            n = one.positions().numel()
            self.counts[member] += n
            self._bearing[member] += n
            self.tokens[member] += one.n_tokens
            total += n
            self.datamodule.members[member].consumed(one.state)
        self.train_tokens.update(sum(one.n_tokens for one in batches.values()))
        self._pending += total
        return loss * self.trainer.accumulate_grad_batches

    def _groups(self, batches: Mapping[int, Batch]) -> Iterator[list[int]]:
        """The members that run together."""
        if not self._joint:
            return groups_of(batches, 1)
        if self.at_once is not None or self.device.type != "cpu":
            return groups_of(batches, self.at_once or max(len(batches), 1))
        square = self.model.dim**2
        return groups_of(
            batches, CPU_AT_ONCE, CPU_LEAST, lambda rows, seq: rows * seq * square <= CPU_WORK
        )

    def _alone(self, member: int, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One member's loss and gradients, shapes as of a group of one, by the model itself."""
        self.stack.give(member, self._frame)
        extras = Extras()
        loss, count = self.loss_sum(batch, self._hidden, extras)
        if extras.losses or extras.metrics:
            self.train_extras.update({**extras.losses, **extras.metrics}, count)
        total = loss + count * sum(extras.losses.values())
        trained = {name: p for name, p in self._frame.items() if p.requires_grad}
        found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        gradients = {n: g[None] for n, g in zip(trained, found, strict=True) if g is not None}
        return loss.detach()[None], gradients

    def _gather(self, group: Sequence[int], gradients: Mapping[str, Tensor]) -> None:
        """Put a group's gradients in the rows of its members."""
        stacked = self.stack.named()
        for name, gradient in gradients.items():
            if gradient.shape == stacked[name].shape and list(group) == sorted(group):
                self._gradients[name] = gradient
                continue
            if name not in self._gradients:
                self._gradients[name] = torch.zeros_like(stacked[name])
            self._gradients[name][list(group)] = gradient.to(stacked[name].dtype)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the gradients are known, and are added to those gathered so far."""
        for name, parameter in self.stack.named().items():
            gradient = self._gradients.get(name)
            if gradient is not None:
                parameter.grad = (
                    gradient if parameter.grad is None else parameter.grad.add_(gradient)
                )
        self._gradients = {}

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn each member's summed gradients into the mean over its loss-bearing tokens."""
        means = 1 / self._bearing.clamp(min=1).double()
        for gradient in self._all_gradients():
            gradient.mul_(means.to(gradient).view(-1, *[1] * (gradient.ndim - 1)))
        self._bearing.zero_()
        self._pending = 0

    def _all_gradients(self) -> list[Tensor]:
        return [p.grad for p in self.stack.parameters() if p.grad is not None]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's hook: clip each member's gradients by their own norm."""
        if gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            clip_by_member(self._all_gradients(), float(gradient_clip_val))
        else:
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Log the step, move the schedules on, and let members end whose steps are taken."""
        super().lr_scheduler_step(scheduler, metric)
        # before callbacks, one of which may write a checkpoint: it must know who is done
        self._ask()
        for member in self.active:
            if self.trainer.global_step == self.members[member].max_steps:
                self.finish(member)

    def finish(self, member: int) -> None:
        """Let a member be done: it is written as a checkpoint of its own, and costs nothing any more.

        Training ends when all are.

        Args:
            member: its number.
        """
        if member in self.done_at:
            return
        self.done_at[member] = self.trainer.global_step
        self._set_aside()
        self._export(member)

    def _set_aside(self) -> None:
        for member in self.done_at:
            self.datamodule.finish(member)
        for optimizer in self.trainer.optimizers:
            assert isinstance(optimizer, StackedOptimizer)
            optimizer.active = self.active if self.done_at else None
        if not self.active:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Write the members that went on to the end."""
        for member in self.active:
            self._export(member)

    # ---- logs

    def _report_training(self, scheduler: LRScheduler) -> None:
        rates = cast(list[Any], scheduler.get_last_lr())[0]
        for member in self.active:
            metrics = {
                "train/loss": float(self.losses[member] / self.counts[member]),
                "train/tokens": int(self.tokens[member]),
                "train/learning_rate": rates[member],
            }
            self.report_member(member, metrics)
        metrics = {
            "train/loss": float(self.losses.sum() / self.counts.sum()),
            "train/tokens": int(self.train_tokens.compute().item()),
            "population/active": len(self.active),
        }
        self.losses.zero_()
        self.counts.zero_()
        self.report(metrics | self.train_extras.take())

    def report_member(self, member: int, metrics: Mapping[str, float]) -> None:
        """Write metrics into a member's own ``metrics.csv``, where the run keeps one.

        Args:
            member: its number.
            metrics: by name, ``group/name``.
        """
        if self._logs and self.trainer.is_global_zero:
            self._logs[member].log_metrics(dict(metrics), self.trainer.global_step)

    # ---- evaluation

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add up a member's loss, and its right answers where its data asks for them."""
        self.stack.give(dataloader_idx, self._frame)
        logits, targets = self.logits_and_targets(batch, self.model.hidden)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        asked = getattr(self.datamodule.members[dataloader_idx], "wants_accuracy", False)
        right = (
            (logits.argmax(-1) == targets).sum() if asked else -torch.ones((), device=self.device)
        )
        self.eval_loss.update(loss, targets.numel())
        if asked:
            self.eval_accuracy.update(right, targets.numel())
        sums = torch.tensor([float(loss), targets.numel(), float(right)], dtype=torch.float64)
        self.evaluated[dataloader_idx] = self.evaluated.get(dataloader_idx, 0) + sums

    test_step = validation_step

    def _finish_evaluation(self, group: str) -> None:
        fitting = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking
        for member, (loss, count, right) in self.evaluated.items():
            metrics = {f"{group}/loss": float(loss / count)}
            if right >= 0:
                metrics[f"{group}/accuracy"] = float(right / count)
            if fitting and member not in self.done_at:
                self.report_member(member, metrics)
        self.evaluated = {}
        super()._finish_evaluation(group)

    def predict_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Each row's summed loss in nats (``loss``), and its loss-bearing tokens (``count``)."""
        self.stack.give(dataloader_idx, self._frame)
        return super().predict_step(batch, batch_idx)

    # ---- checkpoints

    def _export(self, member: int) -> None:
        if self.trainer.fast_dev_run or not self.trainer.is_global_zero:  # type: ignore[attr-defined]
            return
        self.stack.give(member, self._frame)
        about = checkpoints.describe(
            self.model,
            self.datamodule.members[member].checkpoint_info(),  # type: ignore[attr-defined]
        ) | self._training_of(member)
        step = self.done_at.get(member, self.trainer.global_step)
        path = self.folder(member) / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Thousands of these are written, and the run's own checkpoint holds them all until its end.
        checkpoints.write(single_checkpoint(self.model, about, step), path, durable=False)

    def _training_of(self, member: int) -> dict[str, Any]:
        return {
            "optimizer": compatibility.describe(self.optimizers_of[member]),
            "schedule": compatibility.describe(self.schedules_of[member]),
        }

    def _about_population(self) -> list[dict[str, Any]]:
        """Each member as plain data."""
        return [
            {"seed": member.seed, "max_steps": member.max_steps, **self._training_of(number)}
            for number, member in enumerate(self.members)
        ]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds each member alone, and what training must know to go on exactly."""
        super().on_save_checkpoint(checkpoint)
        frame = checkpoints.WEIGHTS_PREFIX  # holds the weights of whoever was looked at last
        for name in [name for name in checkpoint["state_dict"] if name.startswith(frame)]:
            del checkpoint["state_dict"][name]
        checkpoint[checkpoints.KEY]["population"] = {
            "members": self._about_population(),
            "done_at": dict(self.done_at),
            "losses": self.losses.tolist(),
            "counts": self.counts.tolist(),
            "tokens": self.tokens.tolist(),
            "bearing": self._bearing.tolist(),
            "recall": [asking.probe.state_dict() for asking in self._probes],
        }
        if self._pending:
            checkpoint["pending_gradients"] = {
                name: parameter.grad.detach().clone()
                for name, parameter in self.stack.named().items()
                if parameter.grad is not None
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else; take up what ``on_save_checkpoint`` left.

        Raises:
            ToolmemError: for one that is not of a population, or of another.
        """
        path = self.trainer.ckpt_path or "the checkpoint"
        about = checkpoint.get(checkpoints.KEY, {})
        population = about.pop("population", None)
        if about and population is None:
            raise ToolmemError(
                f"{path} is of one model, not of a population: give the run another --name, and "
                "model.init_from the run to begin with"
            )
        super().on_load_checkpoint(checkpoint)
        about["population"] = population
        frame = self.model.state_dict()
        checkpoint["state_dict"].update(
            {checkpoints.WEIGHTS_PREFIX + name: value for name, value in frame.items()}
        )
        self._gradients, self._restored_gradients = self._restored_gradients, {}
        saved, mine = population["members"], self._about_population()
        if len(saved) != len(mine):
            raise ToolmemError(
                f"{path} is of {len(saved)} members, model.members has {len(mine)}: set it as it was, or "
                "start a new run"
            )
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        for number, (theirs, ours) in enumerate(zip(saved, mine, strict=True)):
            for difference in compatibility.differences(
                compatibility.plain(theirs), compatibility.plain(ours)
            ):
                raise ToolmemError(
                    f"model.members[{number}]: {path} has {compatibility.named(difference)}: set it as "
                    "it was, or start a new run"
                )
        self.done_at = {int(member): int(step) for member, step in population["done_at"].items()}
        self.losses = torch.tensor(population["losses"], dtype=torch.float64)
        self.counts = torch.tensor(population["counts"], dtype=torch.int64)
        self.tokens = torch.tensor(population["tokens"], dtype=torch.int64)
        self._bearing = torch.tensor(population["bearing"], dtype=torch.int64)
        self._probe_states = population["recall"]
