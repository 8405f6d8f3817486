import errno

import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

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
        file.name: torch.load(file, weights_only=True)["global_step"]
        for file in (folder / "checkpoints").iterdir()
    }


def test_last_and_kept(tmp_path):
    fit(tmp_path, Checkpointing(every_n_steps=4, keep_every_n_steps=3))
    assert steps(tmp_path) == {
        "last.ckpt": 10,
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
    import lightning.pytorch as pl

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
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]
    assert state["Checkpointing"]["best_step"] == 10


def test_accumulation_saves_once_a_step(tmp_path, monkeypatch):
    import lightning.pytorch as pl

    saved = []
    monkeypatch.setattr(
        pl.Trainer, "save_checkpoint", lambda self, path, **k: saved.append(path.name)
    )
    fit(tmp_path, Checkpointing(every_n_steps=1), 3, accumulate_grad_batches=4)
    assert saved == ["last.ckpt"] * 3


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    fit(tmp_path, Checkpointing())
    file = tmp_path / "checkpoints" / "last.ckpt"
    before = file.read_bytes()

    def full(checkpoint, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(ToolmemError, match="disk is full"):
        fit(tmp_path, Checkpointing())
    assert file.read_bytes() == before
    assert [f.name for f in file.parent.iterdir()] == ["last.ckpt"]


def test_impossible_values_are_refused():
    with pytest.raises(ToolmemError, match="at least 1"):
        Checkpointing(every_n_steps=0)
