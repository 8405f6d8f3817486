"""A file for decoding state that neither the model's memory nor the host's has room for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error


class SpillFile:
    """Records of one size in a file without a name, which the system removes with the process.

    Args:
        folder: where it is made; the system's folder for temporary files when None.

    Raises:
        ToolmemError: when it cannot be made.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = str(folder or tempfile.gettempdir())
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - kept until `close`
        except OSError as error:
            raise explain_os_error(error, self.folder) from error
        self._size = 0
        self._end = 0
        self._free: list[int] = []

    @property
    def used_bytes(self) -> int:
        """Bytes of the records that are kept."""
        return self._size * (self._end - len(self._free))

    def write(self, tensors: Sequence[Tensor]) -> int:
        """Keep tensors on the host; always of the same sizes.

        Returns:
            the record's number.

        Raises:
            ToolmemError: when the disk is full.
        """
        data = b"".join(x.contiguous().view(torch.uint8).numpy().tobytes() for x in tensors)
        self._size = self._size or len(data)
        assert len(data) == self._size
        number = self._free.pop() if self._free else self._end
        try:
            done = 0
            while done < len(data):
                place = number * self._size + done
                done += os.pwrite(self._file.fileno(), memoryview(data)[done:], place)
        except OSError as error:
            self._free.append(number)
            self._end = max(self._end, number + 1)
            raise ToolmemError(
                f"decoding state could not be written to a file in {self.folder}: {error.strerror}; "
                "make room there, name another folder, or raise memory_limit or host_limit"
            ) from error
        self._end = max(self._end, number + 1)
        return number

    def read(self, number: int, like: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of a record, in the shapes and dtypes of ``like``."""
        data = os.pread(self._file.fileno(), self._size, number * self._size)
        assert len(data) == self._size
        raw = torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))
        tensors, start = [], 0
        for tensor in like:
            size = tensor.numel() * tensor.element_size()
            tensors.append(raw[start : start + size].view(tensor.dtype).view(tensor.shape))
            start += size
        return tensors

    def free(self, number: int) -> None:
        """Let a record be written over."""
        self._free.append(number)

    def close(self) -> None:
        """Remove the file."""
        self._file.close()
