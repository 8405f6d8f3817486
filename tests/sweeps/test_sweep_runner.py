"""The runner, with an executor that is told when a run has ended."""

from __future__ import annotations

import time

import pytest
from sweep_toys import row, sweep_with

from toolmem.files import write_json
from toolmem.sweeps import SweepRecipe, SweepRunner
from toolmem.sweeps.folder import SweepFolder
from toolmem.sweeps.plans import make_plan


class Recorder:
    """An executor of some places, in which the run that came first ends first."""

    def __init__(self, folder, places, ahead, value=lambda settings: 1.0):
        self.folder, self.n, self.ahead, self.value = folder, places, ahead, value
        self.jobs, self.batches, self.given_back, self.closed = [], [], [], False

    def open(self, wanted, lock):
        self.opened = [job.run.name for job in wanted]

    def free(self):
        return self.n - len(self.jobs)

    def submit(self, jobs):
        assert 0 < len(jobs) <= self.free()
        self.batches.append([(job.run.name, job.ahead) for job in jobs])
        self.jobs += jobs

    def busy(self):
        return {job.run.name for job in self.jobs}

    def running(self):
        return {job.run.name: time.monotonic() for job in self.jobs[:1]}

    def places(self):
        return 1

    def wait(self, timeout):
        run = self.jobs.pop(0).run
        if self.given_back:
            self.given_back.pop()
            return [run.name]
        result = row(run.name, run.settings, **{"val/loss": self.value(run.settings)})
        result |= {"steps": 4, "finished": "2026", "stopped": None}
        write_json(self.folder.runs / run.name / "result.json", result)
        return [run.name]

    def note(self):
        return "noted"

    def close(self):
        self.closed = True

    def left(self):
        return ""


def run(tmp_path, recipe, **options):
    folder = SweepFolder(tmp_path / "out")
    executor = Recorder(folder, **options)
    states = []
    with folder.locked() as lock:
        runner = SweepRunner(recipe, make_plan(recipe), folder)
        runner.take_stock()
        runner.run(executor, lock, lambda state: states.append((state.done, state.note)))
    return executor, runner, states


def test_all_that_is_wanted_is_handed_over_at_once(tmp_path):
    recipe = SweepRecipe.parse(sweep_with(report=None), "toy")
    executor, runner, states = run(tmp_path, recipe, places=10, ahead=False)
    [batch] = executor.batches
    assert [name for name, _ in batch] == executor.opened
    assert len(batch) == runner.state.done == len(runner.folder.results.rows()) == 4
    assert executor.closed
    assert states[-1] == (4, "noted")
    assert runner.state.running == {}


def test_no_more_than_there_are_places(tmp_path):
    recipe = SweepRecipe.parse(sweep_with(report=None), "toy")
    executor, _, _ = run(tmp_path, recipe, places=3, ahead=False)
    assert list(map(len, executor.batches)) == [3, 1]


def test_a_run_that_is_given_back_is_handed_over_again(tmp_path):
    recipe = SweepRecipe.parse(sweep_with(report=None), "toy")
    folder = SweepFolder(tmp_path / "out")
    executor = Recorder(folder, places=4, ahead=False)
    executor.given_back = [True]
    with folder.locked() as lock:
        runner = SweepRunner(recipe, make_plan(recipe), folder)
        runner.take_stock()
        runner.run(executor, lock, lambda state: None)
    first = executor.batches[0][0]
    assert executor.batches[1:] == [[first]]
    assert runner.state.done == 4


@pytest.mark.parametrize("ahead", [True, False])
def test_tries_that_may_not_be_needed_are_for_whoever_wants_them(tmp_path, ahead):
    search = {
        "family": {"key": "model.model.dim", "values": [4, 8, 12, 16]},
        "metric": "val/loss", "reach": 10.0,
    }  # fmt: skip
    written = sweep_with(axes={"rows": {"key": "data.batch_size", "values": [4]}}, report=None)
    recipe = SweepRecipe.parse(written | {"search": search}, "toy")
    executor, runner, _ = run(
        tmp_path, recipe, places=10, ahead=ahead, value=lambda settings: settings["member"]
    )
    assert any(flag for batch in executor.batches for _, flag in batch) == ahead
    [answer] = runner.folder.results.rows(table="searches")
    assert (answer["status"], answer["member"]) == ("found", "12")
