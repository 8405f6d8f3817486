"""What wandb has on this disk of a run: its own files, read record by record.

A ``.wandb`` file is a header, then blocks of 32 KiB in LevelDB's log format: records, or pieces of them, each
with a CRC-32, a length and a kind (whole, first, middle, last). A record is a protocol buffer of wandb's.
What a killed process left unfinished at the end does not count.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

MAGIC = b":W&B"
FILE_HEADER = struct.Struct("<4sHB")
PIECE_HEADER = struct.Struct("<IHB")  # checksum of kind and data, length, kind
BLOCK = 32 * 1024
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[bytes]:
    """The records of a ``.wandb`` file in order, up to the first that is not whole."""
    data = path.read_bytes()
    if data[: len(MAGIC)] != MAGIC:
        return
    at = FILE_HEADER.size
    pieces: list[bytes] = []
    while True:
        left = BLOCK - at % BLOCK
        if left < PIECE_HEADER.size:  # padding
            at += left
            continue
        if at + PIECE_HEADER.size > len(data):
            return
        checksum, length, kind = PIECE_HEADER.unpack_from(data, at)
        at += PIECE_HEADER.size
        piece = data[at : at + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        at += length
        pieces.append(piece)
        if kind in (WHOLE, LAST):
            yield b"".join(pieces)
            pieces = []


def history(folder: Path, run_id: str) -> list[dict[str, Any]]:
    """The rows that a run logged on this disk, from all of its starts, in their order.

    Args:
        folder: where wandb keeps its folders of runs.
        run_id: the run.

    Returns:
        Values by metric; ``_step`` is the row's number.
    """
    from wandb.proto import wandb_internal_pb2 as protocol

    rows = []
    for path in _files(folder, run_id):
        for record in records(path):
            parsed = protocol.Record()  # type: ignore[attr-defined]
            parsed.ParseFromString(record)
            if not parsed.HasField("history"):
                continue
            row = {
                ".".join(item.nested_key) if item.nested_key else item.key: json.loads(
                    item.value_json
                )
                for item in parsed.history.item
            }
            rows.append(row)
    return rows


def wait_for_end(folder: Path, run_id: str, seconds: float = 10.0) -> None:
    """Wait until what writes a run's newest file has written it to its end.

    wandb's service does so on its own time: after a run has finished, and after its process was killed, when
    the end is not marked, and a file that stands still is taken for ended.

    Args:
        folder: where wandb keeps its folders of runs.
        run_id: the run.
        seconds: the longest to wait.
    """
    found = _files(folder, run_id)
    deadline = time.monotonic() + seconds
    while found and time.monotonic() < deadline:
        still = time.time() - found[-1].stat().st_mtime > 2.0
        if (still or _ended(found[-1])) and _stamp(found[-1]) < f"{datetime.now():%Y%m%d_%H%M%S}":
            return  # and a start of this second would have a folder of the same name
        time.sleep(0.05)


def _ended(path: Path) -> bool:
    from wandb.proto import wandb_internal_pb2 as protocol

    last = b""
    for record in records(path):
        last = record
    parsed = protocol.Record()  # type: ignore[attr-defined]
    parsed.ParseFromString(last)
    return parsed.HasField("exit")


def _files(folder: Path, run_id: str) -> list[Path]:
    """A run's files in the order of its starts, which their folders' names tell."""
    found = folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")
    return sorted(found, key=_stamp)


def _stamp(path: Path) -> str:
    """When a file's process began, as wandb writes it: ``20261128_181742``."""
    return path.parent.name.partition("run-")[2].partition("-")[0]
