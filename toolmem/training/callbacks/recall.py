"""Asks questions while training goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch

from toolmem import console
from toolmem.errors import ToolmemError
from toolmem.files import write_text
from toolmem.tools import open_toolbox
from toolmem.training.callbacks.ema import averaged_weights
from toolmem.training.callbacks.rounds import Rounds
from toolmem.training.callbacks.stopping import out_of_reach
from toolmem.training.callbacks.throughput import not_training
from toolmem.training.module import LanguageModelModule
from toolmem.training.tools import write_run_facts

if TYPE_CHECKING:
    from toolmem.evaluation.recall import RecallResult
    from toolmem.models import LanguageModel
    from toolmem.tools.base import Toolbox

REACHED = "recall reached"
OUT_OF_REACH = "recall out of reach"
PARTS = 2  # batches of questions asked at once: what a kill in their midst costs


class RecallProbe(pl.Callback):
    """Every so often asks the model questions, with its tools at hand, and logs how many it
    answers.

    Logs ``recall/exact_match`` and ``recall/exact_match/ATTRIBUTE`` on people that training knows,
    and ``recall/unseen/exact_match`` on people that it does not; shows two dialogues; writes those
    it saw to ``samples/step_N.jsonl``, and each question's outcome, as it comes, to
    ``evaluations/recall_step_N.jsonl``: a run that is killed in the midst of a round does not ask again
    what was answered. Data without questions is passed over in silence. The
    model's mode and all random numbers are left as they were, so training goes the same way with
    and without it.

    Args:
        every_n_steps: optimizer steps between two rounds; 0 for none so.
        steps: rounds at these steps, too; 0 is before the first.
        steps_per_decade: rounds between a power of ten of steps and the next, evenly by ratio. Where there
            is any round, there is one at the last step, too.
        n_questions: of known people, a round.
        n_unseen: of unseen people, a round.
        stop_at: end training once ``recall/exact_match`` is this high; None never does.
        give_up_after: from this share of the run on, end it too when ``stop_at`` is out of reach: when
            the fastest rise between two rounds so far, three times as fast, would not lead there by the
            last step, after four rounds at least. None never does. A leap that nothing announced
            would be missed.
        batch_size: dialogues generated at once.
        n_samples: dialogues kept of each kind, a round.
        show: print two dialogues, a round.
    """

    def __init__(
        self,
        every_n_steps: int = 1000,
        steps: list[int] | None = None,
        steps_per_decade: int = 0,
        n_questions: int = 256,
        n_unseen: int = 256,
        stop_at: float | None = None,
        give_up_after: float | None = None,
        batch_size: int = 128,
        n_samples: int = 8,
        show: bool = True,
    ) -> None:
        super().__init__()
        self.rounds = Rounds("recall", every_n_steps, steps, steps_per_decade)
        if n_questions < 1 or n_unseen < 0 or batch_size < 1:
            raise ToolmemError(
                "recall: n_questions and batch_size must be 1 or more, n_unseen 0 or more"
            )
        if stop_at is not None and not 0 < stop_at <= 1:
            raise ToolmemError(f"recall: stop_at is {stop_at}: it must be above 0 and at most 1")
        if give_up_after is not None and not 0 < give_up_after < 1:
            raise ToolmemError(
                f"recall: give_up_after is {give_up_after}: it is a share of the run, above 0 and below 1"
            )
        if give_up_after is not None and stop_at is None:
            raise ToolmemError(
                "recall: give_up_after needs stop_at, the recall that is to be reached"
            )
        self.n_questions = n_questions
        self.n_unseen = n_unseen
        self.stop_at = stop_at
        self.give_up_after = give_up_after
        self.batch_size = batch_size
        self.n_samples = n_samples
        self.show = show
        self.ended: str | None = None  # why it ended training
        self._found: list[tuple[int, float]] = []  # (step, recall/exact_match) of each round
        self._questions: dict[str, list[Any]] = {}
        self._toolbox: Toolbox | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the questions, which stay the same through the run, and open the tools."""
        self.rounds.begin(trainer.global_step)
        self._questions = {}
        if self.ended is not None:  # a run that went on from the checkpoint at its end
            trainer.should_stop = True
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        if not self.rounds or not hasattr(datamodule, "questions"):
            return
        for split, n in (("known", self.n_questions), ("unseen", self.n_unseen)):
            if n and (questions := datamodule.questions(split, n)):
                self._questions[split] = questions
        if trainer.is_global_zero and datamodule.checkpoint_info().get("setting") == "in_tool":
            path = write_run_facts(trainer)
            self._toolbox = open_toolbox(datamodule.checkpoint_info().get("tools"), path)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask before the first step, if it is wanted."""
        if trainer.global_step == 0:
            self._round(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Ask, if it is time."""
        self._round(trainer, pl_module)

    def _round(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._questions and self.rounds.due(trainer.global_step, trainer.max_steps):
            with not_training(trainer):
                self._ask(trainer, pl_module)

    def _ask(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One process asks; the others wait for what it found."""
        assert isinstance(pl_module, LanguageModelModule)
        metrics: dict[str, float] = {}
        with pl_module.whole_model() as model:
            if trainer.is_global_zero:
                metrics = self._measure(trainer, pl_module, model)
        metrics = trainer.strategy.broadcast(metrics)
        pl_module.report(metrics)
        self._found.append((trainer.global_step, metrics["recall/exact_match"]))
        self.ended = self._why_end(trainer.max_steps)
        if self.ended is not None:
            trainer.should_stop = True

    def _why_end(self, total: int) -> str | None:
        if self.stop_at is None:
            return None
        if self._found[-1][1] >= self.stop_at:
            return REACHED
        after = self.give_up_after
        if (
            after is not None
            and total > 0
            and out_of_reach(self._found, self.stop_at, total, after)
        ):
            return OUT_OF_REACH
        return None

    def state_dict(self) -> dict[str, Any]:
        """What was found so far, and whether that ended training."""
        return {"found": list(self._found), "ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what a checkpoint's run had found."""
        self._found = [(int(step), float(value)) for step, value in state_dict["found"]]
        self.ended = state_dict["ended"]

    def _measure(
        self, trainer: pl.Trainer, module: LanguageModelModule, model: LanguageModel
    ) -> dict[str, float]:
        from toolmem.evaluation.answers import Answers, questions_digest, weights_digest
        from toolmem.evaluation.recall import measure_in_parts

        step = trainer.global_step
        tokenizer = trainer.datamodule.tokenizer  # type: ignore[attr-defined]
        path = Path(trainer.default_root_dir) / "evaluations" / f"recall_step_{step}.jsonl"
        with undisturbed(module.model), averaged_weights(trainer, module):
            about = {
                "step": step,
                "weights": weights_digest(model),
                "questions": questions_digest(self._questions),
                "batch_size": self.batch_size,
            }
            with Answers(path, about) as answers:
                results = measure_in_parts(
                    model,
                    tokenizer,
                    self._questions,
                    part=PARTS * self.batch_size,
                    answers=answers,
                    n_dialogues=self.n_samples,
                    toolbox=self._toolbox,
                    batch_size=self.batch_size,
                )
        metrics: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        for split, result in results.items():
            metrics |= metrics_of(result, split)
            samples += [{"split": split, **sample} for sample in kept(result, self.n_samples)]
        self._keep(trainer, samples)
        return metrics

    def _keep(self, trainer: pl.Trainer, samples: list[dict[str, Any]]) -> None:
        step = trainer.global_step
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        folder = Path(trainer.default_root_dir) / "samples"
        write_text(folder / f"step_{step}.jsonl", "".join(lines))
        if self.show:
            for sample in samples[:2]:
                verdict = "right" if sample["correct"] else f"wrong, it is {sample['expected']}"
                console.stderr().rule(f"step {step}: {verdict}", align="left")
                turns = [(turn["role"], turn["text"]) for turn in sample["turns"]]
                console.stderr().print(console.dialogue_text(turns))

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the tools."""
        if self._toolbox is not None:
            self._toolbox.close()
            self._toolbox = None


def metrics_of(result: RecallResult, split: str) -> dict[str, float]:
    """A result as metrics by name."""
    prefix = "recall" if split == "known" else f"recall/{split}"
    metrics = {f"{prefix}/exact_match": result.exact_match}
    if split == "known":
        metrics |= {
            f"{prefix}/exact_match/{name}": score.fraction
            for name, score in result.attributes.items()
        }
    return metrics


def kept(result: RecallResult, n: int) -> list[dict[str, Any]]:
    """The first ``n`` dialogues of a result as plain data."""
    return [sample.as_dict() for sample in result.samples[:n]]


@contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Whatever happens in here, modes of modules and states of random numbers are put back."""
    modes = [(module, module.training) for module in model.modules()]
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        random.setstate(state[0])
        np.random.set_state(state[1])
        torch.set_rng_state(state[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)
