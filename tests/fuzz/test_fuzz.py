"""Half a minute of `make fuzz`, and that its driver sees what it is there to see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz_targets
import fuzzing
import pytest

HERE = Path(fuzzing.__file__).resolve()
SECONDS = 30


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mutated_input_ends_in_plain_messages():
    """Every target for its share of half a minute, in one process under a limit of memory."""
    found = fuzzing.run_apart(",".join(fuzz_targets.TARGETS), SECONDS, seed=0)
    assert found["ok"], found["error"]
    assert found["examples"] >= 10 * len(fuzz_targets.TARGETS)


BAD = {
    "error": "raise KeyError(example)",
    "crash": "import os; os.kill(os.getpid(), 11)",
    "hang": "import time; time.sleep(60)",
    "memory": "import mmap; mmap.mmap(-1, 3 << 30)",
}


@pytest.mark.parametrize("kind", BAD)
def test_the_driver_sees_what_is_wrong(kind, tmp_path):
    (tmp_path / "fuzz_targets.py").write_text(
        "from hypothesis import strategies as st\n"
        f"def check(example):\n    {BAD[kind]}\n"
        "TARGETS = {'bad': (st.integers(1, 2), check)}\n"
    )
    patience = "EXAMPLE_S = 2" if kind == "hang" else "EXAMPLE_S = 30"
    source = HERE.read_text().replace("EXAMPLE_S = 30", patience)
    (tmp_path / "fuzzing.py").write_text(source)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "fuzzing.py"), "--seconds", "1", "--seed", "1"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "bad            FAILED" in done.stdout
    words = {
        "error": "KeyError",
        "crash": "exit -11",
        "hang": "Timeout",
        "memory": "Cannot allocate memory",
    }
    assert words[kind] in done.stdout


def test_every_place_of_plain_data_can_be_changed():
    value = {"a": [1, {"b": 2}], "c": {}}
    places = fuzz_targets.places_of(value)
    assert places == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    assert fuzz_targets.edited(value, [(3, "new", False)]) == {"a": [1, {"b": "new"}], "c": {}}
    assert fuzz_targets.edited(value, [(0, None, True)]) == {"c": {}}
    assert value == {"a": [1, {"b": 2}], "c": {}}
    assert fuzz_targets.mutated(b"abc", [("set", 1, b"XY", 1), ("cut", 2, b"x", 1)]) == b"aX"
