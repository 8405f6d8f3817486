import contextlib
import errno
import resource
import time

import lightning.pytorch as pl
import pytest
from training_toys import ToyData, make_module, make_trainer

from toolmem import checkpoints
from toolmem.checkpoints import tensor_files
from toolmem.errors import ToolmemError
from toolmem.training import Checkpointing


def fit(folder, keep, max_steps=10, **options):
    trainer = make_trainer(
        folder, max_steps, callbacks=[keep], enable_checkpointing=True, **options
    )
    module = make_module()
    trainer.fit(module, ToyData())
    return module


def steps(folder):
    return {
        file.name: checkpoints.read_state(file)["global_step"]
        for file in (folder / "checkpoints").iterdir()
    }


def test_last_and_kept(tmp_path):
    fit(tmp_path, Checkpointing(every_n_steps=4, keep_every_n_steps=3))
    assert steps(tmp_path) == {
        "last.ckpt": 10,
        "last-1.ckpt": 8,
        "step_3.ckpt": 3,
        "step_6.ckpt": 6,
        "step_9.ckpt": 9,
    }


def test_best_follows_the_monitored_metric(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, float("nan"), 2.0, 1.0])
    keep = Checkpointing(every_n_steps=100)
    module_report = "toolmem.training.module.LanguageModelModule.report"
    from toolmem.training import LanguageModelModule

    original = LanguageModelModule.report

    def report(self, metrics):
        if "val/loss" in metrics:
            metrics = {"val/loss": next(values)}
        original(self, metrics)

    monkeypatch.setattr(module_report, report)
    fit(tmp_path, keep, val_check_interval=2)
    assert steps(tmp_path) == {"last.ckpt": 10, "best.ckpt": 4}
    assert (keep.best, keep.best_step) == (1.0, 4)


def test_the_largest_may_be_the_best_and_be_reported_by_a_callback(tmp_path):
    class Probe(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            values = {2: 0.5, 5: 0.9, 8: 0.7}
            if trainer.global_step in values:
                pl_module.report({"recall/exact_match": values[trainer.global_step]})

    keep = Checkpointing(monitor="recall/exact_match", mode="max")
    trainer = make_trainer(tmp_path, 10, callbacks=[keep, Probe()], enable_checkpointing=True)
    trainer.fit(make_module(), ToyData())
    assert steps(tmp_path) == {"last.ckpt": 10, "best.ckpt": 5}


def test_files_of_one_step_agree_on_the_best(tmp_path):
    """last.ckpt is written before validation finds a new best at the same step."""
    fit(tmp_path, Checkpointing(every_n_steps=10), val_check_interval=10)
    contents = {f.name: f.read_bytes() for f in (tmp_path / "checkpoints").iterdir()}
    assert contents["last.ckpt"] == contents["best.ckpt"]
    state = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["callbacks"]
    assert state["Checkpointing"]["best_step"] == 10


def test_accumulation_saves_once_a_step(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        pl.Trainer, "save_checkpoint", lambda self, path, **k: saved.append(path.name)
    )
    fit(tmp_path, Checkpointing(every_n_steps=1), 3, accumulate_grad_batches=4)
    assert saved == ["last.ckpt"] * 3


def break_writing(monkeypatch, fail):
    """Let writing raise as a full disk does, after half of the file, whenever ``fail()``."""
    original = tensor_files.write

    def write(path, tensors, metadata):
        if not fail():
            return original(path, tensors, metadata)
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "write", write)


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_stays_full_leaves_the_old_file_whole(tmp_path, monkeypatch, background):
    fit(tmp_path, Checkpointing())
    file = tmp_path / "checkpoints" / "last.ckpt"
    before = file.read_bytes()
    break_writing(monkeypatch, lambda: True)
    with (
        pytest.warns(RuntimeWarning, match=r"not written: .*last\.ckpt: the disk is full.*goes on"),
        pytest.raises(ToolmemError, match="disk is full"),
    ):
        fit(tmp_path, Checkpointing(every_n_steps=3, background=background))
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_for_a_while(tmp_path, monkeypatch, background):
    """Training goes on; what comes after is written."""
    saves = iter(range(100))
    break_writing(monkeypatch, lambda: next(saves) in (1, 2))
    with pytest.warns(RuntimeWarning, match="the disk is full") as warned:
        fit(tmp_path, Checkpointing(every_n_steps=2, keep_last=3, background=background))
    assert len([w for w in warned if "disk is full" in str(w.message)]) == 2
    assert steps(tmp_path) == {"last.ckpt": 10, "last-1.ckpt": 8, "last-2.ckpt": 2}


@pytest.mark.parametrize("background", [False, True])
def test_a_limit_that_the_system_sets(tmp_path, background):
    """A real refusal in the middle of a file, not one of ours."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limit(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            small = 3 <= trainer.global_step < 6
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if small else soft, hard))

    keep = Checkpointing(every_n_steps=2, background=background)
    trainer = make_trainer(tmp_path, 10, callbacks=[Limit(), keep], enable_checkpointing=True)
    try:
        with pytest.warns(RuntimeWarning, match=r"last\.ckpt: File too large"):
            trainer.fit(make_module(), ToyData())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps(tmp_path) == {"last.ckpt": 10, "last-1.ckpt": 8}
    for path in (tmp_path / "checkpoints").iterdir():
        checkpoints.check(path)


@pytest.mark.parametrize("background", [False, True])
def test_a_last_save_that_failed_is_tried_again_at_the_end(tmp_path, monkeypatch, background):
    saves = iter(range(100))
    break_writing(monkeypatch, lambda: next(saves) == 1)
    with pytest.warns(RuntimeWarning, match="the disk is full"):
        fit(tmp_path, Checkpointing(every_n_steps=5, background=background))
    assert steps(tmp_path) == {"last.ckpt": 10, "last-1.ckpt": 5}


def test_in_the_background_the_same_is_written(tmp_path):
    """Bit for bit, whatever training did to the weights while they were written."""
    saved = {}
    for background in (False, True):
        folder = tmp_path / str(background)
        keep = Checkpointing(every_n_steps=2, keep_every_n_steps=2, background=background)
        with slow_writing(0.02):
            fit(folder, keep, val_check_interval=5)
        saved[background] = {f.name: f.read_bytes() for f in (folder / "checkpoints").iterdir()}
    assert sorted(saved[True]) == [
        "best.ckpt", "last-1.ckpt", "last.ckpt",
        *sorted(f"step_{n}.ckpt" for n in (2, 4, 6, 8, 10)),
    ]  # fmt: skip
    assert saved[True] == saved[False]


@contextlib.contextmanager
def slow_writing(seconds, log=None):
    original = tensor_files.write

    def write(path, tensors, metadata):
        time.sleep(seconds)
        original(path, tensors, metadata)
        if log is not None:
            log.append(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "write", write)
        yield


class Boom(Exception):
    pass


def test_an_exception_waits_for_what_is_being_written(tmp_path):
    class Raise(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 5:
                raise Boom

    keep = Checkpointing(every_n_steps=4)
    trainer = make_trainer(tmp_path, 10, callbacks=[Raise(), keep], enable_checkpointing=True)
    with slow_writing(0.3), pytest.raises(Boom):
        trainer.fit(make_module(), ToyData())
    assert steps(tmp_path) == {"last.ckpt": 4}


def test_one_that_was_asked_for_is_written_before_anybody_is_told(tmp_path):
    seen = []

    class Ask(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3 and not seen:
                keep.asked = True
                seen.append("asked")
            elif seen == ["asked"] and not keep.asked:
                seen.append(steps(tmp_path))

    keep = Checkpointing(every_n_steps=100)
    trainer = make_trainer(tmp_path, 6, callbacks=[Ask(), keep], enable_checkpointing=True)
    with slow_writing(0.1):
        trainer.fit(make_module(), ToyData())
    assert seen == ["asked", {"last.ckpt": 4}]


@pytest.mark.parametrize("keep_last", [1, 2, 4])
def test_the_last_ones_are_kept(tmp_path, keep_last):
    fit(tmp_path, Checkpointing(every_n_steps=1, keep_last=keep_last))
    expected = {"last.ckpt": 10} | {f"last-{n}.ckpt": 10 - n for n in range(1, keep_last)}
    assert steps(tmp_path) == expected


def test_a_resumed_run_keeps_the_one_it_came_from(tmp_path):
    fit(tmp_path, Checkpointing(every_n_steps=4), 8)
    trainer = make_trainer(
        tmp_path, 11, callbacks=[Checkpointing(every_n_steps=4)], enable_checkpointing=True
    )
    trainer.fit(make_module(), ToyData(), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert steps(tmp_path) == {"last.ckpt": 11, "last-1.ckpt": 8}


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    left = tmp_path / "checkpoints" / ".last.ckpt.abc123.part"
    left.parent.mkdir()
    left.write_bytes(b"half")
    fit(tmp_path, Checkpointing(), 2)
    assert [f.name for f in left.parent.iterdir()] == ["last.ckpt"]


def test_impossible_values_are_refused():
    with pytest.raises(ToolmemError, match="at least 1"):
        Checkpointing(every_n_steps=0)
    with pytest.raises(ToolmemError, match="keep_last is 0"):
        Checkpointing(keep_last=0)
