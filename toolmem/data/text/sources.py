"""The pieces that files of text are read in, and what becomes of those that cannot be read.

A *chunk* is what is read at once: a Parquet row group, a few megabytes of a JSONL file's lines, a
whole ``.txt`` file. Listing chunks opens no more than Parquet footers.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

from toolmem.data.text.files import (
    RemoteFile,
    TextFile,
    explained,
    open_file,
    size_of,
)
from toolmem.errors import ToolmemError

JSONL_CHUNK_BYTES = 4 << 20
MAX_LINE_BYTES = 64 << 20  # of one JSON line
MAX_UNPACKED_BYTES = 8 << 30  # of one .gz file, which is held whole
_SPLIT_STEPS = 1 << 20
_LOGGED = 100  # bad documents that a process tells of one by one
_logger = logging.getLogger("toolmem.data")
_told: set[str] = set()

OnBadDocument = Literal["fatal", "skip"]


@dataclass(frozen=True)
class Chunk:
    """A piece of a file.

    Args:
        path: the file.
        start: Parquet: the row group; JSONL: the first byte (lines that begin from there on).
        stop: one past ``start``; JSONL: lines that begin before this byte.
        size: about how many bytes it takes in memory.
    """

    path: TextFile
    start: int
    stop: int
    size: int


class BadDocuments:
    """What becomes of documents that cannot be read: the first ends all, or they are counted and told.

    Args:
        policy: ``fatal`` or ``skip``.

    Attributes:
        count: documents passed over; of a file whose rows cannot be counted, one.
    """

    def __init__(self, policy: OnBadDocument = "fatal") -> None:
        self.policy = policy
        self.count = 0

    def met(self, place: Callable[[], str], what: str, advice: str, n: int = 1) -> None:
        """There is one.

        Args:
            place: gives its file and line, or row group; asked only when it is told.
            what: is wrong with it.
            advice: what to do about it.
            n: how many documents it is.

        Raises:
            ToolmemError: when the policy is ``fatal``.
        """
        if self.policy == "fatal":
            raise ToolmemError(
                f"{place()}: {what}; {advice}, or pass over such documents: --data.on_bad_document skip"
            )
        self.count += n
        if len(_told) > _LOGGED:
            return
        if len(_told) == _LOGGED:
            _told.add("")
            _logger.warning("further bad documents are counted, and not told one by one")
            return
        where = place()
        if where not in _told:
            _told.add(where)
            _logger.warning("%s: %s; passed over", where, what)


def list_chunks(files: Sequence[TextFile], bad: BadDocuments | None = None) -> list[Chunk]:
    """The pieces of the files, in order.

    Args:
        files: the files.
        bad: what becomes of a Parquet file that is not one.

    Raises:
        ToolmemError: when a Parquet file is corrupt, and that is fatal.
    """
    bad = bad or BadDocuments()
    chunks = []
    for path in files:
        size = size_of(path)
        if path.suffix == ".parquet":
            chunks += _row_groups(path, bad)
        elif path.suffix == ".jsonl":
            for start in range(0, size, JSONL_CHUNK_BYTES):
                stop = min(start + JSONL_CHUNK_BYTES, size)
                chunks.append(Chunk(path, start, stop, stop - start))
        else:
            chunks.append(Chunk(path, 0, size, size * (4 if path.suffix == ".gz" else 1)))
    return chunks


def read_chunk(chunk: Chunk, field: str, bad: BadDocuments | None = None) -> list[str]:
    """The documents of a chunk.

    Args:
        chunk: which.
        field: the Parquet column or JSON key that holds the text.
        bad: what becomes of those that cannot be read.

    Raises:
        ToolmemError: naming file and line (or row group) of what cannot be read, where that is fatal.
    """
    bad = bad or BadDocuments()
    if chunk.path.suffix == ".parquet":
        return _read_row_group(chunk, field, bad)
    if chunk.path.suffix == ".txt":
        return _decode_file(chunk.path, bad)
    with explained(chunk.path):
        return list(_read_lines(chunk, field, bad))
    raise AssertionError  # `explained` lets nothing through


def _decode_file(path: TextFile, bad: BadDocuments) -> list[str]:
    with explained(path), open_file(path) as stream:
        data = stream.read()
    try:
        return [data.decode("utf-8")]
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        bad.met(
            lambda: f"{path}, line {line}",
            f"not UTF-8 text (byte {error.start})",
            "convert it, train on its bytes alone (`tokenizer: byte` and only this file)",
        )
    return []


def _lines_of(path: TextFile) -> BinaryIO:
    stream = open_file(path)
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if path.suffix == ".gz" else stream


def _read_lines(chunk: Chunk, field: str, bad: BadDocuments) -> Iterator[str]:
    packed = chunk.path.suffix == ".gz"
    with _lines_of(chunk.path) as stream:
        at = chunk.start
        if at > 0:  # a line belongs to the chunk that it begins in
            stream.seek(at - 1)
            at += _pass_line(stream, chunk.stop - at + 1) - 1
        while packed or at < chunk.stop:
            try:
                line = stream.readline(MAX_LINE_BYTES + 1)
            except (OSError, EOFError, zlib.error) as error:
                if not packed:
                    raise
                # what was unpacked before it stands
                what = "is truncated" if isinstance(error, EOFError) else "is damaged"
                advice = "fetch it again"
                bad.met(_place(chunk.path, at), f"{chunk.path.name} {what} ({error})", advice)
                return
            if not line:
                return
            if len(line) > MAX_LINE_BYTES:
                size = f"{MAX_LINE_BYTES >> 20} MiB"
                bad.met(_place(chunk.path, at), f"a line of more than {size}", "split it")
                at += len(line) + (0 if line.endswith(b"\n") else _pass_line(stream))
                continue
            if line.strip():
                text = _text_of(line, _place(chunk.path, at), field, bad)
                if text is not None:
                    yield text
            at += len(line)
            if packed and at > MAX_UNPACKED_BYTES:
                raise ToolmemError(
                    f"{chunk.path} unpacks to more than {MAX_UNPACKED_BYTES >> 30} GiB, and is held whole: "
                    "split it, or unpack it to .jsonl"
                )


def _pass_line(stream: BinaryIO, limit: int | None = None) -> int:
    """Read to the end of a line, or a little more than ``limit`` bytes; how many they were."""
    passed = 0
    while limit is None or passed < limit:
        piece = stream.readline(1 << 20)
        passed += len(piece)
        if not piece or piece.endswith(b"\n"):
            break
    return passed


def _place(path: TextFile, at: int) -> Callable[[], str]:
    """File and number of the line that begins at a byte; it takes reading the file up to there."""

    def place() -> str:
        lines, left = 1, at
        try:
            with _lines_of(path) as stream:
                while left > 0 and (block := stream.read(min(left, 1 << 20))):
                    lines += block.count(b"\n")
                    left -= len(block)
        except (OSError, EOFError, zlib.error):  # the end of what can be unpacked
            pass
        return f"{path}, line {lines}"

    return place


def _text_of(line: bytes, place: Callable[[], str], field: str, bad: BadDocuments) -> str | None:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        bad.met(place, f"not JSON ({error})", "mend or remove the line")
        return None
    if isinstance(row, dict) and isinstance(row.get(field), str):
        text: str = row[field]
        return text
    if not isinstance(row, dict):
        wrong = f"a JSON {type(row).__name__}, not an object"
    elif field in row:
        wrong = f"the field {field!r} is not text but {row[field]!r:.60}"
    else:
        wrong = f"no field {field!r} (it has {', '.join(map(repr, list(row)[:8])) or 'none'})"
    bad.met(place, wrong, "set --data.text_field to the field with the text")
    return None


def _open_parquet(path: TextFile) -> Any:
    """The file; its ``schema_arrow`` and ``metadata`` are read already.

    Raises:
        ToolmemError: when it is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if isinstance(path, RemoteFile):
            return pq.ParquetFile(open_file(path), pre_buffer=True)
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        with explained(path):
            raise
    except (pa.ArrowException, ValueError, OSError, MemoryError) as error:
        if isinstance(error, ToolmemError):
            raise
        raise ToolmemError(
            f"{path} is not a whole Parquet file ({_short(error)}); fetch or write it again"
        ) from error


def _short(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _row_groups(path: TextFile, bad: BadDocuments) -> list[Chunk]:
    try:
        meta = _open_parquet(path).metadata
        sizes = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
    except ToolmemError as error:
        if bad.policy == "fatal" or not _exists(path):
            raise
        bad.met(lambda: str(path), str(error).removeprefix(f"{path} "), "")
        return []
    return [Chunk(path, i, i + 1, size) for i, size in enumerate(sizes)]


def _exists(path: TextFile) -> bool:
    return isinstance(path, RemoteFile) or path.exists()


def _read_row_group(chunk: Chunk, field: str, bad: BadDocuments) -> list[str]:
    import pyarrow as pa

    file = _open_parquet(chunk.path)
    names = file.schema_arrow.names
    if field not in names:
        raise ToolmemError(
            f"{chunk.path} has no column {field!r} (it has {', '.join(names)}); set "
            "--data.text_field to the column with the text"
        )
    kind = file.schema_arrow.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ToolmemError(f"{chunk.path}: the column {field!r} is {kind}, not text")
    where = f"{chunk.path}, row group {chunk.start}"
    texts: list[str | None]
    try:
        texts = file.read_row_group(chunk.start, columns=[field]).column(0).to_pylist()
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        n = file.metadata.row_group(chunk.start).num_rows
        what = f"cannot be read ({_short(error)})"
        bad.met(lambda: where, what, "the file is damaged: fetch or write it again", max(1, n))
        return []
    found = []
    for row, text in enumerate(texts, start=1):
        if text is None:
            place = f"{where}, row {row}"
            bad.met(lambda p=place: p, f"the column {field!r} is empty (null)", "remove the row")  # type: ignore[misc]
        else:
            found.append(text)
    return found


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


def whole_file(path: TextFile) -> Chunk:
    """A whole file as one chunk."""
    size = size_of(path)
    return Chunk(path, 0, size, size)
