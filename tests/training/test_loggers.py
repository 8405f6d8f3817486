import csv
import errno

import pytest
from training_toys import ToyData, make_module, make_trainer

from toolmem.errors import ToolmemError
from toolmem.training import Checkpointing, CSVLogger
from toolmem.training.loggers import read_rows, tensorboard_logger


def table(folder):
    with open(folder / "metrics.csv", newline="") as stream:
        return list(csv.reader(stream))


def test_metrics_of_one_step_share_a_row(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, 10)
    logger.log_metrics({"b": 2}, 10)
    logger.log_metrics({"a": 3.5}, 20)
    logger.log_metrics({"a": 4.0, "b": 5}, 20)
    assert table(tmp_path) == [["step", "a", "b"], ["10", "1", "2"], ["20", "4", "5"]]


def test_each_write_is_on_disk_at_once_and_a_new_column_may_come_late(tmp_path):
    logger = CSVLogger(tmp_path)
    for step in range(1, 6):
        logger.log_metrics({"loss": 1 / step}, step)
        assert len(table(tmp_path)) == step + 1
    logger.log_metrics({"recall, exact": 0.25}, 5)
    logger.log_metrics({"loss": 0.125, "recall, exact": 0.5}, 6)
    found = table(tmp_path)
    assert found[0] == ["step", "loss", "recall, exact"]
    assert found[1] == ["1", "1", ""]
    assert found[5:] == [["5", "0.2", "0.25"], ["6", "0.125", "0.5"]]


def test_a_shorter_row_leaves_nothing_behind(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 0.12345678}, 1)
    logger.log_metrics({"a": 1.0}, 1)
    assert (tmp_path / "metrics.csv").read_text() == "step,a\n1,1\n"


def test_rewinding_drops_what_came_after_and_goes_on_in_the_row_of_the_step(tmp_path):
    first = CSVLogger(tmp_path)
    for step in (10, 20, 30):
        first.log_metrics({"a": step, "b": step}, step)
    second = CSVLogger(tmp_path)
    second.rewind(20)
    second.log_metrics({"c": 7}, 20)
    second.log_metrics({"a": 31}, 30)
    assert table(tmp_path) == [
        ["step", "a", "b", "c"],
        ["10", "10", "10", ""],
        ["20", "20", "20", "7"],
        ["30", "31", "", ""],
    ]


def test_a_new_run_begins_anew(tmp_path):
    CSVLogger(tmp_path).log_metrics({"a": 1}, 10)
    logger = CSVLogger(tmp_path)
    logger.rewind(0)
    logger.log_metrics({"b": 2}, 5)
    assert table(tmp_path) == [["step", "b"], ["5", "2"]]


def test_a_line_that_a_killed_process_left_unfinished_does_not_count(tmp_path):
    CSVLogger(tmp_path).log_metrics({"a": 1, "b": 2}, 10)
    with open(tmp_path / "metrics.csv", "a") as stream:
        stream.write("20,3")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["10"]
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 4}, 20)
    assert table(tmp_path) == [["step", "a", "b"], ["10", "1", "2"], ["20", "4", ""]]


def test_a_foreign_file_is_not_overwritten(tmp_path):
    (tmp_path / "metrics.csv").write_text("name,age\nAnn,3\n")
    with pytest.raises(ToolmemError, match="no file of metrics"):
        CSVLogger(tmp_path).log_metrics({"a": 1}, 1)
    assert (tmp_path / "metrics.csv").read_text() == "name,age\nAnn,3\n"


def test_a_full_disk_is_a_plain_message(tmp_path, monkeypatch):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1}, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(ToolmemError, match="disk is full"):
        logger.log_metrics({"a": 2}, 2)


def test_only_rank_zero_writes(tmp_path, monkeypatch):
    from lightning.pytorch.utilities import rank_zero_only

    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = CSVLogger(tmp_path)
    logger.rewind(0)
    logger.log_metrics({"a": 1}, 1)
    assert not (tmp_path / "metrics.csv").exists()


def fit(folder, logger, max_steps, resume=None):
    keep = Checkpointing(every_n_steps=2, monitor=None)
    trainer = make_trainer(
        folder, 4, logger=[logger], log_every_n_steps=2, enable_checkpointing=True,
        callbacks=[keep], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    trainer.fit(make_module(), ToyData(), ckpt_path=resume)


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator as accumulator

    fit(tmp_path, tensorboard_logger(tmp_path), 2)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    saved = checkpoint.read_bytes()
    fit(tmp_path, tensorboard_logger(tmp_path, checkpoint=checkpoint), 4, checkpoint)
    checkpoint.write_bytes(saved)  # as if the run had been killed before it saved again
    fit(tmp_path, tensorboard_logger(tmp_path, checkpoint=checkpoint), 4, checkpoint)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4]
