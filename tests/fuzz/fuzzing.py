"""Drives the fuzz targets: each in its own process under a limit of memory, each example under one of time.

    python tests/fuzz/fuzzing.py [--seconds 600] [--target NAME ...] [--seed N] [--json FILE]

The seconds are shared out evenly. An exception that is not the user's to mend, a crash, an example of more
than ``EXAMPLE_S`` seconds or more than ``MEMORY_BYTES`` is a failure; it is printed with the example, as
small as hypothesis can make it, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXAMPLE_S = 30
MEMORY_BYTES = 2 << 30  # beyond what the process has when it begins
ROUND = 100  # examples between two looks at the clock


def run_one(name: str, seconds: float, seed: int) -> int:
    """Examples of one target until the time is over; how many they were."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    sys.path.insert(0, str(HERE))
    from fuzz_targets import TARGETS

    strategy, check = TARGETS[name]
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    count = 0

    def one(example: object) -> None:
        nonlocal count
        count += 1
        faulthandler.dump_traceback_later(EXAMPLE_S, exit=True)
        try:
            check(example)
        finally:
            faulthandler.cancel_dump_traceback_later()

    with contextlib.suppress(Exception):
        # what is imported or opened late changes what hypothesis draws, and what memory is in use
        first = settings(max_examples=1, database=None, deadline=None, phases=[Phase.generate])
        first(given(strategy)(one))()
    count = 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    end = time.monotonic() + seconds
    round_ = 0
    while time.monotonic() < end:
        settled = settings(
            max_examples=ROUND if seconds > 5 else 10,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        seeded(seed * 1_000_003 + round_)(settled(given(strategy)(one)))()
        round_ += 1
    return count


def run_apart(name: str, seconds: float, seed: int) -> dict[str, object]:
    """A target, or several with commas between, in a process of their own."""
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
    ]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"FUZZ_FOLDER": folder, "PYTHONHASHSEED": "0"}
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace",
                timeout=seconds + 300, check=False,
            )  # fmt: skip
            code, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            code, out, err = -1, "", f"hung: {late}"
    good = code == 0
    examples = sum(json.loads(line)["examples"] for line in out.splitlines()) if good else None
    return {
        "target": name,
        "ok": good,
        "examples": examples,
        "seconds": round(time.monotonic() - began, 1),
        "exit": code,
        "error": "" if good else err[-6000:],
    }


def main() -> int:
    """Entry."""
    sys.path.insert(0, str(HERE))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0, help="for all targets together")
    parser.add_argument("--target", action="append", help="only these")
    parser.add_argument(
        "--seed", type=int, default=None, help="of the examples; the time when left out"
    )
    parser.add_argument("--json", metavar="FILE", help="write what was found there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    if options.one:
        several = options.one.split(",")
        for name in several:
            print(f"{name} ...", file=sys.stderr, flush=True)
            count = run_one(name, options.seconds / len(several), seed)
            print(json.dumps({"target": name, "examples": count}), flush=True)
        return 0
    from fuzz_targets import TARGETS

    names = options.target or list(TARGETS)
    found = []
    for name in names:
        one = run_apart(name, options.seconds / len(names), seed)
        found.append(one)
        state = f"{one['examples']:,} examples" if one["ok"] else f"FAILED (exit {one['exit']})"
        print(f"{name:<14} {state}, {one['seconds']} s", flush=True)
        if not one["ok"]:
            print(one["error"], flush=True)
    print(f"seed {seed}")
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(one["ok"] for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
