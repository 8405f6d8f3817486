"""wandb runs, against wandb's own client and files, and a server on this machine."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from training_toys import ToyData, make_module, make_trainer
from wandb_fake import KEY, serving

from toolmem.errors import ToolmemError
from toolmem.evaluation.curves import write_point
from toolmem.training import Checkpointing, CSVLogger
from toolmem.training.loggers import read_rows
from toolmem.training.wandb_files import history
from toolmem.training.wandb_runs import AXIS, Identity, SentRows, numbers, sync, wandb_logger


@pytest.fixture
def client(monkeypatch):
    """wandb's own client, that has seen no settings yet."""
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield wandb
    wandb.teardown()


@pytest.fixture
def server(client, monkeypatch):
    with serving() as found:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield found
        client.teardown()


class Killed(BaseException):
    """As abrupt as it gets within a process."""


def fit(folder, max_steps, resume=None, going_on=False, die_at=None, every=2, **options):
    wandb = wandb_logger(folder, checkpoint=resume, going_on=going_on, **options)
    trainer = make_trainer(
        folder, 12, logger=[CSVLogger(folder), wandb], log_every_n_steps=1, enable_checkpointing=True,
        callbacks=[Checkpointing(every_n_steps=every, monitor=None)], limit_val_batches=0,
    )  # fmt: skip
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    if die_at is not None:
        take = wandb.log_metrics

        def log(metrics, step=None):
            if step == die_at:
                wandb.finalize = lambda status: None  # nor does anything end it
                raise Killed
            take(metrics, step)

        wandb.log_metrics = log
    try:
        trainer.fit(make_module(), ToyData(), ckpt_path=resume)
    except Killed:
        return wandb
    return wandb


def own(row):
    return {name: value for name, value in row.items() if not name.startswith("_")}


def expected(folder):
    return [{**numbers(row), AXIS: int(row["step"])} for row in read_rows(folder / "metrics.csv")]


def same(found, wanted):
    assert [row[AXIS] for row in found] == [row[AXIS] for row in wanted]
    for row, other in zip(found, wanted, strict=True):
        assert own(row) == pytest.approx(other, rel=1e-6)  # metrics.csv has eight digits


LAST = Path("checkpoints") / "last.ckpt"


def test_a_resumed_run_logs_each_step_once_to_the_run_that_it_was_offline(
    tmp_path, client, monkeypatch
):
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = fit(tmp_path, 8, die_at=8, every=5)
    client.teardown()  # a killed process's service ends with it
    second = fit(tmp_path, 12, tmp_path / LAST)
    assert second.version == first.version
    rows = history(tmp_path / "wandb", first.version)
    assert [row["_step"] for row in rows] == list(range(12))
    same(rows, expected(tmp_path))
    assert wandb_logger(tmp_path / "other").version != first.version
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_wandb_s_own_reader_sends_the_same_offline_rows(tmp_path, server, client):
    logger = fit(tmp_path, 3, offline=True)
    assert not server.history and "UpsertBucket" not in server.asked
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)], check=True, capture_output=True
    )
    [(run, rows)] = server.history.items()
    assert run == logger.version
    assert [own(row) for row in rows] == [own(row) for row in history(tmp_path / "wandb", run)]


def test_a_resumed_run_logs_each_step_once_online(tmp_path, server, client):
    first = fit(tmp_path, 8, die_at=8, every=5)
    client.teardown()
    second = fit(tmp_path, 12, tmp_path / LAST)
    [(run, rows)] = server.history.items()
    assert run == first.version == second.version
    same(rows, expected(tmp_path))
    assert [row["_step"] for row in rows] == list(range(12))


@pytest.mark.parametrize("offline", [True, False])
def test_what_goes_on_at_once_finds_all_that_was_logged(offline, tmp_path, server):
    for begin in (1, 100, 200):
        logger = wandb_logger(tmp_path, going_on=True, offline=offline)
        for step in range(1, begin + 110):  # the first ones again
            row = {f"some/long/name/of/a/metric/{n}": step + n for n in range(8)}
            logger.log_metrics(row, step)
        logger.finalize("success")
    rows = history(tmp_path / "wandb", logger.version)
    assert [row[AXIS] for row in rows] == list(range(1, 310))
    if not offline:
        assert [own(row) for row in server.history[logger.version]] == [own(row) for row in rows]


def test_what_did_not_arrive_is_sent_when_the_run_goes_on(tmp_path, server, client):
    fit(tmp_path, 6)
    rows = server.lose(keep=3)  # handed over, and lost on the way
    fit(tmp_path, 9, tmp_path / LAST)
    same(rows, expected(tmp_path))


def test_a_run_killed_before_its_first_checkpoint_begins_no_second_run(tmp_path, server, client):
    fit(tmp_path, 4, die_at=4, every=50)
    client.teardown()
    assert not (tmp_path / LAST).exists()
    fit(tmp_path, 6, going_on=True, every=50)
    [rows] = server.history.values()
    same(rows, expected(tmp_path))
    # a run that starts anew, or from another's checkpoint, is another
    assert wandb_logger(tmp_path).version != Identity.of(tmp_path).id
    fork = wandb_logger(tmp_path / "fork", checkpoint=tmp_path / LAST)
    assert fork.version not in server.history


def test_metrics_of_a_row_that_was_sent_without_them_follow(tmp_path, server):
    csv, logger = CSVLogger(tmp_path), wandb_logger(tmp_path)
    for one in (csv, logger):
        one.rewind(0)
        one.log_metrics({"a": 1.0}, 5)
    logger.finalize("success")
    again = wandb_logger(tmp_path, going_on=True)
    csv.rewind(5)
    again.rewind(5)
    for one in (csv, again):
        one.log_metrics({"a": 1.0, "b": 2.0}, 5)
        one.log_metrics({"a": 3.0}, 6)
    again.finalize("success")
    [rows] = server.history.values()
    assert [own(row) for row in rows] == [
        {"a": 1, AXIS: 5}, {"b": 2, AXIS: 5}, {"a": 3, AXIS: 6},
    ]  # fmt: skip


def test_sync_sends_what_is_missing_and_no_more(tmp_path, server):
    logger = CSVLogger(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"train/loss": 1 / step}, step)
    write_point(tmp_path, 10, {"arc_easy/accuracy": 0.25})
    first = sync(tmp_path)
    assert (first.rows, first.metrics, first.last) == (3, 1, 30)
    [(run, rows)] = server.history.items()
    assert run == first.id == Identity.of(tmp_path).id
    assert sync(tmp_path).rows == 0 and len(rows) == 4
    logger.log_metrics({"train/loss": 0.5}, 40)
    write_point(tmp_path, 10, {"kl/mean": 2.0})
    write_point(tmp_path, 20, {"arc_easy/accuracy": 0.5})
    write_point(tmp_path, 30, {"arc_easy/accuracy": 0.75})
    done = sync(tmp_path, after=20)
    assert (done.rows, done.metrics) == (1, 1)
    assert sync(tmp_path).metrics == 2
    curve = [(row[AXIS], row["arc_easy/accuracy"]) for row in rows if "arc_easy/accuracy" in row]
    assert sorted(curve) == [(10, 0.25), (20, 0.5), (30, 0.75)]
    assert [row[AXIS] for row in rows if "train/loss" in row] == [10, 20, 30, 40]
    assert [row["_step"] for row in rows] == list(range(len(rows)))


def test_sync_repairs_what_was_lost_and_survives_the_loss_of_its_notes(tmp_path, server):
    fit(tmp_path, 5)
    write_point(tmp_path, 4, {"a": 1.0})
    sync(tmp_path)
    [rows] = server.history.values()
    whole = [own(row) for row in rows]
    server.lose(keep=3)
    done = sync(tmp_path)
    assert (done.rows, done.metrics) == (2, 1)
    assert [own(row)[AXIS] for row in rows] == [row[AXIS] for row in whole]
    (tmp_path / "wandb_sent.csv").unlink()
    assert sync(tmp_path).rows == 0


def test_evaluations_that_come_while_a_run_trains_are_sent_by_it(tmp_path, server):
    logger = wandb_logger(tmp_path)
    logger.rewind(0)
    logger.log_metrics({"loss": 1.0}, 10)
    write_point(tmp_path, 5, {"recall/exact_match": 0.5})
    logger.log_metrics({"loss": 0.5}, 20)
    logger.finalize("success")
    [rows] = server.history.values()
    assert [own(row) for row in rows] == [
        {"loss": 1, AXIS: 10}, {"recall/exact_match": 0.5, AXIS: 5}, {"loss": 0.5, AXIS: 20},
    ]  # fmt: skip


def test_without_a_server_a_run_loses_nothing_and_waits_at_no_step(
    tmp_path, server, client, monkeypatch
):
    monkeypatch.setattr("toolmem.training.wandb_runs.INIT_TIMEOUT", 1.0)
    url = os.environ["WANDB_BASE_URL"]
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers
    longest = 0.0
    with pytest.warns(RuntimeWarning, match="wandb cannot be reached.*toolmem wandb sync"):
        logger = wandb_logger(tmp_path)
        csv = CSVLogger(tmp_path)
        csv.rewind(0)
        logger.rewind(0)
    for step in range(1, 200):
        begun = time.monotonic()
        logger.log_metrics({"loss": 1 / step}, step)
        longest = max(longest, time.monotonic() - begun)
        csv.log_metrics({"loss": 1 / step}, step)
    logger.finalize("success")
    assert longest < 1.0  # a network's time limits are tens of seconds
    client.teardown()
    with pytest.raises(ToolmemError, match=r"nothing is lost, metrics\.csv has every row"):
        sync(tmp_path)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    client.teardown()
    assert sync(tmp_path).rows == 199
    [rows] = server.history.values()
    same(rows, expected(tmp_path))


def test_a_network_that_goes_away_in_the_midst_of_it(tmp_path, server, client, monkeypatch):
    monkeypatch.setattr("toolmem.training.wandb_runs.FINISH_TIMEOUT", 1.0)
    csv, logger = CSVLogger(tmp_path), wandb_logger(tmp_path)
    for step in range(1, 200):
        if step == 20:
            server.down = True
        begun = time.monotonic()
        logger.log_metrics({"loss": 1 / step}, step)
        assert time.monotonic() - begun < (5.0 if step == 1 else 1.0)
        csv.log_metrics({"loss": 1 / step}, step)
    logger.finalize("success")
    client.teardown()
    server.down = False
    sync(tmp_path)
    [rows] = server.history.values()
    same(rows, expected(tmp_path))


def test_who_does_not_log_in_is_told_how(tmp_path, client, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(ToolmemError, match="WANDB_API_KEY"):
        wandb_logger(tmp_path).rewind(0)


def test_bad_folders_are_refused_by_name(tmp_path):
    with pytest.raises(ToolmemError, match="no rows in metrics"):
        sync(tmp_path)
    CSVLogger(tmp_path).log_metrics({"a": 1}, 1)
    (tmp_path / "wandb_run.json").write_text("[]")
    with pytest.raises(ToolmemError, match=r"wandb_run\.json.*remove it"):
        sync(tmp_path)


def test_a_run_that_is_being_logged_is_not_synced_by_another_process(tmp_path):
    held = SentRows(tmp_path / "wandb_sent.csv")
    held.add(0, 10)
    child = os.fork()
    if not child:
        try:
            SentRows(tmp_path / "wandb_sent.csv")
        except ToolmemError as error:
            os._exit(17 if "another process" in str(error) else 1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    held.close()
    again = SentRows(tmp_path / "wandb_sent.csv")
    assert again.lines == [(0, 10, ())]
    again.close()


def test_a_file_cut_anywhere_gives_its_first_rows(tmp_path):
    logger = wandb_logger(tmp_path, offline=True)
    csv = CSVLogger(tmp_path)
    for step in range(1, 120):  # beyond one block of 32 KiB
        row = {f"some/long/name/of/a/metric/{n}": step + n for n in range(8)}
        logger.log_metrics(row, step)
        csv.log_metrics(row, step)
    logger.finalize("success")
    whole = history(tmp_path / "wandb", logger.version)
    same(whole, expected(tmp_path))
    [path] = (tmp_path / "wandb").glob(f"*run-*-*/run-{logger.version}.wandb")
    data = path.read_bytes()
    assert len(data) > 33_000
    before = len(whole)
    for cut in range(len(data), 0, -len(data) // 40):
        path.write_bytes(data[:cut])
        rows = history(tmp_path / "wandb", logger.version)
        assert rows == whole[: len(rows)] and len(rows) <= before
        before = len(rows)
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    path.write_bytes(damaged)
    rows = history(tmp_path / "wandb", logger.version)
    assert rows == whole[: len(rows)] and 0 < len(rows) < len(whole)


RUN = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    from test_wandb_runs import fit, LAST
    from toolmem.training.callbacks.throughput import Throughput
    import toolmem.training.loggers as loggers
    folder, steps, die = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    plain = loggers.CSVLogger.log_metrics
    def log(self, metrics, step=None):
        plain(self, metrics, step)
        if step == die:
            os.kill(os.getpid(), signal.SIGKILL)
    loggers.CSVLogger.log_metrics = log
    resume = folder / LAST
    fit(folder, steps, resume if resume.exists() else None, going_on=True)
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_killed_by_sigkill_again_and_again(mode, tmp_path, server):
    script = tmp_path / "run.py"
    script.write_text(RUN.format(tests=str(Path(__file__).parent)))
    environment = os.environ | {"WANDB_MODE": mode}
    run = tmp_path / "run"
    for die in (1, 7):
        done = subprocess.run(
            [sys.executable, str(script), str(run), "12", str(die)], env=environment, check=False,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    subprocess.run(
        [sys.executable, str(script), str(run), "12", "99"], env=environment, check=True,
        capture_output=True,
    )  # fmt: skip
    if mode == "online":
        [(name, rows)] = server.history.items()
    else:
        name = Identity.of(run).id
        rows = history(run / "wandb", name)
    same(rows, expected(run))
    assert [row["_step"] for row in rows] == list(range(12))
    folders = {path.name.rpartition("-")[2] for path in (run / "wandb").glob("*run-*-*")}
    assert folders == {name}
    shutil.rmtree(run / "wandb")
