"""Ends a run that is asked to end, by a cluster or by Ctrl-C, with a checkpoint that loses nothing."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist

from toolmem.training.callbacks.checkpointing import Checkpointing

# what Slurm sends before it kills, and what it is told to send some time before that
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
TIME_IS_UP = 1000  # in the place of a signal's number
ASK_EVERY_S = 0.1  # ranks each other: more often would take tiny models a noticeable part of a step
MOST_STEPS = 100


class Preempted(BaseException):
    """The process was asked to end; what was trained can be gone on from.

    Args:
        signum: the signal, or ``TIME_IS_UP``.
        trainer: that wrote a checkpoint; None when training had not begun.

    Attributes:
        asker: what asked, in words.
        step: optimizer steps in the checkpoint.
        folder: of the run.
        ranks: processes that end at the same time.
    """

    def __init__(self, signum: int, trainer: pl.Trainer | None = None) -> None:
        time_is_up = signum == TIME_IS_UP
        self.asker = "trainer.max_time" if time_is_up else signal.Signals(signum).name
        super().__init__(f"asked to end by {self.asker}")
        self.signum = signum
        self.step = None if trainer is None else trainer.global_step
        self.folder = None if trainer is None else trainer.default_root_dir
        launcher = None if trainer is None else trainer.strategy.launcher
        self.ranks: list[Any] = getattr(launcher, "procs", [])


def end_on_signals() -> None:
    """From now on the first signal to end raises ``Preempted``, wherever this process is."""

    def end(signum: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, _ignore)
        raise Preempted(signum)

    for one in SIGNALS:
        signal.signal(one, end)


def wait_for_the_first() -> None:
    """From now on this process ignores signals to end: the one that started it ends it."""
    for one in (*SIGNALS, signal.SIGINT):
        signal.signal(one, _ignore)


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Whatever is done with signals to end in here, afterwards they are handled as before."""
    if threading.current_thread() is not threading.main_thread():  # which alone may handle them
        yield
        return
    before = {one: signal.getsignal(one) for one in (*SIGNALS, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for one, handler in before.items():
            signal.signal(one, handler)


def _ignore(signum: int, frame: FrameType | None) -> None:
    """Unlike ``SIG_IGN`` this is not inherited by programs that are started."""


class _Listener:
    """Ends this process at the second Ctrl-C, also while it waits where python's handlers do not run."""

    def __init__(self) -> None:
        reading, self._writing = socket.socketpair()
        self._writing.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def _listen(self, reading: socket.socket) -> None:
        heard = 0
        with reading:
            while numbers := reading.recv(64):
                heard += numbers.count(signal.SIGINT)
                if heard > 1:
                    os._exit(128 + signal.SIGINT)

    def close(self) -> None:
        """Listen no more."""
        signal.set_wakeup_fd(self._before)
        self._writing.close()


class Preemption(pl.Callback):
    """In training, a signal to end writes ``last.ckpt`` after the optimizer step, then raises ``Preempted``.

    A run that goes on from it is the run that was never asked. Of several processes it is enough that
    one gets the signal: ten times a second, or after each step where it takes longer, they ask each
    other, and hear the answer the next time, so all end after the same step. A validation or a round
    of questions that has begun is brought to its end first.

    Args:
        ctrl_c: take Ctrl-C (SIGINT) for such a signal, too; a second one ends the process at once.
        max_seconds: of training, after which it ends likewise; what a run that goes on has behind it
            counts. (Lightning's ``max_time`` validates once more at its end, which the run that is not
            ended would not have done.)
    """

    def __init__(self, ctrl_c: bool = False, max_seconds: float | None = None) -> None:
        super().__init__()
        self.max_seconds = max_seconds
        self._seconds = 0.0  # of training until it last began
        self._began: float | None = None
        self.signals = (*SIGNALS, signal.SIGINT) if ctrl_c else SIGNALS
        self.received: int | None = None  # by this process
        self.agreed: int | None = None  # by all
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._asking: tuple[Any, torch.Tensor] | None = None  # the others, since some steps ago
        self._asked_at = 0.0
        self._waited = self._until_asked = 1  # steps
        self._listener: _Listener | None = None
        self._step = 0
        self._speaks = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals over; Lightning would end at once, without a checkpoint."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        self.checkpointing = next(one for one in callbacks if isinstance(one, Checkpointing))
        self.received = self.agreed = None
        self._speaks = trainer.is_global_zero
        self._step = trainer.global_step
        if trainer.world_size > 1:
            # of its own, and on the host: nothing waits for a device, or gets among what the model sends
            self._group = dist.new_group(backend="gloo")
        self._asked_at, self._waited, self._until_asked = time.monotonic(), 1, 1
        self._began = time.monotonic()
        if self._time_is_up():  # from the start: there is no step to save after
            trainer.should_stop = True
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._receive) for one in self.signals}
            if signal.SIGINT in self.signals:
                self._listener = _Listener()

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signum
        if self._group is None:
            self._agree(signum)
        if self._speaks:
            again = "; Ctrl-C again ends at once" if signum == signal.SIGINT else ""
            name = signal.Signals(signum).name
            # not by print: the signal may have come in the middle of one
            os.write(2, f"\n{name}: ends after this step, with a checkpoint{again}\n".encode())

    def _time_is_up(self) -> bool:
        return self.max_seconds is not None and self.seconds >= self.max_seconds

    @property
    def seconds(self) -> float:
        """Of training so far, over all starts of the run."""
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def state_dict(self) -> dict[str, Any]:
        """The time that training took."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the time that training took."""
        self._seconds = float(state_dict["seconds"])

    def _agree(self, signum: int) -> None:
        self.agreed = signum
        self.checkpointing.asked = True

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """After an optimizer step: hear what other ranks said after the last, and ask them anew."""
        if trainer.global_step == self._step or self.agreed is not None:
            return
        self._step = trainer.global_step
        if self.received is None and self._time_is_up():
            self.received = TIME_IS_UP
            if self._group is None:
                self._agree(TIME_IS_UP)
        self._until_asked -= 1
        if self._group is None or self._until_asked > 0:
            return
        found, wait = self._hear()
        if found:
            self._agree(found)
            return
        now = time.monotonic()
        seconds = (now - self._asked_at) / self._waited  # a step
        wish = max(1, min(MOST_STEPS, int(ASK_EVERY_S / max(seconds, 1e-9))))
        say = torch.tensor([self.received or 0, -wish], dtype=torch.int32)
        work = dist.all_reduce(say, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._asking = (work, say)
        self._asked_at, self._waited, self._until_asked = now, wait, wait

    def _hear(self) -> tuple[int, int]:
        """The highest signal that any process had when it was asked, and the fewest steps that any wants
        to wait until the next time.
        """
        if self._asking is None:
            return 0, 1
        work, say = self._asking
        self._asking = None
        work.wait()
        signum, wish = say.tolist()
        return signum, -wish

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """End, once the checkpoint is written.

        Raises:
            Preempted: then.
        """
        if self.agreed is not None and not self.checkpointing.asked:
            raise Preempted(self.agreed, trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._hear()
        self._give_back()

    def _give_back(self) -> None:
        self._group = self._asking = None
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        while self._before:
            signal.signal(*self._before.popitem())

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back, but for one who is ending: what comes then would only disturb."""
        if not isinstance(exception, Preempted):
            self._give_back()
