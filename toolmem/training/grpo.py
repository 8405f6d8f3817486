"""Learning from right answers: group relative policy optimisation (arXiv 2402.03300).

A step of training::

    questions of the data's next batch  x samples
      -> dialogues, sampled with the tools in the loop      (time/generation_s)
      -> reward 1 where the answer is exactly right, else 0
      -> advantage: reward less the mean of the question's samples, over their standard deviation
      -> epochs x minibatches updates of the clipped surrogate, at the sampled tokens   (time/training_s)

Unusual about it:

- A step of Lightning's is one round of sampling with all of its updates, so a checkpoint never falls
  between them, and a resumed run needs nothing but the weights and the number of the data's batch.
- Dialogues of a question whose samples all earned the same have no gradient. Without a KL term they
  are counted but not run, so the better the model is, the less a step costs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn import functional as F

from toolmem import checkpoints
from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel
from toolmem.models.context import Extras
from toolmem.training.metrics import NamedMeans
from toolmem.training.module import LanguageModelModule
from toolmem.training.rollouts import (
    Rollouts,
    gather,
    group_advantages,
    kl_estimates,
    policy_losses,
    turn_advantages,
)
from toolmem.training.tools import open_run_tools

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.generation import Engine, Generated
    from toolmem.tools import Toolbox


class GRPO(LanguageModelModule):
    """Trains a language model on dialogues that it samples itself, by whether they end right.

    The data's batches are the questions (``FactsDataModule``); its expected dialogues serve only to
    judge the answers. Samples are drawn at temperature 1, so that the log-probabilities that
    generation reports are those of the policy that drew them.

    Logs ``grpo/reward`` (mean), ``grpo/mixed`` (share of questions that some samples answer and some
    do not), ``grpo/finished``, ``grpo/tool_calls`` and ``grpo/tokens`` (a dialogue),
    ``grpo/clipped`` and ``grpo/kl`` (a token, over all updates), ``grpo/log_prob_gap`` (mean absolute
    difference between generation's log-probabilities and training's, before the first update), and
    the run's seconds so far, ``time/generation_s`` and ``time/training_s``.

    Args:
        samples: dialogues of each question, at least 2.
        epochs: passes over the dialogues of a step.
        minibatches: updates of a pass, each on its share of the dialogues.
        clip: how far a token's probability may move from what it was when it was sampled, as a
            ratio: from 1 - clip to 1 + clip.
        clip_high: the upper side, if it is another (arXiv 2503.14476).
        kl: weight of the divergence from the model that training began with; 0 keeps no copy of it.
        scale: divide advantages by the standard deviation of their group; false is
            arXiv 2503.20783's.
        credit: one advantage for all that the model writes in a dialogue, or one for each turn, among
            the samples whose tools had said the same until then (after arXiv 2505.10978).
        average: over all tokens of a step, each alike (arXiv 2503.14476), or over dialogues and each
            one's tokens (arXiv 2402.03300).
        max_new_tokens: that the model may write in a dialogue; what the longest expected one of a
            batch needs, and some more, when None.
        max_tool_calls: that it may make in a dialogue.
        lanes: dialogues generated at once.
        invariant: generate in the engine's batch-invariant mode (float32; slower): a resumed run then
            equals one that was never stopped to the last bit, whatever the tools' timing.
        seed: of what is sampled.
    """

    def __init__(
        self,
        *args: Any,
        samples: int = 8,
        epochs: int = 1,
        minibatches: int = 1,
        clip: float = 0.2,
        clip_high: float | None = None,
        kl: float = 0.0,
        scale: bool = True,
        credit: Literal["dialogue", "turn"] = "dialogue",
        average: Literal["tokens", "dialogues"] = "tokens",
        max_new_tokens: int | None = None,
        max_tool_calls: int = 4,
        lanes: int = 256,
        invariant: bool = False,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for key, value, least in (
            ("samples", samples, 2),
            ("epochs", epochs, 1),
            ("minibatches", minibatches, 1),
            ("max_tool_calls", max_tool_calls, 0),
            ("lanes", lanes, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ToolmemError(f"model.{key} is {value}: it must be {least} or more")
        if not 0 < clip < 1 or not (clip_high is None or clip_high > 0):
            raise ToolmemError(
                f"model.clip is {clip}, model.clip_high {clip_high}: they must be above 0, clip below 1"
            )
        if kl < 0:
            raise ToolmemError(f"model.kl is {kl}: it must be 0 (off) or more")
        if self.model.init_args.get("dropout"):
            raise ToolmemError(
                "model.model.init_args.dropout: GRPO compares probabilities in generation and in "
                "training, which dropout makes different; set it to 0"
            )
        self.samples = samples
        self.epochs = epochs
        self.minibatches = minibatches
        self.clip = clip
        self.clip_high = clip if clip_high is None else clip_high
        self.kl = kl
        self.scale = scale
        self.credit = credit
        self.average = average
        self.max_new_tokens = max_new_tokens
        self.max_tool_calls = max_tool_calls
        self.lanes = lanes
        self.invariant = invariant
        self.seed = seed
        self.reference: LanguageModel | None = None
        if kl:
            self.reference = copy.deepcopy(self.model).requires_grad_(False)
        self.grpo_means = NamedMeans()
        self.seconds = {"generation": 0.0, "training": 0.0}
        self._lap_began = 0.0
        self._update = 0  # of the step's epochs * minibatches
        self._order = torch.empty(0, dtype=torch.int64)
        self._toolbox: Toolbox | None = None
        self._engine: Engine | None = None

    # ---- sampling

    def setup(self, stage: str) -> None:
        """Refuse what cannot be trained so.

        Raises:
            ToolmemError: for data without questions, or gradients gathered over several batches.
        """
        super().setup(stage)
        if stage != "fit":
            return
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(datamodule, "dialogues"):
            raise ToolmemError(
                "GRPO learns from answers to questions: use data.class_path toolmem.data.FactsDataModule"
            )
        if getattr(datamodule, "prefer_unknown", 0):
            raise ToolmemError(
                "data.init_args.prefer_unknown goes by the loss on expected dialogues, and GRPO trains on "
                "its own: set it to 0"
            )

    def on_fit_start(self) -> None:
        """Take up another run's weights, where one is named; where this one begins, the reference is."""
        super().on_fit_start()
        if self.reference is not None and not self._resumed:
            self.reference.load_state_dict(self.model.state_dict())

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lightning's hook: a training batch of expected dialogues becomes one of sampled dialogues."""
        if not self.trainer.training:
            return batch
        began = time.perf_counter()
        datamodule = self.trainer.datamodule  # type: ignore[attr-defined]
        questions = datamodule.dialogues(batch)
        seeds = self._seeds(batch.state["batch"], len(questions))
        with self.trainer.precision_plugin.forward_context():
            generated = self.sample(questions, seeds)
        rewards = self._rewards(questions, generated)
        rollouts = gather(
            generated,
            self._advantages(rewards, generated),
            with_spans=self.model.attention_mask == "prefix",
            device=self.device,
            state=batch.state,
        )
        self._note(rewards, generated)
        if self.reference is not None:
            with self.trainer.precision_plugin.forward_context():
                rollouts.reference = self._reference_log_probs(rollouts)
        # Which dialogues meet in a minibatch is a function of the batch's number, too.
        shuffle = np.random.default_rng([self.seed, batch.state["batch"], 1])
        self._order = torch.from_numpy(shuffle.permutation(len(generated)))
        self._lap_began = time.perf_counter()
        self.seconds["generation"] += self._lap_began - began
        return rollouts

    def _seeds(self, batch: int, n_questions: int) -> list[int]:
        """A seed for each dialogue of this process, by the batch, the question's place and the sample."""
        rank, world = self.trainer.datamodule.rank_and_world  # type: ignore[attr-defined]
        start = int(np.random.SeedSequence([self.seed, batch]).generate_state(1, np.uint64)[0] >> 1)
        places = [rank + world * question for question in range(n_questions)]
        return [start + place * self.samples + i for place in places for i in range(self.samples)]

    def sample(self, questions: Sequence[Dialogue], seeds: Sequence[int]) -> list[Generated]:
        """Ask each question ``samples`` times, at temperature 1.

        Args:
            questions: with the dialogues expected.
            seeds: of each dialogue.

        Returns:
            ``samples`` dialogues for each question in turn.
        """
        from toolmem.data.text.token_table import prompt_tokens
        from toolmem.evaluation.recall import answer_budget
        from toolmem.generation import Engine, Sampling
        from toolmem.generation.reference import check_all

        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        if self._engine is None:
            self._toolbox = open_run_tools(self.trainer)
            self._engine = Engine(
                self.model,
                tokenizer,
                self._toolbox,
                max_lanes=self.lanes,
                invariant=self.invariant,
            )
        self._engine.update_weights()
        prompts = [prompt_tokens(question.question, tokenizer) for question in questions]
        generated = self._engine.generate(
            [prompt for prompt in prompts for _ in range(self.samples)],
            max_new_tokens=self.max_new_tokens or answer_budget(questions, tokenizer),
            max_tool_calls=self.max_tool_calls,
            sampler=Sampling(),
            seed=seeds,
        )
        check_all(generated)
        return generated

    def reward(self, question: Dialogue, dialogue: Generated) -> float:
        """What a dialogue earns: 1 if it ends with the exact answer, else 0.

        Args:
            question: the dialogue expected.
            dialogue: the one sampled.
        """
        from toolmem.evaluation.recall import is_answered

        tokenizer = self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        return float(is_answered(dialogue, question, tokenizer))

    def _rewards(self, questions: Sequence[Dialogue], generated: Sequence[Generated]) -> Tensor:
        """(questions, samples) float64."""
        earned = [
            self.reward(questions[place // self.samples], dialogue)
            for place, dialogue in enumerate(generated)
        ]
        return torch.tensor(earned, dtype=torch.float64).view(len(questions), self.samples)

    def _advantages(self, rewards: Tensor, generated: Sequence[Generated]) -> Tensor:
        """(dialogues, turns)."""
        if self.credit == "dialogue":
            return group_advantages(rewards, self.scale).flatten()[:, None]
        said = [[answer.text for _, answer in dialogue.tool_calls] for dialogue in generated]
        groups = [said[i : i + self.samples] for i in range(0, len(said), self.samples)]
        return turn_advantages(rewards, groups, self.scale).flatten(0, 1)

    def _note(self, rewards: Tensor, generated: Sequence[Generated]) -> None:
        """Add a round's figures to what is logged next."""
        mixed = rewards.amax(1) > rewards.amin(1)
        self.grpo_means.update({"grpo/mixed": mixed.double().mean()}, len(rewards))

        def mean(values: list[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float64).mean()

        self.grpo_means.update(
            {
                "grpo/reward": rewards.mean(),
                "grpo/finished": mean([float(d.finish_reason == "end") for d in generated]),
                "grpo/tool_calls": mean([float(len(d.tool_calls)) for d in generated]),
                "grpo/tokens": mean([float(len(d.tokens)) for d in generated]),
            },
            len(generated),
        )

    @torch.no_grad()
    def _reference_log_probs(self, rollouts: Rollouts) -> Tensor:
        """(batch, seq): the reference's log-probability of each sampled token."""
        assert self.reference is not None
        states = self.reference.hidden(rollouts.tokens, spans=rollouts.spans)
        positions = rollouts.positions()
        logits = self.reference.logits(states.flatten(0, 1)[positions]).float()
        losses = F.cross_entropy(logits, rollouts.targets.flatten()[positions], reduction="none")
        found = torch.zeros_like(rollouts.log_probs).flatten()
        found[positions] = -losses.to(found.dtype)
        return found.view_as(rollouts.log_probs)

    # ---- updates

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """All updates of a step; each runs the closure: its loss, its gradient."""
        if self.epochs * self.minibatches > 1 and self.trainer.accumulate_grad_batches > 1:
            raise ToolmemError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}: with "
                "model.epochs or model.minibatches above 1 it must be 1; raise data.init_args.batch_size"
            )
        for update in range(self.epochs * self.minibatches):
            self._update = update
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._update = 0
        self._lap()

    def on_after_backward(self) -> None:
        """Count the time of a backward pass that no optimizer step follows."""
        self._lap()

    def _lap(self) -> None:
        now = time.perf_counter()
        self.seconds["training"] += now - self._lap_began
        self._lap_began = now

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """As of any language model, on the update's share of the dialogues."""
        assert isinstance(batch, Rollouts)
        if self.minibatches == 1:
            return super().training_step(batch, batch_idx)
        share = self._order[self._update % self.minibatches :: self.minibatches]
        if not len(share):
            raise ToolmemError(
                f"model.minibatches is {self.minibatches}, and a step has only {len(self._order)} "
                "dialogues: lower it"
            )
        return super().training_step(batch.take(share.to(self.device)), batch_idx)

    def loss_sum(
        self,
        batch: Batch,
        hidden: Callable[..., Tensor] | None = None,
        extras: Extras | None = None,
    ) -> tuple[Tensor, int]:
        """The summed loss of a batch of sampled dialogues, and the tokens or dialogues that share it.

        Args:
            batch: ``Rollouts``, on the model's device.
            hidden: the model's body; ``model.hidden`` when None.
            extras: takes the model's own terms of the loss, and its figures.
        """
        assert isinstance(batch, Rollouts)
        total = int(batch.counts.sum()) if self.average == "tokens" else len(batch)
        if self.kl == 0:
            moving = batch.advantages.any(dim=1).nonzero().squeeze(1)
            if len(moving) < len(batch):
                # One at least: every rank has to take part in the backward pass.
                batch = batch.take(moving if len(moving) else torch.zeros_like(batch.counts[:1]))
        logits, targets = self.logits_and_targets(batch, hidden or self.model.hidden, extras)
        log_probs = -F.cross_entropy(logits, targets, reduction="none")
        positions = batch.positions()
        rows = positions.div(batch.tokens.shape[1], rounding_mode="floor")
        sampled = batch.log_probs.flatten()[positions].to(log_probs.dtype)
        losses, clipped = policy_losses(
            log_probs,
            sampled,
            batch.advantages.flatten()[positions].to(log_probs.dtype),
            self.clip,
            self.clip_high,
        )
        figures = {"grpo/clipped": clipped.to(losses.dtype).mean()}
        if self._update == 0:
            figures["grpo/log_prob_gap"] = (log_probs - sampled).abs().mean()
        if batch.reference is not None:
            reference = batch.reference.flatten()[positions].to(log_probs.dtype)
            divergence = kl_estimates(log_probs, reference)
            losses = losses + self.kl * divergence
            figures["grpo/kl"] = divergence.mean()
        self.grpo_means.update(figures, len(losses))
        if self.average == "dialogues":
            losses = losses / batch.counts[rows]
        return losses.sum(), total

    # ---- logs, checkpoints

    def _report_training(self, scheduler: Any) -> None:
        """Log what every training does, and what is this one's own."""
        super()._report_training(scheduler)
        times = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        self.report(self.grpo_means.take() | times)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add sums of metrics, and seconds so far."""
        super().on_save_checkpoint(checkpoint)
        about = checkpoint[checkpoints.KEY]
        about["metrics"]["grpo"] = self.grpo_means.saved_state()
        about["seconds"] = dict(self.seconds)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up.

        Raises:
            ToolmemError: for a checkpoint of another kind of training.
        """
        super().on_load_checkpoint(checkpoint)
        if self.trainer.state.fn != TrainerFn.FITTING:
            return
        path = self.trainer.ckpt_path or "the checkpoint"
        about = checkpoints.about_of(checkpoint, path)
        if "grpo" not in about["metrics"]:
            raise ToolmemError(
                f"{path} was not trained by GRPO, so GRPO cannot go on with it: give the run another "
                "--name, and model.init_from the run to begin with"
            )
        kept = any(name.startswith("reference.") for name in checkpoint["state_dict"])
        if kept != (self.reference is not None):
            raise ToolmemError(
                f"model.kl is {self.kl}, and {path} was trained {'with' if kept else 'without'} a KL "
                "term: set model.kl as it was"
            )
        self.grpo_means.restore_state(
            about["metrics"]["grpo"], self.trainer.global_rank, self.device
        )
        self.seconds = dict(about["seconds"])

    def configure_callbacks(self) -> list[pl.Callback]:
        """One that closes engine and tools when training fails."""
        return [_CloseOnFailure()]

    def teardown(self, stage: str) -> None:
        """Close engine and tools."""
        if self._engine is not None:
            self._engine.close()
        if self._toolbox is not None:
            self._toolbox.close()
        self._engine = self._toolbox = None


class _CloseOnFailure(pl.Callback):
    """Lightning calls no module's ``teardown`` when something is raised."""

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        pl_module.teardown("fit")
