"""The one LightningModule that trains every language model.

Unusual about it:

- The loss is averaged over the *global* number of loss-bearing tokens of an optimizer step, over
  micro-batches and ranks: ``training_step`` returns a sum, and gradients are divided once, before
  clipping. A mean of means would weigh tokens of short batches more.
- The head and the cross-entropy are computed only where a token bears loss.
- Nothing is logged but every ``trainer.log_every_n_steps``, and then by ``report``, not by
  Lightning's ``self.log``, whose bookkeeping costs a tiny model a noticeable part of each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from toolmem import checkpoints
from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.context import Extras
from toolmem.models.fused_training import FusedChoice
from toolmem.models.kernel_choice import KernelChoice
from toolmem.models.lora import LoRA
from toolmem.models.recompute import ActivationCheckpointing
from toolmem.training import accumulation, compatibility, finetuning
from toolmem.training.body import Compilations, CompileChoice, training_body
from toolmem.training.initial_weights import load_initial_weights
from toolmem.training.metrics import (
    NamedMeans,
    TokenCount,
    TokenMean,
    restore_state,
    saved_state,
)
from toolmem.training.mixed_precision import MixedPrecision
from toolmem.training.optimizer_names import by_name, by_number, parameter_names
from toolmem.training.optimizers import OptimizerConfig
from toolmem.training.random_state import own_random_state, random_states, restore_random_state
from toolmem.training.schedules import Schedule
from toolmem.training.sharded_checkpoints import take_over
from toolmem.training.token_loss import TokenLoss

if TYPE_CHECKING:
    from toolmem.training.parallel.ranks import Ranks

# Gradients are kept as sums of token losses times this until they are divided. A power of two costs
# no precision, and keeps float16's gradients in range from the first steps on.
SUM_SCALE = 2.0**-10


class LanguageModelModule(TokenLoss, pl.LightningModule):
    """Trains a language model on batches of tokens.

    Args:
        model: the model.
        optimizer: what trains it (``toolmem.training.Muon``, ``AdamW``).
        schedule: of its learning rate (``toolmem.training.Cosine``, ``WSD``, ...).
        compile: compile the model's body for training, once for all lengths: all of it (``true``), or
            each block by itself (``blocks``), which takes the time of one for any number of layers. Takes
            some tens of seconds at the first step, so it pays in long runs only; ``compile/graphs`` is
            logged.
        fused: run the blocks of a small plain Transformer on a CPU by one call of C each way, which is
            much faster and equal to rounding: where it can and pays (``auto``), or refuse what cannot
            (``true``).
        z_loss: weight of the squared log of the softmax's denominator at each loss-bearing token
            (PaLM's 1e-4, arXiv 2204.02311), which keeps logits from drifting; 0 for none.
        attention_kernel: what runs attention: ``sdpa`` (torch's own), ``flex`` (FlexAttention),
            ``flash`` (the package flash-attn, on CUDA), ``plain`` (the reference), or the one for the
            device and the length (``auto``).
        init_from: a run's folder, or a checkpoint, whose weights training starts from; None for first
            weights. A run that goes on (``--resume``) has weights of its own.
        activation_checkpointing: which blocks keep little for the backward pass and compute it again;
            None for none.
        sequence_parallel: under tensor parallelism (``trainer.strategy: ModelParallelStrategy``) split the
            stream between layers over tokens too (arXiv 2205.05198), which saves memory.
        lora: adapters, which alone are trained; None for none. Checkpoints keep them apart, and whatever
            loads one merges them.
        freeze: regular expressions; a parameter that has one in its name is not trained.
        layer_lr_decay: each layer's learning rate is so much times that of the layer above it (arXiv
            1801.06146); 1 for one rate.
        neftune_alpha: size of the noise on embedded tokens in training (NEFTune, arXiv 2310.05914, has 5 to
            15); 0 for none.
        loss_chunk: how many tokens' logits are held at once; null chooses where they are many, 0 holds all.
        fsdp_param_dtype: under FSDP2 and mixed precision, what parameters are gathered in (its
            ``MixedPrecisionPolicy``), for half the communication; None gathers float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        optimizer: OptimizerConfig,
        schedule: Schedule,
        compile: CompileChoice = False,
        fused: FusedChoice = "auto",
        z_loss: float = 0.0,
        attention_kernel: KernelChoice = "auto",
        init_from: str | None = None,
        activation_checkpointing: ActivationCheckpointing | None = None,
        sequence_parallel: bool = False,
        fsdp_param_dtype: Literal["float16", "bfloat16"] | None = None,
        lora: LoRA | None = None,
        freeze: tuple[str, ...] = (),
        layer_lr_decay: float = 1.0,
        neftune_alpha: float = 0.0,
        loss_chunk: int | None = None,
    ) -> None:
        super().__init__()
        if z_loss < 0:
            raise ToolmemError(f"model.z_loss is {z_loss}: it must be 0 (off) or more")
        self.z_loss = z_loss
        self.init_from = init_from
        model.use_attention(attention_kernel)
        finetuning.prepare(model, lora, freeze, layer_lr_decay, neftune_alpha)
        self.model = model
        self.lora = lora
        self.layer_lr_decay = layer_lr_decay
        self.loss_chunk = loss_chunk
        if loss_chunk is not None and (reason := self._why_no_chunks(loss_chunk)) is not None:
            raise ToolmemError(f"model.loss_chunk is {loss_chunk}: {reason}")
        self.optimizer_config = optimizer
        self.schedule = schedule
        self.compile_model = compile
        self.fused = fused
        self.sequence_parallel = sequence_parallel
        self.fsdp_param_dtype = fsdp_param_dtype
        self.checkpointing = activation_checkpointing or ActivationCheckpointing()
        self._hidden = training_body(model, compile, fused, self.checkpointing)
        self._compilations = Compilations() if compile else None
        self.train_loss = TokenMean()
        self.train_tokens = TokenCount()
        self.train_extras = NamedMeans()
        self.eval_loss = TokenMean()
        self.eval_accuracy = TokenMean()
        self.reported: dict[str, tuple[int, float]] = {}
        self._pending = 0  # this rank's loss-bearing tokens in the gradients gathered so far
        self._restored_gradients: dict[str, Tensor] = {}
        self._restored_random: Mapping[str, Any] | None = None
        self._resumed = False
        self.ranks: Ranks | None = None  # set with the processes
        self.sharded = False  # parameters are DTensors
        self._class_path: str | None = None  # of the model, before FSDP gives it a class of its own

    def __setattr__(self, name: str, value: Any) -> None:
        """As of every module, but for Lightning's note of the hook that runs, written 50 times a step:
        a module's own way, which looks for parameters, takes a tiny model a tenth of a millisecond.
        """
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def setup(self, stage: str) -> None:
        """Checkpoints are our files, whoever asks for one."""
        take_over(self.trainer.strategy)

    def configure_model(self) -> None:
        """Lightning's hook, when processes have found each other: split the model over them where the
        strategy is ``ModelParallelStrategy``.

        Raises:
            ToolmemError: for what cannot be split, naming the key.
        """
        if self.trainer.world_size == 1 and self.device_mesh is None:
            return
        if self.device_mesh is not None and self.lora is not None:
            raise ToolmemError(
                "model.lora does not go with trainer.strategy: ModelParallelStrategy: use ddp (adapters are "
                "small, and frozen weights need no optimizer)"
            )
        from toolmem.training.parallel.setup import set_up

        self._class_path = self._class_path or checkpoints.class_path(self.model)
        self.ranks = set_up(self, self.trainer)
        if self.device_mesh is not None:
            self.sharded = True
            self._hidden = self.model.hidden
        for metric in (self.train_loss, self.train_tokens, self.eval_loss, self.eval_accuracy):
            metric.process_group = self.ranks.data_group
        self.train_extras.process_group = self.ranks.data_group

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The batch's summed loss, scaled so that Lightning's division by the number of
        micro-batches cancels out.
        """
        extras = Extras()
        if batch.dialogues is None:
            loss, count = self.loss_sum(batch, self._hidden, extras)
        else:
            loss, losses = self._summed_losses(batch, self._hidden, extras)
            count = losses.numel()
            of_each = batch.sums_by_document(losses, len(batch.dialogues))
            self.trainer.datamodule.learned(batch, of_each)  # type: ignore[attr-defined]
        self.train_loss.update(loss.detach(), count)
        if extras.losses or extras.metrics:
            self.train_extras.update({**extras.losses, **extras.metrics}, count)
            loss = loss + count * sum(extras.losses.values())
        self.train_tokens.update(batch.n_tokens)
        self._pending += count
        # Here and not in on_train_batch_end: callbacks come before that hook, and one of them may
        # write a checkpoint, which must know that this batch is used.
        consumed = getattr(self.trainer.datamodule, "consumed", None)  # type: ignore[attr-defined]
        if consumed is not None:
            consumed(batch.state)
        return loss * (self.trainer.accumulate_grad_batches * SUM_SCALE)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into the mean over all loss-bearing tokens of the step."""
        factor = self._sum_to_mean()
        self._pending = 0
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        found = [gradient for gradient in gradients if gradient is not None]
        if self.sharded:
            from toolmem.training.parallel.layout import local

            found = [local(gradient) for gradient in found]
        if found:  # none of a step that Guard passes over
            torch._foreach_mul_(found, factor)

    def _sum_to_mean(self) -> float | Tensor:
        ranks = self.ranks.data_size if self.ranks is not None else self.trainer.world_size
        if ranks == 1:
            return 1 / (SUM_SCALE * max(self._pending, 1))
        # DDP and FSDP have averaged over ranks, so their number is multiplied back in.
        return ranks / (SUM_SCALE * self._pending_over_ranks().clamp(min=1))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's hook; of a model that is split, the norm is that of all ranks' pieces."""
        if not self.sharded or not gradient_clip_val or gradient_clip_algorithm == "value":
            super().configure_gradient_clipping(
                optimizer, gradient_clip_val, gradient_clip_algorithm
            )
            return
        from toolmem.training.parallel.gradients import clip_by_norm

        clip_by_norm(
            (p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val
        )

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """The sum over ranks that read different data."""
        group = None if self.ranks is None else self.ranks.data_group
        return self.trainer.strategy.reduce(value, group, reduce_op="sum")

    @property
    def _data_rank(self) -> int:
        """The number of this process among those that read different data."""
        return self.trainer.global_rank if self.ranks is None else self.ranks.data_rank

    def _pending_over_ranks(self) -> Tensor:
        return self._sum_over_ranks(
            torch.tensor(self._pending, dtype=torch.float64, device=self.device)
        )

    def configure_optimizers(self) -> Any:
        """Lightning's hook: one optimizer, its schedule stepped with it."""
        total = self.trainer.max_steps
        optimizer = self.optimizer_config.build(self.model)
        optimizer = finetuning.decay_by_layer(optimizer, self.model, self.layer_lr_decay)
        optimizer.register_load_state_dict_pre_hook(self._number_states)
        if self.sharded:
            from toolmem.training.parallel.layout import keep_own_order_of_optimizer

            keep_own_order_of_optimizer(optimizer, self.model)
        scheduler = self.schedule.build(optimizer, total if total and total > 0 else None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _number_states(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint's optimizer states, in this optimizer's order."""
        path = self.trainer.ckpt_path or "the checkpoint"
        return by_number(state, optimizer, parameter_names(self, optimizer), str(path))

    def lr_scheduler_step(self, scheduler: LRScheduler, metric: Any) -> None:
        """Let the model do what it does once a step, log the step, then move the schedule on.

        Of Lightning's hooks this is the one that runs once an optimizer step, after it is counted
        and before callbacks may save a checkpoint: a resumed run's sums then go on where its log
        stops.
        """
        self.model.after_optimizer_step(self._sum_over_ranks)
        step = self.trainer.global_step
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and (step % every == 0 or step == self.trainer.max_steps):
            self._report_training(scheduler)
        scheduler.step()

    def _report_training(self, scheduler: LRScheduler) -> None:
        metrics = {
            "train/loss": self.train_loss.compute().item(),
            "train/tokens": int(self.train_tokens.compute().item()),
            "train/learning_rate": float(scheduler.get_last_lr()[0]),
        }
        self.train_loss.reset()
        if self._compilations is not None:
            metrics |= self._compilations.metrics()
        if isinstance(self.trainer.precision_plugin, MixedPrecision):
            metrics |= self.trainer.precision_plugin.metrics()
        self.report(metrics | self.train_extras.take())

    def report(self, metrics: Mapping[str, float]) -> None:
        """Send metrics to the loggers at the run's own step: optimizer steps taken.

        Args:
            metrics: by name, ``group/name``; the same on every rank.
        """
        step = self.trainer.global_step
        self.reported.update({name: (step, value) for name, value in metrics.items()})
        # Callbacks that monitor a metric (early stopping, checkpoints) look here.
        self.trainer.callback_metrics.update(
            {name: torch.tensor(float(value)) for name, value in metrics.items()}
        )
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step)

    def on_fit_start(self) -> None:
        """Start from another run's weights, where one is named and this run does not go on.

        Raises:
            ToolmemError: when they do not fit.
        """
        if self.init_from is not None and not self._resumed:
            load_initial_weights(self.model, self.init_from, self._data_info())

    def on_train_start(self) -> None:
        """Let loggers forget what a dead run logged after the checkpoint; put gradients back."""
        for logger in self.trainer.loggers:
            rewind = getattr(logger, "rewind", None)
            if rewind is not None:
                rewind(self.trainer.global_step)
        accumulation.put_back(self, self._restored_gradients)
        self._restored_gradients = {}
        if self._resumed and self._data_rank:
            accumulation.forget_sums(self.model)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Put random numbers back, once all that draws some before the first batch has done so."""
        if self._restored_random is not None:
            restore_random_state(self._restored_random, self.device)
            self._restored_random = None

    @contextmanager
    def whole_model(self) -> Iterator[LanguageModel]:
        """The model for rank zero to use by itself; every rank must come here, the others to wait."""
        if not self.sharded:
            yield self.model
            return
        from toolmem.training.parallel.twins import gathered_model

        yield gathered_model(self.model, keep=self.trainer.is_global_zero) or self.model

    # ---- evaluation

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add up the batch's loss, and its right answers where the data asks for them."""
        if not getattr(self.trainer.datamodule, "wants_accuracy", False):  # type: ignore[attr-defined]
            # of what is told, whatever loss training has (GRPO)
            self.eval_loss.update(*LanguageModelModule.loss_sum(self, batch))
            return
        logits, targets = self.logits_and_targets(batch, self.model.hidden)
        self.eval_loss.update(F.cross_entropy(logits, targets, reduction="sum"), targets.numel())
        self.eval_accuracy.update((logits.argmax(-1) == targets).sum(), targets.numel())

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log ``val/loss``, the mean over all loss-bearing tokens in nats, and ``val/accuracy``, the
        share of them that are predicted right, where the data asks for it.
        """
        self._finish_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log ``test/loss`` and ``test/accuracy``, as validation does."""
        self._finish_evaluation("test")

    def _finish_evaluation(self, group: str) -> None:
        metrics = {f"{group}/loss": self.eval_loss}
        if self.eval_accuracy.update_called:
            metrics[f"{group}/accuracy"] = self.eval_accuracy
        values = {name: metric.compute().item() for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        with warnings.catch_warnings():  # outside of training there need be no logger
            warnings.filterwarnings("ignore", ".*but have no logger configured.*")
            self.log_dict(values, logger=not fitting, sync_dist=True)
        if fitting and not self.trainer.sanity_checking:
            self.report(values)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Each row's summed loss in nats (``loss``), and its loss-bearing tokens (``count``)."""
        losses = self.token_losses(batch, self.model.hidden)
        rows = replace(batch, documents=None)
        return {"loss": rows.sums_by_document(losses, len(batch)), "count": batch.loss_mask.sum(1)}

    # ---- checkpoints

    def _data_info(self) -> dict[str, Any]:
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        return datamodule.checkpoint_info() if hasattr(datamodule, "checkpoint_info") else {}

    def _about(self) -> dict[str, Any]:
        about = checkpoints.describe(self.model, self._data_info())
        if self._class_path is not None:
            about["model"]["class_path"] = self._class_path
        if self.lora is not None:
            about["model"]["lora"] = self.lora.plain()
        return about | {
            "optimizer": compatibility.describe(self.optimizer_config),
            "schedule": compatibility.describe(self.schedule),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what rebuilds the model alone, and what training must know to go on exactly."""
        about = self._about()
        about["metrics"] = {
            "train_loss": saved_state(self.train_loss),
            "train_tokens": saved_state(self.train_tokens),
            "train_extras": self.train_extras.saved_state(),
        }
        about["loggers"] = {
            type(logger).__name__: logger.version
            for logger in self.trainer.loggers
            if logger.version
        }
        about["pending_tokens"] = int(self._pending_over_ranks().item())
        checkpoint[checkpoints.KEY] = about
        checkpoint["random"] = random_states(self.device)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [
                by_name(state, parameter_names(self, optimizer))
                for state, optimizer in zip(
                    checkpoint["optimizer_states"], self.trainer.optimizers, strict=True
                )
            ]
        if about["pending_tokens"]:
            checkpoint["pending_gradients"] = accumulation.gathered_gradients(self)
            accumulation.keep_sums(self.model, checkpoint, self._sum_over_ranks)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else; take up what ``on_save_checkpoint`` left.

        Raises:
            ToolmemError: when the checkpoint's model, tokenizer, facts or optimizer differ from
                this run's.
        """
        path = self.trainer.ckpt_path or "the checkpoint"
        about = checkpoints.about_of(checkpoint, path)
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        compatibility.check(about, self._about(), path, training=fitting)
        if not fitting:
            return
        self._resumed = True
        averaging = any(isinstance(c, WeightAveraging) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averaging:
            raise ToolmemError(
                f"{path} holds averaged weights: keep the callback toolmem.training.EMA in "
                "trainer.callbacks to go on from it"
            )
        if "metrics" not in about:
            raise ToolmemError(f"{path} holds weights only: training cannot go on from it")
        rank = self._data_rank
        restore_state(self.train_loss, about["metrics"]["train_loss"], rank)
        restore_state(self.train_tokens, about["metrics"]["train_tokens"], rank)
        self.train_extras.restore_state(about["metrics"].get("train_extras", {}), rank, self.device)
        self._pending = about["pending_tokens"] if rank == 0 else 0
        self._restored_gradients = checkpoint.get("pending_gradients", {})
        self._restored_random = own_random_state(checkpoint.get("random", ()), rank)
