"""GGUF files: metadata and tensors, read as they lie on disk, and written.

A file is (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    "GGUF", version, number of tensors, number of metadata entries
    metadata    key, type, value: numbers, strings, arrays of them
    tensors     name, dimensions (the last one first), type, offset into the data
    padding to a multiple of general.alignment
    data        tensors, each at a multiple of the alignment

Values are little-endian. A quantised tensor's rows are in blocks of a few dozen numbers; what a block means
is the affair of the library ``gguf``. Its reader is not used: it takes a second and 100 MB for the header of
a small model, and stumbles over damaged files in a dozen ways.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from toolmem.models.interop.rules import Lazy

MAGIC = b"GGUF"
ALIGNMENT = 32
# Types of metadata values: number -> struct's letter; 8 is a string, 9 an array.
NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
STRING, ARRAY = 8, 9
UINT32, INT32, FLOAT32, BOOL = 4, 5, 6, 7
# Types of tensors: number -> its name, numbers and bytes of a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
}  # fmt: skip
CODES = {name: code for code, (name, _, _) in TYPES.items()}
WRITABLE = ("F32", "F16", "BF16", "Q8_0")
DEEPEST = 4  # arrays within arrays


class DamagedGGUFError(ToolmemError):
    """A file is not what its header says."""


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor, as it lies on disk.

    Args:
        file: where.
        name: its own.
        shape: rows first, as torch has it.
        kind: of ``TYPES``.
        begin: offset of its first byte in the file.
        end: of the byte behind its last.
    """

    file: GGUFFile
    name: str
    shape: tuple[int, ...]
    kind: str
    begin: int
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """What it is read as: float32 where it is quantised."""
        import torch

        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(self.kind, torch.float32)

    def read(self) -> Tensor:
        """Its elements, in memory of their own."""
        import numpy as np
        import torch

        raw = np.frombuffer(self.file.data, np.uint8, self.end - self.begin, self.begin)
        if self.kind in ("F32", "F16", "BF16"):
            return torch.from_numpy(raw.copy()).view(self.torch_dtype).reshape(self.shape)
        return torch.from_numpy(_dequantize(raw, self.kind, self.shape))


def _dequantize(raw: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    quants, constants = _library()
    _, block, size = TYPES[CODES[kind]]
    rows = raw.reshape(-1, shape[-1] // block * size)
    values = quants.dequantize(rows, constants.GGMLQuantizationType[kind])
    return values.reshape(shape)


def _library() -> tuple[Any, Any]:
    try:
        from gguf import constants, quants
    except ImportError as error:
        raise ToolmemError(
            "quantised GGUF files need the library gguf: pip install 'toolmem[hub]'"
        ) from error
    return quants, constants


class GGUFFile:
    """An open GGUF file: metadata at hand, tensors still on disk.

    Args:
        path: the file.

    Raises:
        DamagedGGUFError: when it is no GGUF file, or not whole.
        ToolmemError: for a version or a tensor's type that is not read here, naming it.
        OSError: when it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open(self.path, "rb") as stream:
            if stream.read(4) != MAGIC:
                raise DamagedGGUFError(f"{self.path} is no GGUF file: it does not begin with GGUF")
            self.data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._at = 4
            self._parse()
        except (struct.error, IndexError, OverflowError, MemoryError) as error:
            self.close()
            raise self._damaged("it ends within its header") from error
        except UnicodeDecodeError as error:
            self.close()
            raise self._damaged("a name in its header is no text") from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, unless a tensor's bytes are in use still: then with the last of them."""
        with contextlib.suppress(BufferError):
            self.data.close()

    def _damaged(self, what: str) -> DamagedGGUFError:
        return DamagedGGUFError(
            f"{self.path} cannot be read as GGUF ({what}): it is truncated or corrupt; fetch it again"
        )

    def _number(self, letter: str) -> Any:
        [value] = struct.unpack_from("<" + letter, self.data, self._at)
        self._at += struct.calcsize("<" + letter)
        return value

    def _bytes(self, length: int) -> bytes:
        if length > len(self.data) - self._at:
            raise IndexError
        self._at += length
        return self.data[self._at - length : self._at]

    def _text(self) -> str:
        return self._bytes(self._number("Q")).decode()

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in NUMBERS:
            return self._number(NUMBERS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY or depth == DEEPEST:
            raise self._damaged(f"it has a metadata value of type {kind}")
        inner, length = self._number("I"), self._number("Q")
        if inner in NUMBERS:
            size = struct.calcsize("<" + NUMBERS[inner])
            raw = self._bytes(length * size)
            return list(struct.unpack(f"<{length}{NUMBERS[inner]}", raw))
        if length > len(self.data) - self._at:  # a string takes 8 bytes at least
            raise IndexError
        return [self._value(inner, depth + 1) for _ in range(length)]

    def _parse(self) -> None:
        version = self._number("I")
        if version not in (2, 3):
            raise ToolmemError(f"{self.path} is a GGUF file of version {version}; 2 and 3 are read")
        n_tensors, n_entries = self._number("Q"), self._number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(n_entries):
            key = self._text()
            self.metadata[key] = self._value(self._number("I"))
        heads = [self._head() for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damaged(f"its alignment is {alignment!r:.40}")
        start = -(-self._at // alignment) * alignment
        self.tensors: dict[str, GGUFTensor] = {}
        for name, shape, code, offset in heads:
            if code not in TYPES:
                raise ToolmemError(
                    f"{self.path}: the tensor {name} is of type {_type_name(code)}, which is not read "
                    f"here; there are {', '.join(CODES)}"
                )
            kind, block, size = TYPES[code]
            if not shape or shape[-1] % block or name in self.tensors:
                raise self._damaged(f"the shape of the tensor {name:.80} is {list(shape)}")
            begin = start + offset
            end = begin + math.prod(shape) // block * size
            if end > len(self.data):
                raise self._damaged(
                    f"the last {end - len(self.data):,} bytes of the tensor {name:.80} are missing"
                )
            self.tensors[name] = GGUFTensor(self, name, shape, kind, begin, end)

    def _head(self) -> tuple[str, tuple[int, ...], int, int]:
        name, n = self._text(), self._number("I")
        if n > 8:
            raise self._damaged(f"the tensor {name:.80} has {n} dimensions")
        shape = tuple(reversed([self._number("Q") for _ in range(n)]))
        return name, shape, self._number("I"), self._number("Q")


def _type_name(code: int) -> str:
    try:
        return str(_library()[1].GGMLQuantizationType(code).name)
    except (ToolmemError, ValueError):
        return f"number {code}"


# Writing


def kind_for(name: str, shape: Sequence[int], kind: str) -> str:
    """The type that a tensor gets in a file of this type: norms and biases are kept in float32.

    A writer of another quantised type has its place in ``WRITABLE`` and ``encode``, and here where it wants
    some tensors more exact than others.

    Args:
        name: the tensor's.
        shape: its shape.
        kind: of the file.
    """
    if len(shape) < 2:
        return "F32"
    if kind == "Q8_0" and shape[-1] % TYPES[CODES[kind]][1]:
        return "F16"
    return kind


def encode(tensor: Tensor, kind: str) -> np.ndarray:
    """A tensor's bytes in a type of ``WRITABLE``, (n,) uint8."""
    import numpy as np
    import torch

    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    if kind in dtypes:
        return tensor.to(dtypes[kind]).contiguous().reshape(-1).view(torch.uint8).numpy()
    quants, constants = _library()
    blocks = quants.quantize(tensor.float().numpy(), constants.GGMLQuantizationType[kind])
    return np.ascontiguousarray(blocks).reshape(-1).view(np.uint8)


def write_gguf(
    path: Path, metadata: Mapping[str, tuple[int, Any]], tensors: Mapping[str, Lazy], kind: str
) -> None:
    """Write a file; not in one step: see ``toolmem.files.atomic_path``.

    Args:
        path: where to.
        metadata: key -> type number and value; of arrays the type of what is in them, and a list.
        tensors: by name; read one at a time.
        kind: of ``WRITABLE``.
    """
    kinds = {name: kind_for(name, tensor.shape, kind) for name, tensor in tensors.items()}
    with open(path, "wb") as stream:
        stream.write(MAGIC + struct.pack("<IQQ", 3, len(tensors), len(metadata)))
        for key, (number, value) in metadata.items():
            _write_text(stream, key)
            _write_value(stream, number, value)
        offset = 0
        for name, tensor in tensors.items():
            _, block, size = TYPES[CODES[kinds[name]]]
            shape = tuple(tensor.shape)
            _write_text(stream, name)
            stream.write(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
            stream.write(struct.pack("<IQ", CODES[kinds[name]], offset))
            offset += _padded(math.prod(shape) // block * size)
        _pad(stream)
        for name, tensor in tensors.items():
            stream.write(encode(tensor.read().detach().cpu(), kinds[name]).data)
            _pad(stream)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % ALIGNMENT))


def _write_text(stream: BinaryIO, text: str) -> None:
    data = text.encode("utf-8", "surrogatepass")
    stream.write(struct.pack("<Q", len(data)) + data)


def _write_value(stream: BinaryIO, number: int, value: Any) -> None:
    if isinstance(value, list):
        stream.write(struct.pack("<IIQ", ARRAY, number, len(value)))
        if number != STRING:
            stream.write(struct.pack(f"<{len(value)}{NUMBERS[number]}", *value))
            return
        for one in value:
            _write_text(stream, one)
        return
    stream.write(struct.pack("<I", number))
    if number == STRING:
        _write_text(stream, value)
    else:
        stream.write(struct.pack("<" + NUMBERS[number], value))
