"""What evaluations of a run's checkpoints found: ``evaluations/STEP.csv``, a file a checkpoint.

Each has a row a metric, ``metric,value``, and whatever columns beside (``low``, ``high``). Training, and any
number of evaluations that follow it, each write files of their own, which are joined by step when they are
read: plotted, or sent to the run's wandb run.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

from toolmem.errors import ToolmemError
from toolmem.files import write_text

COLUMNS = ["metric", "value"]


def point_path(run: str | Path, step: int) -> Path:
    """The file of one checkpoint's evaluation in a run's folder."""
    return Path(run) / "evaluations" / f"{step}.csv"


def write_point(run: str | Path, step: int, metrics: Mapping[str, float]) -> Path:
    """Write what an evaluation of one checkpoint found; what the file has by other names stays.

    Args:
        run: the run's folder.
        step: optimizer steps that the checkpoint had behind it.
        metrics: by name, ``group/name``.

    Returns:
        The file.
    """
    path = point_path(run, step)
    kept = _read(path) if path.is_file() else {}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([name, repr(float(value))] for name, value in {**kept, **metrics}.items())
    write_text(path, buffer.getvalue())
    return path


def read_points(run: str | Path) -> dict[int, dict[str, float]]:
    """All of a run's evaluations: metrics by name, by step in rising order.

    Raises:
        ToolmemError: for a file that has other columns, or no number where one should be.
    """
    found = [path for path in Path(run).glob("evaluations/*.csv") if path.stem.isdigit()]
    return {int(path.stem): _read(path) for path in sorted(found, key=lambda path: int(path.stem))}


def _read(path: Path) -> dict[str, float]:
    reader = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8", errors="replace")))
    if not set(COLUMNS) <= set(reader.fieldnames or ()):
        raise ToolmemError(
            f"{path} is no file of an evaluation (its columns are not {', '.join(COLUMNS)}): move it away"
        )
    values: dict[str, float] = {}
    for row in reader:
        try:
            values[row["metric"]] = float(row["value"])
        except (TypeError, ValueError):
            raise ToolmemError(
                f"{path}, line {reader.line_num}: the value of {row['metric']!r} is {row['value']!r}, "
                "not a number: mend the line, or evaluate the checkpoint again"
            ) from None
    return values
