"""Files of text, and the pieces that they are read in.

A *chunk* is what is read at once: a Parquet row group, a few megabytes of a JSONL file's lines, a
whole ``.txt`` file. Listing chunks opens no more than Parquet footers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path

from toolmem.errors import ToolmemError

SUFFIXES = (".jsonl", ".json.gz", ".jsonl.gz", ".parquet", ".txt")
JSONL_CHUNK_BYTES = 4 << 20
_SPLIT_STEPS = 1 << 20

WHERE_FROM = (
    "text comes as .txt, .jsonl or .parquet files: a file, a folder, a glob or a list of them, or "
    "hf://OWNER/DATASET. For a first try take Shakespeare (input.txt of karpathy/char-rnn on "
    "GitHub) or shards of HuggingFaceTB/smollm-corpus on the Hugging Face hub"
)


@dataclass(frozen=True)
class Chunk:
    """A piece of a file.

    Args:
        path: the file.
        start: Parquet: the row group; JSONL: the first byte (lines that begin from there on).
        stop: one past ``start``; JSONL: lines that begin before this byte.
        size: about how many bytes it takes in memory.
    """

    path: Path
    start: int
    stop: int
    size: int


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The text files that ``path`` means, in a fixed order.

    Args:
        path: a file, a folder (searched through and through), a glob, or a list of these.

    Raises:
        ToolmemError: when there are none, or one is of a kind that cannot be read.
    """
    found: list[Path] = []
    for entry in [path] if isinstance(path, (str, Path)) else path:
        entry_path = Path(entry).expanduser()
        if entry_path.is_dir():
            files = [p for p in entry_path.rglob("*") if p.is_file() and _suffix(p)]
            if not files:
                raise ToolmemError(
                    f"no {', '.join(SUFFIXES)} file in the folder {entry}: {WHERE_FROM}"
                )
        elif entry_path.exists():
            files = [entry_path]
        elif has_magic(str(entry)):
            base = Path(entry_path.anchor)
            files = [p for p in base.glob(str(entry_path.relative_to(base))) if p.is_file()]
            if not files:
                raise ToolmemError(f"no file matches {entry}: {WHERE_FROM}")
        else:
            raise ToolmemError(f"no such file or folder: {entry}. {WHERE_FROM}")
        found += sorted(files)
    if not found:
        raise ToolmemError(f"no data given: {WHERE_FROM}")
    for file in found:
        if not _suffix(file):
            raise ToolmemError(
                f"{file} is of no kind that can be read ({', '.join(SUFFIXES)}); convert it"
            )
    return list(dict.fromkeys(found))


def _suffix(path: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), None)


def list_chunks(files: Sequence[Path]) -> list[Chunk]:
    """The pieces of the files, in order.

    Raises:
        ToolmemError: when a Parquet file is corrupt.
    """
    chunks = []
    for path in files:
        size = path.stat().st_size
        if path.suffix == ".parquet":
            chunks += _row_groups(path)
        elif path.suffix == ".jsonl":
            for start in range(0, size, JSONL_CHUNK_BYTES):
                stop = min(start + JSONL_CHUNK_BYTES, size)
                chunks.append(Chunk(path, start, stop, stop - start))
        else:
            chunks.append(Chunk(path, 0, size, size * (4 if path.suffix == ".gz" else 1)))
    return chunks


def read_chunk(chunk: Chunk, field: str) -> list[str]:
    """The documents of a chunk.

    Args:
        chunk: which.
        field: the Parquet column or JSON key that holds the text.

    Raises:
        ToolmemError: naming file and line (or row) of what cannot be read.
    """
    try:
        if chunk.path.suffix == ".parquet":
            return _read_row_group(chunk, field)
        if chunk.path.suffix == ".txt":
            return [_decode_file(chunk.path)]
        return list(_read_lines(chunk, field))
    except OSError as error:  # gzip's complaints are of this kind too
        raise ToolmemError(f"cannot read {chunk.path}: {error}") from error
    except EOFError as error:
        raise ToolmemError(f"{chunk.path} is truncated: {error}; fetch it again") from error


def _decode_file(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ToolmemError(
            f"{path}, line {line}: not UTF-8 text (byte {error.start}); convert it, or train on "
            "its bytes alone (`tokenizer: byte` and only this file)"
        ) from error


def _read_lines(chunk: Chunk, field: str) -> Iterator[str]:
    opener = gzip.open if chunk.path.suffix == ".gz" else open
    whole = chunk.path.suffix == ".gz"
    with opener(chunk.path, "rb") as stream:
        at = chunk.start
        if at > 0:  # a line belongs to the chunk that it begins in
            stream.seek(at - 1)
            at += len(stream.readline()) - 1
        while whole or at < chunk.stop:
            line = stream.readline()
            if not line:
                return
            if line.strip():
                yield _text_of(line, chunk, at, field)
            at += len(line)


def _text_of(line: bytes, chunk: Chunk, at: int, field: str) -> str:
    def where() -> str:
        opener = gzip.open if chunk.path.suffix == ".gz" else open
        with opener(chunk.path, "rb") as stream:
            before = stream.read(at).count(b"\n")
        return f"{chunk.path}, line {before + 1}"

    try:
        row = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ToolmemError(f"{where()}: not JSON ({error}); mend or remove the line") from error
    if not isinstance(row, dict) or not isinstance(row.get(field), str):
        if not isinstance(row, dict):
            wrong = f"a JSON {type(row).__name__}, not an object"
        elif field in row:
            wrong = f"the field {field!r} is not text but {row[field]!r:.60}"
        else:
            wrong = f"no field {field!r} (it has {', '.join(map(repr, list(row)[:8])) or 'none'})"
        raise ToolmemError(f"{where()}: {wrong}; set --data.text_field to the field with the text")
    text: str = row[field]
    return text


def _open_parquet(path: Path) -> object:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowInvalid, OSError) as error:
        raise ToolmemError(
            f"{path} is not a whole Parquet file ({error}); fetch or write it again"
        ) from error


def _row_groups(path: Path) -> list[Chunk]:
    meta = _open_parquet(path).metadata  # type: ignore[attr-defined]
    return [
        Chunk(path, i, i + 1, meta.row_group(i).total_byte_size) for i in range(meta.num_row_groups)
    ]


def _read_row_group(chunk: Chunk, field: str) -> list[str]:
    import pyarrow as pa

    file = _open_parquet(chunk.path)
    names = file.schema_arrow.names  # type: ignore[attr-defined]
    if field not in names:
        raise ToolmemError(
            f"{chunk.path} has no column {field!r} (it has {', '.join(names)}); set "
            "--data.text_field to the column with the text"
        )
    kind = file.schema_arrow.field(field).type  # type: ignore[attr-defined]
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ToolmemError(f"{chunk.path}: the column {field!r} is {kind}, not text")
    try:
        column = file.read_row_group(chunk.start, columns=[field]).column(0)  # type: ignore[attr-defined]
        texts: list[str | None] = column.to_pylist()
    except (pa.ArrowInvalid, pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ToolmemError(
            f"{chunk.path}, row group {chunk.start}: cannot be read ({error}); the file is "
            "damaged: fetch or write it again"
        ) from error
    if None in texts:
        raise ToolmemError(
            f"{chunk.path}, row group {chunk.start}, row {texts.index(None) + 1}: the column "
            f"{field!r} is empty (null); remove the row"
        )
    return texts  # type: ignore[return-value]


def fingerprint(chunks: Sequence[Chunk]) -> str:
    """A short digest of names and sizes, by which a resumed run knows its data again."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(f"{chunk.path.name}\x1f{chunk.start}\x1f{chunk.stop}\x1e".encode())
    return digest.hexdigest()[:16]


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: its text alone decides, so copies of one never part."""
    digest = zlib.crc32(text.encode("utf-8", "surrogatepass"))
    return digest % _SPLIT_STEPS < fraction * _SPLIT_STEPS


def whole_file(path: Path) -> Chunk:
    """A whole file as one chunk."""
    size = path.stat().st_size
    return Chunk(path, 0, size, size)
