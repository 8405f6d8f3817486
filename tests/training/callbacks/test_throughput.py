import time

import lightning.pytorch as pl
import pytest
from training_toys import ToyData, make_batch, make_module, make_trainer

from toolmem.training import Throughput
from toolmem.training.callbacks.throughput import not_training


class Clock:
    """A clock that moves only when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Work(pl.Callback):
    """Training takes 1 s a step (10 s the first), validation 100 s, a pause of something else 50
    s."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_start(self, trainer, *args):
        self.clock.now += 1 if trainer.global_step else 10

    def on_validation_batch_start(self, *args):
        self.clock.now += 100

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            with not_training(trainer):
                self.clock.now += 50


@pytest.mark.parametrize("throughput_first", [True, False])
def test_counts_training_alone(tmp_path, monkeypatch, throughput_first):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    callbacks = [Throughput(), Work(clock)]
    trainer = make_trainer(
        tmp_path, 9, log_every_n_steps=3, val_check_interval=2,
        callbacks=callbacks if throughput_first else callbacks[::-1],
    )  # fmt: skip
    module, reports = make_module(), []
    module.report = lambda m: reports.append((trainer.global_step, dict(m)))
    trainer.fit(module, ToyData(lambda i: make_batch(i, rows=2 + i % 2, seq=5)))
    found = [(step, m) for step, m in reports if "throughput/tokens_per_s" in m]
    # Steps 2 and 3, then 4 to 6, then 7 to 9, at one second a step.
    assert [step for step, _ in found] == [3, 6, 9]
    rates = [m["throughput/tokens_per_s"] for _, m in found]
    assert rates == pytest.approx([(15 + 10) / 2, (15 + 10 + 15) / 3, (10 + 15 + 10) / 3])
    assert found[0][1]["throughput/first_step_s"] == 10
    assert "throughput/first_step_s" not in found[1][1]


def test_accumulation_counts_every_micro_batch(tmp_path, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)

    class Tick(pl.Callback):
        def on_train_batch_start(self, *args):
            clock.now += 1

    trainer = make_trainer(
        tmp_path, 2, log_every_n_steps=1, accumulate_grad_batches=4, limit_val_batches=0,
        callbacks=[Tick(), Throughput()],
    )  # fmt: skip
    module = make_module()
    trainer.fit(module, ToyData(lambda i: make_batch(i, rows=2, seq=5)))
    assert module.reported["throughput/tokens_per_s"] == (2, pytest.approx(10.0))
