"""Where metrics go: always a CSV file in the run's folder; TensorBoard when asked for.

wandb has ``wandb_runs.py``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, explain_os_error

STEP = "step"


class CSVLogger(Logger):
    """``metrics.csv``: a row a step, a column a metric, on disk as soon as it is logged.

    Metrics logged at one step share a row. The file grows at its end; only a new column rewrites
    it, in one go. A resumed run drops the rows after its checkpoint's step and logs them again.
    Only rank zero writes.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns: list[str] = [STEP]
        self._row: dict[str, Any] = {}
        self._start = 0  # where the last row begins, in bytes
        self._opened = False

    @property
    def name(self) -> str:
        """Nothing: the folder says it all."""
        return ""

    @property
    def version(self) -> str:
        """Nothing: the folder says it all."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run's folder."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's ``config.yaml`` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write metrics into the row of ``step``.

        Args:
            metrics: numbers by name.
            step: optimizer steps taken; the last row's when None.

        Raises:
            ToolmemError: when the file cannot be written.
        """
        if not self._opened:
            self._open()
        step = int(self._row.get(STEP, 0) if step is None else step)
        if self._row.get(STEP) == step:
            self._row.update(metrics)
        else:
            if self._row:
                self._start = self.path.stat().st_size
            self._row = {STEP: step, **metrics}
        new = [name for name in metrics if name not in self._columns]
        if new or not self.path.exists():
            self._columns += new
            rows = [row for row in read_rows(self.path) if row[STEP] != str(step)]
            self._rewrite([*rows, self._row])
            return
        self._write_last_row()

    def _write_last_row(self) -> None:
        text = self._line([self._row.get(name, "") for name in self._columns])
        try:
            with open(self.path, "r+b") as stream:
                stream.seek(self._start)
                stream.write(text.encode())
                stream.truncate()
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the rows after ``step``, which a resumed run logs again; at step 0 all of them."""
        rows = [row for row in read_rows(self.path) if step and int(row[STEP]) <= step]
        if self.path.exists():
            self._columns = list(dict.fromkeys([STEP, *(name for row in rows for name in row)]))
            self._rewrite(rows)
        self._opened = True

    def _open(self) -> None:
        rows = read_rows(self.path)
        if rows:
            self._columns = list(rows[0])
            self._rewrite(rows)
        self._opened = True

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        lines = [self._line([row.get(name, "") for name in self._columns]) for row in rows]
        header = self._line(self._columns)
        with atomic_path(self.path) as temporary:
            temporary.write_text(header + "".join(lines), encoding="utf-8", newline="")
        self._row = dict(rows[-1]) if rows else {}
        if rows:
            self._row[STEP] = int(self._row[STEP])
        self._start = len((header + "".join(lines[:-1])).encode())

    @staticmethod
    def _line(values: list[Any]) -> str:
        buffer = io.StringIO()
        csv.writer(buffer, lineterminator="\n").writerow(
            [f"{value:.8g}" if isinstance(value, float) else value for value in values]
        )
        return buffer.getvalue()


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file as text by column; none when it is missing.

    A last line that a killed process left unfinished does not count.

    Raises:
        ToolmemError: when the file is something else.
    """
    path = Path(path)
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    if reader.fieldnames and reader.fieldnames[0] != STEP:
        raise ToolmemError(
            f"{path} is no file of metrics (its first column is not {STEP!r}): move it away"
        )
    return [row for row in reader if row[STEP] and row[STEP].isdigit()]


def logged_version(checkpoint: str | Path | None, logger: str) -> str | None:
    """The run id that a logger had when a checkpoint was written.

    Args:
        checkpoint: the file that training goes on from, or None.
        logger: name of the logger's class.
    """
    if checkpoint is None:
        return None
    about = checkpoints.read_state(checkpoint).get(checkpoints.KEY, {})
    version = about.get("loggers", {}).get(logger)
    return None if version is None else str(version)


def tensorboard_logger(folder: str | Path, *, checkpoint: str | Path | None = None) -> Logger:
    """Lightning's logger for TensorBoard, in the run's folder under ``tensorboard``.

    Args:
        folder: the run's folder.
        checkpoint: the file that training goes on from: what was logged after it is hidden.

    Raises:
        ToolmemError: when TensorBoard is not installed.
    """
    from lightning.pytorch.loggers import TensorBoardLogger

    options: dict[str, Any] = {}
    if checkpoint is not None:
        options["purge_step"] = int(checkpoints.read_state(checkpoint).get("global_step", 0)) + 1
    try:
        return TensorBoardLogger(str(folder), name="", version="tensorboard", **options)
    except ModuleNotFoundError as error:
        raise ToolmemError(
            "logger: TensorBoard is not installed: pip install 'toolmem[tensorboard]'"
        ) from error
