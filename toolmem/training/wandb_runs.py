"""A run at Weights & Biases: what was logged reaches it once, however often the run is killed.

``metrics.csv`` is the truth; the wandb run holds its first rows, each whole, and evaluations among them.
Every row that is handed over is first noted in ``wandb_sent.csv``, with the number that wandb counts it by
(``_step``). A run that goes on asks how many rows there are (the server, or offline wandb's own files),
forgets what did not arrive, and sends on from there; what it logs a second time is passed over.

    wandb_run.json   the id and the project
    wandb_sent.csv   wandb_step, step, metrics (of an evaluation; of a row of metrics.csv nothing)
    wandb/           wandb's own files
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import io
import json
import secrets
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger as LightningWandbLogger
from lightning.pytorch.utilities import rank_zero_only

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.evaluation.curves import read_points
from toolmem.files import explain_os_error, write_json
from toolmem.training import wandb_files
from toolmem.training.loggers import STEP, logged_version, read_rows

AXIS = "trainer/global_step"
IDENTITY = "wandb_run.json"
SENT = "wandb_sent.csv"
COLUMNS = ["wandb_step", STEP, "metrics"]
PROJECT = "toolmem"
# Seconds: to find the server before the first step, and to send what is left after the last.
INIT_TIMEOUT, FINISH_TIMEOUT = 30.0, 60.0


@dataclass(frozen=True)
class Identity:
    """Which wandb run is a run's own.

    Args:
        id: the run's id.
        project: where it appears.
    """

    id: str
    project: str

    @classmethod
    def of(cls, folder: str | Path) -> Identity | None:
        """What the run's folder says; None where it never logged to wandb.

        Raises:
            ToolmemError: when the file is something else.
        """
        path = Path(folder) / IDENTITY
        if not path.is_file():
            return None
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            return cls(str(said["id"]), str(said["project"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ToolmemError(
                f"{path} does not say which wandb run is this run's (id and project): remove it for another"
            ) from error

    @classmethod
    def new(cls, project: str) -> Identity:
        """Of a run that begins."""
        return cls(secrets.token_hex(4), project)

    def keep(self, folder: str | Path) -> None:
        """Write it to the run's folder."""
        if Identity.of(folder) != self:
            write_json(Path(folder) / IDENTITY, {"id": self.id, "project": self.project})
            (Path(folder) / SENT).unlink(missing_ok=True)  # was of another wandb run


def identity_for(
    folder: str | Path, project: str, checkpoint: str | Path | None, going_on: bool
) -> Identity:
    """The wandb run for a run that starts now.

    Args:
        folder: the run's.
        project: for a new one.
        checkpoint: what training goes on from, or None.
        going_on: the run may have been killed before its first checkpoint.
    """
    own = (
        checkpoint is not None
        and checkpoints.run_folder(checkpoint).resolve() == Path(folder).resolve()
    )
    known = Identity.of(folder)
    if own:
        kept = logged_version(checkpoint, "WandbLogger")
        if kept is not None and (known is None or known.id != kept):
            return Identity(kept, known.project if known is not None else project)
    if known is not None and (own or (checkpoint is None and going_on)):
        return known
    return Identity.new(project)


class SentRows:
    """``wandb_sent.csv``: what was handed to wandb, a line a row; one process at a time holds it.

    Args:
        path: the file; made when missing.

    Raises:
        ToolmemError: when another process holds it, or it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: TextIO = open(  # noqa: SIM115 (held as long as this is)
                path, "a+", encoding="utf-8", newline=""
            )
        except OSError as error:
            raise explain_os_error(error, path) from error
        try:
            # A lock of the process: the kernel takes it back when the process dies, and forked
            # data workers do not share it.
            fcntl.lockf(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not path.stat().st_size:
                self._write([COLUMNS])
        except OSError as error:
            self._stream.close()
            raise ToolmemError(
                f"{path.parent} is being logged to wandb by another process, which sends evaluations too: "
                "wait until it has ended"
            ) from error
        self._read()

    def _read(self) -> None:
        self._stream.seek(0)
        text = self._stream.read()
        whole = text[: text.rfind("\n") + 1]
        self.lines: list[tuple[int, int, tuple[str, ...]]] = []
        for row in list(csv.reader(io.StringIO(whole)))[1:]:
            number, step, names = row
            self.lines.append((int(number), int(step), tuple(json.loads(names or "[]"))))

    def cut(self, count: int) -> None:
        """Forget rows that wandb counts by ``count`` and up: they have not arrived."""
        self.lines = [line for line in self.lines if line[0] < count]
        self._stream.truncate(0)
        self._write([COLUMNS, *(_line(*line) for line in self.lines)])

    def add(self, number: int, step: int, names: Sequence[str] = ()) -> None:
        """Note a row that is handed over next."""
        self.lines.append((number, step, tuple(names)))
        self._write([_line(*self.lines[-1])])

    def _write(self, rows: Sequence[Sequence[Any]]) -> None:
        try:
            csv.writer(self._stream, lineterminator="\n").writerows(rows)
            self._stream.flush()
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    def last_step(self) -> int:
        """Of the last row of ``metrics.csv`` that was sent; -1 when there is none."""
        return max((step for _, step, names in self.lines if not names), default=-1)

    def evaluated(self) -> set[tuple[int, str]]:
        """Step and name of every metric of an evaluation that was sent."""
        return {(step, name) for _, step, names in self.lines for name in names}

    def close(self) -> None:
        """Let others have it."""
        self._stream.close()


def _line(number: int, step: int, names: Sequence[str]) -> list[Any]:
    return [number, step, json.dumps(list(names)) if names else ""]


class Upload:
    """Sends a run's rows to its wandb run, once each and in their order.

    Args:
        folder: the run's.
        run: wandb's, as ``wandb.init`` gave it.
    """

    def __init__(self, folder: Path, run: Any) -> None:
        self.folder, self.run = folder, run
        self.sent = SentRows(folder / SENT)
        # How many rows the wandb run has, and the last step of them.
        if run.offline:
            rows = wandb_files.history(folder / "wandb", run.id)
            self.next = 1 + max((int(row["_step"]) for row in rows), default=-1)
            last = max((int(row[AXIS]) for row in rows), default=-1)
        else:
            self.next = int(run.starting_step)
            last = int((run.summary.get(AXIS) or {"max": -1})["max"])
        self.sent.cut(self.next)
        self.last = self.sent.last_step() if self.sent.lines else last  # the notes may be lost
        self._looked_at = 0  # when the evaluations' folder last changed
        run.define_metric(AXIS, summary="max")
        run.define_metric("*", step_metric=AXIS, step_sync=True)

    def row(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send a row of ``metrics.csv``, unless the wandb run has it."""
        if step > self.last and metrics:
            self._send(step, metrics)
            self.last = step

    def more(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send metrics of a step whose row was sent without them."""
        if metrics:
            self._send(step, metrics)

    def catch_up(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Send those of ``rows`` that the wandb run lacks; return how many they were."""
        missing = [row for row in rows if int(row[STEP]) > self.last]
        for row in missing:
            self.row(int(row[STEP]), numbers(row))
        return len(missing)

    def evaluations(self, after: int | None = None) -> int:
        """Send what evaluations found and the wandb run lacks; return how many metrics it was.

        Args:
            after: only of later steps.
        """
        found = self.sent.evaluated()
        count = 0
        for step, metrics in read_points(self.folder).items():
            new = {k: v for k, v in metrics.items() if (step, k) not in found}
            if new and (after is None or step > after):
                self._send(step, new, list(new))
                count += len(new)
        return count

    def new_evaluations(self) -> None:
        """Send evaluations, where any has been written since this was last called."""
        with contextlib.suppress(OSError):
            changed = (self.folder / "evaluations").stat().st_mtime_ns
            if changed != self._looked_at:
                self._looked_at = changed
                self.evaluations()

    def _send(self, step: int, metrics: Mapping[str, Any], names: Sequence[str] = ()) -> None:
        self.sent.add(self.next, step, names)
        self.run.log({**metrics, AXIS: step}, step=self.next, commit=True)
        self.next += 1


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """A row of ``metrics.csv`` as numbers by name, without the step and what is empty."""
    return {k: float(v) for k, v in row.items() if k != STEP and v not in ("", None)}


class WandbLogger(LightningWandbLogger):
    """Lightning's logger for Weights & Biases, that logs no step twice and survives any end.

    A step's metrics go out as one row when the next step logs. Where the server cannot be found the run logs
    offline, with a warning; `sync` sends it later.

    Args:
        folder: the run's folder; ``metrics.csv`` is in it, and wandb keeps its files there.
        identity: the wandb run.
        init: arguments of ``wandb.init``.
    """

    def __init__(self, folder: str | Path, identity: Identity, init: Mapping[str, Any]) -> None:
        super().__init__(save_dir=str(folder), version=identity.id, **init)
        self.folder = Path(folder)
        self.identity = identity
        self._upload: Upload | None = None
        self._step = -1
        self._row: dict[str, Any] = {}
        self._had: set[str] = set()  # what the row of the step that the run went on from has sent

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Wandb's own run."""
        return self._opened().run

    def _opened(self) -> Upload:
        if self._upload is None:
            self.identity.keep(self.folder)
            wandb_files.wait_for_end(self.folder / "wandb", self.identity.id)
            self._experiment = open_run(self._wandb_init, self.folder)
            self._upload = Upload(self.folder, self._experiment)
        return self._upload

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Send what ``metrics.csv`` has up to ``step`` and wandb lacks; go on in the row of the step."""
        upload = self._opened()
        rows = [row for row in read_rows(self.folder / "metrics.csv") if int(row[STEP]) <= step]
        self._step, self._row, self._had = step, {}, set()
        if rows and int(rows[-1][STEP]) == step:
            row = numbers(rows.pop())
            if step > upload.last:
                self._row = row
            else:
                self._had = set(row)
        upload.catch_up(rows)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Take metrics into the row of ``step``.

        Args:
            metrics: by name.
            step: optimizer steps taken; the row's that is being gathered when None.
        """
        self._opened()
        step = max(self._step, 0) if step is None else int(step)
        if step != self._step:
            self._send_row()
            self._step, self._row, self._had = step, {}, set()
        self._row.update({name: one for name, one in metrics.items() if name not in self._had})

    def _send_row(self) -> None:
        assert self._upload is not None
        if self._had:
            self._upload.more(self._step, self._row)
        else:
            self._upload.row(self._step, self._row)
        self._upload.new_evaluations()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Send the last row and end wandb's run; another fit goes on in it."""
        if self._upload is None:
            return
        super().finalize(status)
        self._send_row()
        self._upload.sent.close()
        run = self._upload.run
        run.finish(exit_code=0 if status == "success" else 1)
        if run.offline:
            wandb_files.wait_for_end(self.folder / "wandb", self.identity.id)
        self._upload, self._experiment = None, None
        self._step, self._row, self._had = -1, {}, set()


def settings(**more: Any) -> Any:
    """wandb's, such that it keeps no command line, source, repository or console: any may hold a secret."""
    import wandb

    kept = {
        "x_disable_meta": True,
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "console": "off",
    }
    times = {"init_timeout": INIT_TIMEOUT, "finish_timeout": FINISH_TIMEOUT}
    return wandb.Settings(**{**kept, **times, **more})


def open_run(init: Mapping[str, Any], folder: Path, *, fall_back: bool = True) -> Any:
    """Begin wandb's run, or go on with it.

    Args:
        init: arguments of ``wandb.init``.
        folder: the run's, for messages.
        fall_back: log offline, with a warning, where the server cannot be found.

    Raises:
        ToolmemError: when wandb does not know who logs, or cannot be reached and ``fall_back`` is False.
    """
    import wandb
    from wandb.errors import AuthenticationError, CommError, Error

    words = {"reinit": "create_new", **init}
    later = f"`toolmem wandb sync {folder}` sends it"
    try:
        return wandb.init(**words)
    except (AuthenticationError, CommError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, AuthenticationError) or not fall_back:
            raise ToolmemError(
                f"wandb: {reason}: nothing is lost, metrics.csv has every row; later {later}"
            ) from error
        warnings.warn(
            f"wandb cannot be reached ({reason}): the run logs offline, and later {later}",
            RuntimeWarning,
            stacklevel=2,
        )
        wandb.teardown()  # its service still has a run of this id, that goes on looking for the server
        return wandb.init(**{**words, "mode": "offline"})
    except Error as error:
        raise ToolmemError(
            f"wandb: {str(error).partition(chr(10))[0]} (or set WANDB_API_KEY, or log offline by --logger "
            "wandb_offline)"
        ) from error


def wandb_logger(
    folder: str | Path,
    *,
    project: str = PROJECT,
    name: str | None = None,
    checkpoint: str | Path | None = None,
    going_on: bool = False,
    offline: bool = False,
    **options: Any,
) -> WandbLogger:
    """The logger for Weights & Biases; a resumed run goes on in the run that it was.

    Args:
        folder: the run's folder; wandb keeps its files in it.
        project: where the run appears.
        name: how it is called there; the folder's name when None.
        checkpoint: the file that training goes on from: if it is the run's own, it holds the wandb run's id.
        going_on: the run goes on even where it has no checkpoint yet.
        offline: ask no server; `sync` sends what was logged. ``WANDB_MODE=offline`` says the same.
        options: anything else that ``wandb.init`` takes.

    Raises:
        ToolmemError: when wandb is not installed.
    """
    identity = identity_for(folder, project, checkpoint, going_on)
    mode = {"mode": "offline"} if offline else {}
    init = {"project": identity.project, "name": name or Path(folder).name, **mode, **options}
    try:
        return WandbLogger(folder, identity, {"settings": settings(), **init})
    except ModuleNotFoundError as error:
        raise ToolmemError("logger: wandb is not installed: pip install wandb") from error


@dataclass(frozen=True)
class Synced:
    """What `sync` sent.

    Args:
        id: the wandb run's.
        project: where it appears.
        rows: of ``metrics.csv``.
        metrics: of evaluations.
        last: the step of the last row that wandb has; -1 for none.
    """

    id: str
    project: str
    rows: int
    metrics: int
    last: int


def sync(folder: str | Path, after: int | None = None, project: str | None = None) -> Synced:
    """Send to a run's wandb run what ``metrics.csv`` and ``evaluations/`` have and it lacks.

    A run that never logged to wandb gets a wandb run. Where nothing is missing, nothing is sent.

    Args:
        folder: the run's.
        after: of evaluations, only those of later steps.
        project: for a new wandb run.

    Raises:
        ToolmemError: when there are no metrics, wandb cannot be reached, or the run is being trained.
    """
    folder = Path(folder)
    rows, points = read_rows(folder / "metrics.csv"), read_points(folder)
    if not rows and not points:
        raise ToolmemError(
            f"{folder} has no rows in metrics.csv and nothing in evaluations/: name a run's folder"
        )
    known = Identity.of(folder)
    if known is not None and project not in (None, known.project):
        raise ToolmemError(
            f"project is {project}, and {folder} is in the wandb project {known.project}: leave --project out"
        )
    SentRows(folder / SENT).close()  # not while the run logs by itself
    identity = known or Identity.new(project or PROJECT)
    identity.keep(folder)
    init = {
        "id": identity.id,
        "project": identity.project,
        "name": folder.resolve().name,
        "dir": str(folder),
        "resume": "allow",
        "settings": settings(
            finish_timeout=600.0, finish_timeout_raises=True, x_disable_stats=True
        ),
    }
    run = open_run(init, folder, fall_back=False)
    try:
        upload = Upload(folder, run)
        try:
            sent_rows, sent_metrics = upload.catch_up(rows), upload.evaluations(after)
        finally:
            upload.sent.close()
    except BaseException:
        run.finish(exit_code=1)
        raise
    try:
        run.finish()
    except TimeoutError as error:
        raise ToolmemError(
            "wandb: not all of it was sent within ten minutes: do it again, and what is missing is sent"
        ) from error
    return Synced(identity.id, identity.project, sent_rows, sent_metrics, upload.last)
