"""A run that is asked to end goes on later as if it had not been asked."""

from __future__ import annotations

import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

from toolmem import checkpoints
from toolmem.training import Checkpointing
from toolmem.training.callbacks.preemption import SIGNALS, Preempted, Preemption, end_on_signals


class Asks(pl.Callback):
    """Sends this process signals while a batch is trained."""

    def __init__(self, batch, *signals):
        self.batch, self.signals = batch, signals

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.batch:
            for one in self.signals:
                os.kill(os.getpid(), one)


@pytest.fixture(autouse=True)
def _handlers():
    before = [signal.getsignal(one) for one in SIGNALS]
    yield
    for one, handler in zip(SIGNALS, before, strict=True):
        signal.signal(one, handler)


def fit(folder, *callbacks, resume=None, every=100, **options):
    keep = Checkpointing(every_n_steps=every)
    trainer = make_trainer(
        folder, 8, callbacks=[*callbacks, keep], enable_checkpointing=True, val_check_interval=5,
        **options,
    )  # fmt: skip
    module, data = make_module(), ToyData()
    trainer.fit(module, data, ckpt_path=resume)
    return module, data


@pytest.mark.parametrize(
    ("batch", "accumulate", "step", "batches"),
    [
        (2, 1, 3, 3),
        (2, 2, 2, 4),  # in mid-step: what is accumulated is no part of a checkpoint
        (4, 1, 5, 5),  # a validation comes between
    ],
)
def test_it_ends_after_the_step_and_goes_on_the_same(tmp_path, batch, accumulate, step, batches):
    options = {"accumulate_grad_batches": accumulate}
    whole, all_batches = fit(tmp_path / "whole", **options)
    asked = Asks(batch, signal.SIGUSR2, signal.SIGTERM)
    with pytest.raises(Preempted) as ended:
        fit(tmp_path / "part", Preemption(), asked, **options)
    assert ended.value.signum == signal.SIGUSR2
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert checkpoints.read(last)["global_step"] == step
    rest, data = fit(tmp_path / "part", Preemption(), resume=last, **options)
    assert data.log == all_batches.log[batches:]
    for mine, expected in zip(rest.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, expected)


def test_a_run_that_is_over_anyway_is_over(tmp_path):
    fit(tmp_path, Preemption(), Asks(7, signal.SIGTERM))
    saved = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 8


def test_signals_are_given_back(tmp_path):
    calls = []
    for one in SIGNALS:
        signal.signal(one, lambda *args: calls.append(args[0]))
    fit(tmp_path / "a", Preemption())
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path / "b", Preemption(), Divides())
    for one in SIGNALS:
        os.kill(os.getpid(), one)
    assert calls == list(SIGNALS)


class Divides(pl.Callback):
    def on_train_batch_start(self, *args):
        _ = 1 / 0


def test_before_training_it_ends_at_once():
    end_on_signals()
    with pytest.raises(Preempted, match="asked to end by SIGTERM") as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.signum == signal.SIGTERM
    os.kill(os.getpid(), signal.SIGUSR2)  # whoever is ending is not disturbed
