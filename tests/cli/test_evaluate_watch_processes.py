"""A run that trains, and processes that watch it: killed without warning, started again, each step once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from cli_toys import changed, write_config

from toolmem.evaluation.answers import read_answers
from toolmem.evaluation.curves import read_points

STEPS = [10, 20, 30, 40]


@pytest.mark.slow
def test_a_run_is_watched_while_it_trains_by_processes_that_are_killed(tmp_path):
    task = tmp_path / "cloze.jsonl"
    rows = [{"context": f"Say {n}", "continuation": "it now"} for n in range(400)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = changed(
        trainer__max_steps=STEPS[-1],
        checkpointing__every_n_steps=10,
        checkpointing__keep_every_n_steps=10,
    )
    recipe = write_config(tmp_path / "recipe.yaml", config)
    run = tmp_path / "runs" / "watched"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "toolmem"]
    fit = [*command, "fit", "--config", str(recipe), "--runs", str(run.parent), "--name", run.name]
    watch = [*command, "evaluate", "--watch", str(run), "--tasks", f"words={task}"]
    watch += ["--every", "0.2", "--batch_size", "8"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    watcher = subprocess.Popen(watch, **quiet)
    training = subprocess.Popen(fit, **quiet)
    killed = 0
    try:
        deadline = time.monotonic() + 250
        while killed < 2:
            assert time.monotonic() < deadline
            found = list(run.glob("evaluations/*.words.answers.jsonl"))
            done = {path.name.partition(".")[0] for path in run.glob("evaluations/*.json")}
            begun = [path for path in found if path.name.partition(".")[0] not in done]
            if begun and begun[0].stat().st_size > 2000:
                watcher.send_signal(signal.SIGKILL)
                watcher.wait()
                killed += 1
                watcher = subprocess.Popen(watch, **quiet)
                time.sleep(1)
            time.sleep(0.01)
            if watcher.poll() is not None:  # too quick for us
                break
        assert training.wait(timeout=max(1.0, deadline - time.monotonic())) == 0
        assert watcher.wait(timeout=max(1.0, deadline - time.monotonic())) == 0
    finally:
        for process in (watcher, training):
            process.kill()
            process.wait()
    assert killed
    points = read_points(run)
    assert list(points) == STEPS
    for step in STEPS:
        about, answers = read_answers(run / "evaluations" / f"{step}.words.answers.jsonl")
        assert about["step"] == step
        assert sorted(row["line"] for row in answers) == list(range(1, 401))
    alone = subprocess.run(
        [*watch, "--once", "true"], capture_output=True, text=True, env=environment
    )
    assert alone.returncode == 0
    assert "step" not in alone.stdout  # nothing is left to evaluate
