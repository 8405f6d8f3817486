"""Kills one training run again and again with SIGKILL, at random moments, and compares its end.

    python tests/chaos/run.py --kills 20 --case facts_in_tool --json result.json

The run is trained once in peace, then once more with kills. A kill meets the whole process group, or
the process that started the others, or one of those that it started, by chance: what was not killed
must end by itself. After the last kill the run is left to finish. Final weights, optimizer state, every
row of metrics (columns of wall-clock time aside) and every file of samples and evaluations must be the
same bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))

from chaos_cases import CASES
from chaos_processes import session

CLOCK = ("throughput/",)  # columns of wall-clock time
ALL_END_S = 60.0  # within which whatever a kill left must have ended
LIMIT_S = 1800.0  # of one process


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def wait_for(what: Callable[[], Any], process: subprocess.Popen, seconds: float = LIMIT_S) -> bool:
    """Whether it came before the process ended."""
    until = time.monotonic() + seconds
    while not what():
        if process.poll() is not None:
            return False
        if time.monotonic() > until:
            raise SystemExit(f"nothing came within {seconds:.0f} s")
        time.sleep(0.005)
    return True


class Forked:
    """A process forked off this one, which has imported everything, as ``subprocess.Popen`` has it."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for descriptor, file in (
                (0, os.open(os.devnull, os.O_RDONLY)),
                (1, output),
                (2, output),
            ):
                os.dup2(file, descriptor)
            code = 70
            try:
                from toolmem.cli import main

                # what Lightning starts other ranks by
                sys.argv = [str(Path(sys.executable).parent / "toolmem"), *words]
                code = main(words)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60.0) -> int:
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise SystemExit(f"process {self.pid} does not end")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


class Run:
    """The command that trains, goes on, or has nothing left to do.

    Args:
        folder: of the recipe and of all runs.
        name: of the run.
        warm: fork processes instead of starting them.
    """

    def __init__(self, folder: Path, name: str, warm: bool = False) -> None:
        self.warm = warm
        self.path = folder / "runs" / name
        self.log = folder / f"{name}.log"
        self.command = [
            sys.executable, "-m", "toolmem", "fit", "--config", str(folder / "recipe.yaml"),
            "--runs", str(folder / "runs"), "--name", name, "--resume", "auto",
        ]  # fmt: skip
        self._config: Any = None

    def start(self) -> subprocess.Popen:
        """In a session of its own, so that whatever it leaves is found."""
        self._config = self._mark()
        if self.warm:
            return Forked(self.command[3:], self.log)  # type: ignore[return-value]
        with open(self.log, "ab") as stream:
            return subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT,
                start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def _mark(self) -> Any:
        try:
            found = (self.path / "config.yaml").stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns

    def trains(self) -> bool:
        """Has training begun? Its config is written then."""
        return self._mark() != self._config

    def answers(self) -> int:
        """Bytes of answers to questions so far."""
        return sum(path.stat().st_size for path in self.path.glob("evaluations/*.jsonl"))

    def step(self) -> int:
        """Of the last row of metrics."""
        rows = read_rows(self.path)
        return int(rows[-1]["step"]) if rows else 0

    def finish(self) -> float:
        """Let it go on to its end; the seconds that training took."""
        process = self.start()
        wait_for(self.trains, process)
        began = time.monotonic()
        if process.wait(LIMIT_S):
            raise SystemExit(f"the run ended with exit code {process.returncode}: see {self.log}")
        return time.monotonic() - began


# ---- kills


class Killer:
    """Starts a run and kills it.

    Args:
        run: which.
        draw: of moments and victims.
        startup_s: that a start takes before it trains.
    """

    def __init__(self, run: Run, draw: random.Random, startup_s: float) -> None:
        self.run = run
        self.draw = draw
        self.startup_s = startup_s
        self.victims: Counter[str] = Counter()
        self.moments: Counter[str] = Counter()
        self.orphans = 0
        self.slowest_end_s = 0.0

    def kill_once(self, window_s: float) -> bool:
        """Kill it within so many seconds of training; False when it was over before."""
        process = self.run.start()
        moment = self.draw.choices(["training", "questions", "start"], [5, 4, 1])[0]
        if moment == "start":
            time.sleep(self.draw.uniform(0, self.startup_s))
        elif not wait_for(self.run.trains, process):
            return False
        if moment == "questions":
            before = self.run.answers()
            moment = "training"
            if (self.run.path / "evaluations").is_dir():
                if not wait_for(lambda: self.run.answers() != before, process):
                    return False
                moment = "questions"
                time.sleep(self.draw.uniform(0, 0.2))
        if moment == "training":
            time.sleep(self.draw.uniform(0, window_s))
        if process.poll() is not None:
            return False
        self._kill(process)
        self.moments[moment] += 1
        return True

    def _kill(self, process: subprocess.Popen) -> None:
        others = [pid for pid in session(process.pid) if pid != process.pid]
        victim = self.draw.choice(["group", "group", "parent", "child"])
        if victim == "child" and not others:
            victim = "parent"
        self.victims[victim] += 1
        if victim == "group":
            os.killpg(process.pid, signal.SIGKILL)
        elif victim == "parent":
            os.kill(process.pid, signal.SIGKILL)
        else:
            os.kill(self.draw.choice(others), signal.SIGKILL)
        began = time.monotonic()
        left: list[int] = []
        while time.monotonic() < began + ALL_END_S:
            process.poll()
            if not (left := session(process.pid)):
                break
            time.sleep(0.02)
        self.slowest_end_s = max(self.slowest_end_s, time.monotonic() - began)
        self.orphans += len(left)
        for pid in left:
            log(f"still there after {ALL_END_S:.0f} s: {pid}")
            os.kill(pid, signal.SIGKILL)
        process.wait()


# ---- comparison


def read_rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics, columns of wall-clock time left out, and rows of nothing else."""
    path = run / "metrics.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as stream:
        rows = [
            {name: value for name, value in row.items() if value and not name.startswith(CLOCK)}
            for row in csv.DictReader(stream)
        ]
    return [row for row in rows if len(row) > 1]


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, tensors and plain data within plain data."""
    import torch

    if isinstance(first, torch.Tensor):
        return (
            isinstance(second, torch.Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            and first.numpy().tobytes() == second.numpy().tobytes()
        )
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or (first != first and second != second)


def compare(expected: Path, found: Path) -> dict[str, Any]:
    """What differs between two runs."""
    from toolmem import checkpoints

    before, after = (checkpoints.read(checkpoints.resolve(path)) for path in (expected, found))
    names = ("global_step", "state_dict", "optimizer_states", "lr_schedulers")
    differing = [name for name in names if not same(before[name], after[name])]
    wanted, got = read_rows(expected), read_rows(found)
    steps = Counter(row["step"] for row in got)
    by_step = {row["step"]: row for row in got}
    files = []
    for folder in ("samples", "evaluations"):
        files += sorted(path.relative_to(expected) for path in (expected / folder).glob("*"))
        files += sorted(path.relative_to(found) for path in (found / folder).glob("*"))
    return {
        "differing": differing,
        "rows": len(wanted),
        "rows_lost": sum(row["step"] not in steps for row in wanted),
        "rows_twice": sum(count - 1 for count in steps.values()),
        "rows_changed": sum(by_step.get(row["step"], row) != row for row in wanted),
        "rows_added": len(set(steps) - {row["step"] for row in wanted}),
        "files_differing": sorted(
            {str(name) for name in files if not same_file(expected / name, found / name)}
        ),
        "leftovers": sorted(str(path.relative_to(found)) for path in found.rglob("*.part")),
    }


def same_file(first: Path, second: Path) -> bool:
    return first.is_file() and second.is_file() and first.read_bytes() == second.read_bytes()


def chaos(
    case: str, kills: int, seed: int, steps: int, folder: Path, warm: bool = False
) -> dict[str, Any]:
    """Train in peace, train with kills, compare."""
    folder.mkdir(parents=True, exist_ok=True)
    config = CASES[case](folder, steps)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    whole, killed = Run(folder, "whole", warm), Run(folder, "killed", warm)
    began = time.monotonic()
    seconds = whole.finish()
    startup_s = time.monotonic() - began - seconds
    log(f"{case}: {seconds:.1f} s of training in peace, {startup_s:.1f} s of start")
    killer = Killer(killed, random.Random(f"{case} {seed}"), startup_s)
    for done in range(kills):
        left_s = seconds * (1 - killed.step() / steps)
        window_s = 1.6 * left_s / (kills - done + 1)
        if not killer.kill_once(window_s):
            raise SystemExit(
                f"the run was over, or had failed, after {done} of {kills} kills: see {killed.log}, or "
                "take more --steps"
            )
        log(f"{case}: killed {done + 1} times, at step {killed.step()} or after")
    killed.finish()
    differences = compare(whole.path, killed.path)
    return {
        "case": case,
        "kills": kills,
        "seed": seed,
        "steps": steps,
        "bit_identical": not any(
            differences[name]
            for name in ("differing", "rows_changed", "rows_lost", "rows_twice", "rows_added")
        )
        and not differences["files_differing"],
        **differences,
        "victims": dict(killer.victims),
        "moments": dict(killer.moments),
        "orphans": killer.orphans,
        "slowest_end_s": round(killer.slowest_end_s, 1),
        "peaceful_s": round(seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--case", choices=sorted(CASES), required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    parser.add_argument("--steps", type=int, default=None, help="of the run (default: 200 a kill)")
    parser.add_argument("--folder", type=Path, default=None, help="kept (default: one that is not)")
    parser.add_argument("--json", type=Path, default=None, help="the file to write")
    parser.add_argument(
        "--warm", action="store_true",
        help="fork each first process off this one, which has imported everything",
    )  # fmt: skip
    options = parser.parse_args()
    if options.warm:
        import toolmem.cli.fit
        import toolmem.data.modules
        import toolmem.models  # noqa: F401
    steps = options.steps or 200 * max(options.kills, 1)
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        folder = options.folder or Path(temporary)
        result = chaos(options.case, options.kills, options.seed, steps, folder, options.warm)
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if options.json is not None:
        options.json.write_text(text)
    return 0 if result["bit_identical"] and not result["orphans"] else 1


if __name__ == "__main__":
    sys.exit(main())
