"""The Makefile refuses a Python that toolmem cannot run on, in a plain sentence, and leaves nothing; it runs
every benchmark.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def interpreter(folder: Path, version: tuple[int, int]) -> Path:
    """A Python that says it is of this version, and is this one in all else."""
    path = folder / "python"
    path.write_text(
        "#!/bin/bash\n"
        f'if [ "$1" = -V ]; then echo "Python {version[0]}.{version[1]}.0"; exit; fi\n'
        f'[ "$1" = -c ] || {{ echo "would run: $*"; exit 1; }}\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = {(*version, 0)}; ${{2#import sys; }}"\n'
    )
    path.chmod(0o755)
    return path


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "-C", ROOT, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("version", [(3, 9), (3, 10), (3, 14)])
@pytest.mark.parametrize("goal", ["demo", "test"])
def test_another_python_is_refused(goal, version, tmp_path):
    python = interpreter(tmp_path, version)
    made = make(goal, f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert made.returncode == 2
    wanted = f"toolmem needs Python 3.11, 3.12 or 3.13; {python} is Python 3.{version[1]}.0. "
    assert f"{wanted}Name another: make {goal} PYTHON=" in made.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("version", [(3, 11), (3, 12), (3, 13)])
def test_a_python_that_will_do_is_taken(version, tmp_path):
    python = interpreter(tmp_path, version)
    made = make("demo", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}")
    assert "would run: -m venv" in made.stdout
    assert "toolmem needs" not in made.stderr


def test_no_python_at_all(tmp_path):
    made = make("demo", "PYTHON=", f"VENV={tmp_path / 'venv'}")
    assert made.returncode == 2
    assert "toolmem needs Python 3.11, 3.12 or 3.13, and none is on the PATH" in made.stderr
    assert "make demo PYTHON=" in made.stderr
    assert not (tmp_path / "venv").exists()


def test_every_benchmark_is_run_once(tmp_path):
    """Each script that takes the options of a benchmark, by itself or as a part of architectures.py."""
    printed = make("--dry-run", "bench", f"VENV={tmp_path / 'venv'}").stdout
    line = next(line for line in printed.splitlines() if line.startswith("for script in"))
    named = line.removeprefix("for script in").partition(";")[0].split()
    scripts = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    parts = re.search(r"^PARTS = \((.*)\)$", scripts["architectures"], re.MULTILINE)
    assert parts is not None
    run = [Path(name).stem for name in named] + re.findall(r'"(\w+)"', parts[1])
    assert {"data", "train", "architectures", "measure_rnn"} <= set(run)
    takes_options = re.compile(r"^from command import .*\barguments\b", re.MULTILINE)
    takers = [name for name, text in scripts.items() if takes_options.search(text)]
    assert sorted(run) == sorted(takers)
