"""``norms.parquet`` of a run: a row a step, layer and measure.

A probe writes a part of its own (``norms/step_N.parquet``), in one step, so that a run that is killed has
lost nothing and no file is ever half written; parts are merged when there are many, and at the end.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    import pyarrow as pa

    from toolmem.training.callbacks.norm_measures import Row

NAME = "norms.parquet"
COLUMNS = ("step", "layer", "kind", "measure", "value")
MOST_PARTS = 256


class NormFile:
    """Writes and reads a run's norms.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self.folder = Path(folder) / "norms"

    def parts(self) -> list[Path]:
        """The parts that are not merged yet, by step."""
        found = [p for p in self.folder.glob("step_*.parquet") if _step(p) is not None]
        return sorted(found, key=lambda part: _step(part) or 0)

    def add(self, step: int, rows: Iterable[Row]) -> None:
        """Write the figures of one step.

        Args:
            step: optimizer steps taken.
            rows: the figures.

        Raises:
            ToolmemError: when the file cannot be written.
        """
        import pyarrow as pa

        columns = list(zip(*rows, strict=True))
        table = pa.table(
            [pa.array([step] * len(columns[0]), pa.int64()), *(pa.array(c) for c in columns)],
            names=list(COLUMNS),
        )
        _write(table, self.folder / f"step_{step}.parquet")
        if len(self.parts()) >= MOST_PARTS:
            self.merge()

    def read(self) -> pa.Table | None:
        """All rows by step, merged or not; None when there is nothing."""
        import pyarrow as pa
        import pyarrow.compute as pc

        tables = [_read(self.path)] if self.path.is_file() else []
        # a step that was merged may have its part still, should the run have been killed right then
        merged = set(pc.unique(tables[0]["step"]).to_pylist()) if tables else set()
        tables += [_read(part) for part in self.parts() if _step(part) not in merged]
        return pa.concat_tables(tables) if tables else None

    def merge(self) -> None:
        """Make one file of all parts."""
        parts = self.parts()
        table = self.read() if parts else None
        if table is not None:
            self._replace(table, parts)

    def rewind(self, step: int) -> None:
        """Drop what comes after ``step``, which a resumed run measures again; at step 0 everything."""
        parts = self.parts()
        if not parts and not self.path.is_file():
            return
        import pyarrow.compute as pc

        table = self.read() if step else None
        table = None if table is None else table.filter(pc.less_equal(table["step"], step))
        self._replace(table, parts)

    def _replace(self, table: pa.Table | None, parts: list[Path]) -> None:
        if table is not None and len(table):
            _write(table, self.path)
        else:
            self.path.unlink(missing_ok=True)
        for part in parts:
            part.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _step(part: Path) -> int | None:
    number = part.stem.removeprefix("step_")
    return int(number) if number.isdigit() else None


def _write(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def _read(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=list(COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise ToolmemError(f"{path} is no file of norms: move it away ({error})") from error
