"""``toolmem fit`` asked to end: exit codes, what it says, and that the run goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_toys import changed, write_config

from toolmem import checkpoints
from toolmem.cli.endings import is_echo
from toolmem.errors import ToolmemError


def words_of(tmp_path: Path, **changes) -> list[str]:
    recipe = write_config(tmp_path / "recipe.yaml", changed(**changes))
    return ["fit", "--config", str(recipe), "--runs", str(tmp_path), "--name", "run"]


def assert_same_end(run: Path, whole: Path) -> None:
    from test_fit import same, timeless, weights

    assert same(weights(run), weights(whole))
    assert timeless(run) == timeless(whole)


@pytest.fixture
def at_step(monkeypatch):
    """Have something happen in the middle of an optimizer step of ``toolmem fit``, once."""

    def install(step, what):
        from toolmem.training import LanguageModelModule

        before = LanguageModelModule.on_before_optimizer_step
        done = []

        def hook(module, optimizer):
            before(module, optimizer)
            if module.trainer.global_step == step - 1 and not done:
                done.append(step)
                what()

        monkeypatch.setattr(LanguageModelModule, "on_before_optimizer_step", hook)

    return install


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)],
)
@pytest.mark.parametrize("step", [2, 3])  # a validation comes after step 3
def test_a_signal_ends_the_run_within_the_step(
    signum, code, step, at_step, tmp_path, runs, toolmem
):
    handlers = {one: signal.getsignal(one) for one in signal.valid_signals()}
    words = words_of(tmp_path)
    at_step(step, lambda: os.kill(os.getpid(), signum))
    called = toolmem(*words, "--resume", "auto")
    run = tmp_path / "run"
    assert called.code == code
    assert called.err.count("\n") == 1
    go_on = f"go on with: toolmem fit --config {run}/config.yaml --resume auto"
    assert f"ended by {signum.name} after step {step}" in called.err and go_on in called.err
    assert checkpoints.read(run / "checkpoints" / "last.ckpt")["global_step"] == step
    assert {one: signal.getsignal(one) for one in signal.valid_signals()} == handlers
    # what it told to do
    assert toolmem("fit", "--config", run / "config.yaml", "--resume", "auto").code == 0
    assert_same_end(run, runs / "in_weight")


def test_before_training_begins_there_is_nothing_to_lose(tmp_path, toolmem, monkeypatch):
    from toolmem.data import FactsDataModule

    monkeypatch.setattr(
        FactsDataModule,
        "setup",
        lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM),
        raising=False,
    )
    called = toolmem(*words_of(tmp_path))
    assert called.code == 75
    assert "ended by SIGTERM before training began" in called.err


def test_ctrl_c_before_training_begins(tmp_path, toolmem, monkeypatch):
    from toolmem.data import FactsDataModule

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(FactsDataModule, "setup", interrupt, raising=False)
    called = toolmem(*words_of(tmp_path))
    assert (called.code, called.err.strip()) == (130, "toolmem fit: interrupted")


def test_the_time_limit_ends_with_a_checkpoint(tmp_path, runs, toolmem, at_step):
    from toolmem.training.callbacks import preemption

    words = words_of(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        now = [0.0]
        patch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))
        at_step(4, lambda: now.append(now.pop() + 1700))
        at_step(5, lambda: now.append(now.pop() + 200))
        called = toolmem(*words, "--trainer.max_time", "00:00:30:00")
        assert called.code == 0
        assert "ended by trainer.max_time after step 5" in called.err
        assert called.err.rstrip().endswith("--resume auto --trainer.max_time MORE")
        assert checkpoints.load(tmp_path / "run").step == 5
        # the time that it had counts
        again = [*words, "--resume", "auto", "--trainer.max_time"]
        assert toolmem(*again, "00:00:31:40").code == 0
        assert checkpoints.load(tmp_path / "run").step == 5
        assert toolmem(*again, "00:00:31:41").code == 0
    assert_same_end(tmp_path / "run", runs / "in_weight")


@pytest.mark.parametrize("words", [("--ckpt_path", "last"), ("--resume", "auto")])
def test_a_first_start_with_what_goes_on(words, tmp_path, runs, toolmem):
    """The line that a cluster repeats is right the first time, too; and in a recipe."""
    for _ in range(2):
        assert toolmem(*words_of(tmp_path), *words).code == 0
        assert_same_end(tmp_path / "run", runs / "in_weight")


def test_resume_in_the_recipe(tmp_path, runs, toolmem):
    for _ in range(2):
        assert toolmem(*words_of(tmp_path, resume="auto")).code == 0
        assert_same_end(tmp_path / "run", runs / "in_weight")


@pytest.mark.parametrize(
    ("error", "echo"),
    [
        (
            RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:1"),
            True,
        ),
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:94"), True),
        (ToolmemError("recipe.yaml: connection closed by peer"), False),
        (RuntimeError("shape mismatch"), False),
    ],
)
def test_echoes(error, echo):
    assert is_echo(error) == echo


# ---- several processes

FAILS = """
import lightning.pytorch as pl

class FailsIn(pl.Callback):
    def __init__(self, rank: int):
        self.rank = rank

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == 3:
            raise ArithmeticError("the sum is wrong here")
"""


class Ddp:
    """Runs of two processes, each in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = changed(
            trainer__max_steps=10**6, trainer__devices=2, trainer__strategy="ddp",
            trainer__val_check_interval=10**6, recall__every_n_steps=0,
            checkpointing__every_n_steps=10**6,
        )  # fmt: skip
        write_config(folder / "ddp.yaml", config)
        (folder / "my_failure.py").write_text(FAILS)
        self.processes: list[subprocess.Popen] = []

    def start(self, name, *words, trains=True):
        run = self.folder / name
        command = [
            sys.executable,
            "-m",
            "toolmem",
            "fit",
            "--config",
            str(self.folder / "ddp.yaml"),
        ]
        command += ["--runs", str(self.folder), "--name", name, "--resume", "auto", *words]
        paths = [str(self.folder), os.environ.get("PYTHONPATH", "")]
        metrics = run / "metrics.csv"
        before = metrics.stat().st_mtime_ns if metrics.exists() else 0
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
        self.processes.append(process)
        until = time.monotonic() + 280
        while trains and not (metrics.exists() and metrics.stat().st_mtime_ns != before):
            assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
            time.sleep(0.05)
        return process

    def end(self, process, seconds=150):
        """Exit code and output, once every process of the session is gone."""
        output = process.communicate(timeout=seconds)[0]
        assert self.others(process) == []
        return process.returncode, output

    def others(self, process):
        sys.path.insert(0, str(Path(__file__).parents[1] / "chaos"))
        from chaos_processes import session

        return [pid for pid in session(process.pid) if pid != process.pid]

    def rank_1(self, process):
        [rank] = [
            pid for pid in self.others(process)
            if b"toolmem" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]  # fmt: skip
        return rank


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    ddp = Ddp(tmp_path_factory.mktemp("ddp"))
    yield ddp
    for process in ddp.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


linux = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks into /proc")


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_ranks_end_at_the_same_step(ddp):
    """Whichever of them gets the signal; a second start goes on, and Ctrl-C of a terminal meets all."""
    process = ddp.start("run")
    os.kill(ddp.rank_1(process), signal.SIGUSR1)
    code, output = ddp.end(process)
    assert code == 75, output
    step = checkpoints.read(ddp.folder / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert f"ended by SIGUSR1 after step {step}" in output
    process = ddp.start("run")
    os.killpg(process.pid, signal.SIGINT)
    code, output = ddp.end(process)
    assert code == 130, output
    assert output.count("Ctrl-C again ends at once") == 1
    later = checkpoints.read(ddp.folder / "run" / "checkpoints" / "last.ckpt")["global_step"]
    assert later > step
    assert "Traceback" not in output


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_ctrl_c_ends_at_once(ddp):
    process = ddp.start("twice")
    os.kill(ddp.rank_1(process), signal.SIGSTOP)  # so that the first waits, and cannot end its step
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(10) == 130
    until = time.monotonic() + 10
    while ddp.others(process):
        assert time.monotonic() < until
        time.sleep(0.05)


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rank_that_is_killed_ends_all(ddp):
    process = ddp.start("killed")
    os.kill(ddp.rank_1(process), signal.SIGKILL)
    code, output = ddp.end(process)
    assert code == 1
    assert "toolmem fit: rank 1 was killed by SIGKILL (out of memory?), and all end" in output
    assert "Traceback" not in output


@linux
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_ends_all_with_its_own_error(rank, ddp):
    callbacks = f"[{{class_path: my_failure.FailsIn, init_args: {{rank: {rank}}}}}]"
    words = ["--trainer.callbacks", callbacks, "--allow_packages", "my_failure"]
    process = ddp.start(f"fails_{rank}", *words, trains=False)
    code, output = ddp.end(process, 300)
    assert code == 1
    assert output.count("Traceback (most recent call last)") == 1, output
    assert "ArithmeticError: the sum is wrong here" in output
    assert "closed by peer" not in output
    if rank == 1:
        assert "toolmem fit: rank 1 failed, and with it all: ArithmeticError: the sum" in output
