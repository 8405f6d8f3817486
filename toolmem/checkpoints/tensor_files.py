"""Files of tensors in the safetensors format, with checksums; written and read without a copy in between.

A file is (https://github.com/huggingface/safetensors, "Format")::

    8 bytes     N, length of the header, little-endian
    N bytes     the header: JSON, filled up with spaces
    the rest    the tensors' bytes, C order, little-endian, one after the other

The header's ``__metadata__`` has, beside what the caller gives it::

    toolmem.crc32     {NAME: crc32 of the tensor's bytes, 8 hexadecimal digits}
    toolmem.checksum  crc32 of the whole header, read with 00000000 in this place

so that every byte but the eight of N is covered, and those decide where the header ends. The library
``safetensors`` reads such a file; it writes none of several gigabytes without holding them twice, and
syncs nothing to disk.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SUMS = "toolmem.crc32"
CHECKSUM = "toolmem.checksum"
ALIGNMENT = 8
LONGEST_HEADER = 100_000_000  # the limit of the library safetensors
PIECE = 4 << 20  # bytes that are summed and written at once, while the processor's cache has them
NO_SUM = "00000000"


class DamagedError(ToolmemError):
    """A file is not what was written."""


def dtypes() -> dict[str, torch.dtype]:
    """Torch's dtypes by safetensors' names of them."""
    import torch

    names = {
        "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
        "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
        "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
        "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    }  # fmt: skip
    return {name: getattr(torch, dtype) for name, dtype in names.items()}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    flat = tensor.reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def plain(tensor: Tensor) -> Tensor:
    """A tensor as its bytes are to be written: detached, on the CPU, contiguous; itself if it is so."""
    return tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()


class OnDisk(Protocol):
    """A tensor that is read when it is written."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""

    def read(self) -> Tensor:
        """Its elements."""


def write(path: Path, tensors: Mapping[str, Tensor | OnDisk], metadata: Mapping[str, str]) -> None:
    """Write a file; not in one step, and not synced: see ``toolmem.files.atomic_path``.

    Args:
        path: where to; an existing file is written over.
        tensors: by name; those that are not in the host's memory are fetched one at a time.
        metadata: what the header says beside.

    Raises:
        ToolmemError: for a tensor that the format has no name for.
        OSError: when the disk is full, or otherwise refuses.
    """
    import torch

    codes = {dtype: code for code, dtype in dtypes().items()}
    kinds = {
        name: tensor.dtype if isinstance(tensor, torch.Tensor) else tensor.torch_dtype
        for name, tensor in tensors.items()
    }
    # Large items first, so that each tensor begins at a multiple of its items' size.
    order = sorted(tensors, key=lambda name: -kinds[name].itemsize)
    header: dict[str, Any] = {"__metadata__": {**metadata, SUMS: "", CHECKSUM: NO_SUM}}
    end = 0
    for name in order:
        tensor = tensors[name]
        dense = not isinstance(tensor, torch.Tensor) or tensor.layout is torch.strided
        if kinds[name] not in codes or not dense or getattr(tensor, "is_meta", False):
            raise ToolmemError(
                f"{name}: a tensor of {kinds[name]}{'' if dense else ', sparse,'} cannot be written to a "
                "safetensors file"
            )
        begin, end = end, end + math.prod(tensor.shape) * kinds[name].itemsize
        header[name] = {
            "dtype": codes[kinds[name]], "shape": list(tensor.shape), "data_offsets": [begin, end]
        }  # fmt: skip
    sums = dict.fromkeys(order, NO_SUM)
    space = len(_header(header, sums))
    if space > LONGEST_HEADER:
        raise ToolmemError(
            f"{path}: the state beside the tensors takes {space} bytes, and a safetensors file has room for "
            f"{LONGEST_HEADER}"
        )
    with open(path, "wb") as stream:
        stream.seek(8 + space)
        for name in order:
            one = tensors[name]
            elements = one if isinstance(one, torch.Tensor) else one.read()
            sums[name] = _write_bytes(stream, _bytes_of(plain(elements)))
        text = _header(header, sums)
        text = text.replace(_mark(NO_SUM), _mark(f"{zlib.crc32(text):08x}"), 1)
        stream.seek(0)
        stream.write(len(text).to_bytes(8, "little") + text)


def _write_bytes(stream: BinaryIO, data: memoryview) -> str:
    total = 0
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        total = zlib.crc32(piece, total)
        stream.write(piece)
    return f"{total:08x}"


def _header(header: dict[str, Any], sums: Mapping[str, str]) -> bytes:
    header["__metadata__"][SUMS] = json.dumps(sums, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return text + b" " * (-len(text) % ALIGNMENT)


def _mark(digits: str) -> bytes:
    return f'"{CHECKSUM}":"{digits}"'.encode()


class Entry(NamedTuple):
    """Where a tensor lies in a file.

    Args:
        dtype: as safetensors calls it.
        shape: of the tensor.
        begin: offset of its first byte in the file.
        end: of the byte after its last.
        crc32: of its bytes; None where the file has none.
    """

    dtype: str
    shape: list[int]
    begin: int
    end: int
    crc32: str | None


class TensorFile:
    """An open file of tensors.

    Args:
        path: the file.

    Raises:
        DamagedError: when its header is not what was written, or it is cut off.
        OSError: when it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._stream = open(self.path, "rb")  # noqa: SIM115 (closed by close)
        try:
            size = os.fstat(self._stream.fileno()).st_size
            self.metadata, self.entries = self._parse(size)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def _parse(self, size: int) -> tuple[dict[str, str], dict[str, Entry]]:
        length = int.from_bytes(self._stream.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise DamagedError(f"{self.path}: it ends within its header")
        text = self._stream.read(length)
        try:
            header = json.loads(text)
            metadata = header.pop("__metadata__", {})
            self._check_header(text, metadata)
            sums = json.loads(metadata.get(SUMS, "{}"))
            entries = {
                name: Entry(
                    one["dtype"],
                    one["shape"],
                    8 + length + one["data_offsets"][0],
                    8 + length + one["data_offsets"][1],
                    sums.get(name),
                )
                for name, one in header.items()
            }
            missing = max((one.end for one in entries.values()), default=8 + length) - size
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{self.path}: its header is damaged ({error})") from error
        if missing > 0:
            raise DamagedError(f"{self.path}: its last {missing} bytes are missing")
        return metadata, entries

    @staticmethod
    def _check_header(text: bytes, metadata: Mapping[str, str]) -> None:
        written = metadata.get(CHECKSUM)
        if written is None and SUMS not in metadata:  # of another program
            return
        blank = re.sub(re.escape(_mark("")[:-1]) + rb'[^"]*"', _mark(NO_SUM), text, count=1)
        if f"{zlib.crc32(blank):08x}" != written:
            raise ValueError("its checksum differs")

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            DamagedError: when its bytes are not those that were written.
        """
        import torch

        entry = self.entries[name]
        dtype = dtypes().get(entry.dtype)
        data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        self._stream.seek(entry.begin)
        view, total = data.numpy().data, 0
        for start in range(0, len(view), PIECE):
            piece = view[start : start + PIECE]
            if self._stream.readinto(piece) != len(piece):
                raise DamagedError(f"{self.path}: it ends within the tensor {name}")
            total = zlib.crc32(piece, total)
        if entry.crc32 is not None and entry.crc32 != f"{total:08x}":
            raise DamagedError(f"{self.path}: the tensor {name} is damaged: its checksum differs")
        if dtype is None:
            raise ToolmemError(
                f"{self.path}: {name} has dtype {entry.dtype}, which is not known here"
            )
        try:
            if dtype.is_complex:
                return torch.view_as_complex(data.view(torch.float32).reshape(*entry.shape, 2))
            return data.view(dtype).reshape(entry.shape)
        except RuntimeError as error:
            raise DamagedError(f"{self.path}: the header's shape of {name} is damaged") from error

    def check(self, names: Iterable[str] | None = None) -> None:
        """Read all tensors, and keep none.

        Raises:
            DamagedError: naming the first that is not what was written.
        """
        for name in self.entries if names is None else names:
            self.read(name)
