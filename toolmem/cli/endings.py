"""How ``toolmem fit`` and its like end: by a signal, by Ctrl-C, by the death of one of several ranks.

Several ranks of one machine are started by the first (Lightning's launcher). It watches over them; none
outlives it. When one fails, the others only learn that it is gone: their errors are echoes, which are
not shown beside the one that says why.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.files import write_text
from toolmem.processes import end_with
from toolmem.training.callbacks.preemption import (
    TIME_IS_UP,
    Preempted,
    end_on_signals,
    signals_given_back,
    wait_for_the_first,
)

GO_ON = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here
CTRL_C = 130
LAUNCHER = "TOOLMEM_LAUNCHER"  # the process that started this rank
REASONS = "TOOLMEM_REASONS"  # the folder where ranks say why they failed
PATIENCE_S = 15.0  # that a rank has to say why, and the first to end by itself
ECHOES = (
    "connection closed by peer",
    "connection reset by peer",
    "connection was likely closed",
    "broken pipe",
    "gloo/transport",
    "socket timeout",
    "nccl",
)


def carry_out(command: str, work: Callable[[], Any]) -> int:
    """Do the work of a command that trains, and end as a cluster and its user expect.

    Args:
        command: its name, for messages.
        work: gives the LightningCLI that did it.

    Returns:
        0, also when ``trainer.max_time`` is up; 75 when a signal asked it to end and the same command goes
        on; 130 for Ctrl-C; 1 when another rank failed.
    """
    launched = LAUNCHER in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    with signals_given_back():
        if launched:
            end_with(int(os.environ[LAUNCHER]))
            wait_for_the_first()
            return _as_launched(work)
        with _as_launcher():
            return _as_first(command, work)


def _as_first(command: str, work: Callable[[], Any]) -> int:
    if threading.current_thread() is threading.main_thread():
        end_on_signals()
    try:
        done = work()
        _wait(getattr(getattr(done.trainer.strategy, "launcher", None), "procs", []))
    except Preempted as asked:
        _wait(asked.ranks)
        from lightning.pytorch.utilities import rank_zero_only

        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"toolmem {command}: {_how_to_go_on(asked)}", file=sys.stderr)
        return {signal.SIGINT: CTRL_C, TIME_IS_UP: 0}.get(asked.signum, GO_ON)
    except SystemExit as leaving:
        if isinstance(leaving.__context__, KeyboardInterrupt):  # before training began
            raise leaving.__context__ from None
        raise
    except Exception as error:
        alone = "LOCAL_RANK" not in os.environ
        if alone or not is_echo(error) or not (reason := _reason()):
            _say_why(error)
            raise
        print(f"toolmem {command}: {reason}", file=sys.stderr)
        return 1
    return 0


def _as_launched(work: Callable[[], Any]) -> int:
    try:
        work()
    except Preempted:
        pass  # the first says so, by its exit code, too
    except Exception as error:
        if is_echo(error) and _reason():
            return 1
        _say_why(error)
        raise
    return 0


def _how_to_go_on(asked: Preempted) -> str:
    if asked.step is None or asked.folder is None:
        return f"ended by {asked.asker} before training began; the same command begins again"
    more = " --trainer.max_time MORE" if asked.signum == TIME_IS_UP else ""
    return (
        f"ended by {asked.asker} after step {asked.step}, which {asked.folder}/checkpoints/last.ckpt holds; "
        f"go on with: toolmem fit --config {asked.folder}/config.yaml --resume auto{more}"
    )


def _wait(ranks: Sequence[subprocess.Popen]) -> None:
    """Let other ranks end what they write."""
    until = time.monotonic() + PATIENCE_S
    for rank in ranks:
        with contextlib.suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, until - time.monotonic()))


# ---- ranks that fail


def is_echo(error: BaseException) -> bool:
    """Whether an error may well tell no more than that another rank is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(word in text for word in ECHOES)


def _say_why(error: BaseException) -> None:
    """Leave word for the other ranks that this one failed by itself."""
    folder = os.environ.get(REASONS)
    if folder:
        rank = os.environ.get("LOCAL_RANK", "0")
        line = str(error).strip().partition("\n")[0]
        text = line if isinstance(error, ToolmemError) else f"{type(error).__name__}: {line}"
        with contextlib.suppress(ToolmemError):
            write_text(Path(folder) / rank, f"rank {rank} failed, and with it all: {text}")


def _reason() -> str | None:
    """Why another rank failed, as soon as it says so; None when nobody does."""
    folder = os.environ.get(REASONS)
    until = time.monotonic() + PATIENCE_S
    while folder and time.monotonic() < until:
        for path in sorted(Path(folder).glob("[0-9]*")):
            return path.read_text(encoding="utf-8")
        time.sleep(0.05)
    return None


@contextlib.contextmanager
def _as_launcher() -> Iterator[None]:
    """Ranks that are started in here end with this process, and it tells why one failed."""
    from lightning.pytorch.strategies.launchers import subprocess_script as launching

    before = {key: os.environ.get(key) for key in (LAUNCHER, REASONS)}
    observer = launching._launch_process_observer
    with tempfile.TemporaryDirectory(prefix="toolmem-") as folder:
        os.environ |= {LAUNCHER: str(os.getpid()), REASONS: folder}
        # Lightning's kills this process without a word
        launching._launch_process_observer = partial(_watch_over, folder=Path(folder))
        try:
            yield
        finally:
            launching._launch_process_observer = observer
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


def _watch_over(child_processes: list[subprocess.Popen], folder: Path) -> None:
    """Look after the ranks that were started: when one fails, this process must not wait for it forever.

    Args:
        child_processes: all ranks but the first.
        folder: where they say why.
    """
    ranks = child_processes

    def watch() -> None:
        while (failed := _first_failed(ranks)) is None:
            if all(rank.poll() == 0 for rank in ranks) or not folder.exists():
                return
            time.sleep(0.2)
        number, code = failed
        if code < 0:
            name = signal.Signals(-code).name
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            text = f"rank {number} was killed by {name}{memory}, and all end with it"
            write_text(folder / str(number), text)
        # an error comes to the first rank, too, where it computes; not where it waits for a device
        time.sleep(PATIENCE_S)
        if folder.exists():
            reason = _reason() or f"rank {number} ended with exit code {code}"
            print(f"toolmem fit: {reason}", file=sys.stderr, flush=True)
            for rank in ranks:
                rank.kill()
            os._exit(1)

    threading.Thread(target=watch, daemon=True, name="watch-over-ranks").start()


def _first_failed(ranks: Sequence[subprocess.Popen]) -> tuple[int, int] | None:
    for number, rank in enumerate(ranks, start=1):
        if rank.poll():
            return number, int(rank.returncode)
    return None
