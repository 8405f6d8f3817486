"""Answers to an evaluation's questions, on disk as they come: an evaluation that is killed goes on.

Its first line says what was asked of which model, ``{"format": 1, "about": {...}}``; then comes a line a
question, in the order asked, of whatever the evaluation notes of each: recall has
``{"split": "known", "attribute": ..., "correct": true, ...}``, a task ``{"line": 7, "scores": {...}, ...}``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error

if TYPE_CHECKING:
    from torch import nn

    from toolmem.data.dialogues import Dialogue

FORMAT = 1


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's weights, to the last bit."""
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of(texts: Iterable[str]) -> str:
    """A digest of texts in order."""
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(f"{len(data)} ".encode())
        digest.update(data)
    return digest.hexdigest()


def questions_digest(splits: Mapping[str, Sequence[Dialogue]]) -> str:
    """A digest of all questions and the dialogues that are expected, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for split, questions in splits.items():
        digest.update(f"{split} {len(questions)}".encode())
        for question in questions:
            turns = [[turn.role, turn.text] for turn in question.turns]
            digest.update(json.dumps([question.question, question.answer, turns]).encode())
    return digest.hexdigest()


class Answers:
    """A file of answers, added to as they come, each whole or not there.

    What it held is kept where it is about the same; a line that a killed process left unfinished is
    cut off. Close it after use.

    Args:
        path: the JSONL file; its folder is made.
        about: plain data that says what was asked, of which model, and how.

    Attributes:
        rows: the answers, in the order asked.

    Raises:
        ToolmemError: when it cannot be written.
    """

    def __init__(self, path: str | Path, about: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.rows: list[dict[str, Any]] = []
        self._ends: list[int] = []  # of each row, in bytes
        head = json.dumps({"format": FORMAT, "about": dict(about)}, ensure_ascii=False) + "\n"
        self._start = len(head.encode())
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            found = self.path.read_bytes() if self.path.is_file() else b""
            if found.startswith(head.encode()):
                self._take_up(found)
            self._file = open(self.path, "r+b" if self.rows else "wb")  # noqa: SIM115
            if not self.rows:
                self._file.write(head.encode())
            self.keep(len(self.rows))
        except OSError as error:
            raise explain_os_error(error, self.path) from error

    def _take_up(self, found: bytes) -> None:
        end = self._start
        for line in found[self._start :].splitlines(keepends=True):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError:  # after a crash of the machine
                return
            end += len(line)
            self.rows.append(row)
            self._ends.append(end)

    def keep(self, n: int) -> None:
        """Forget all but the first ``n`` answers."""
        del self.rows[n:], self._ends[n:]
        end = self._ends[-1] if self._ends else self._start
        self._file.flush()
        self._file.seek(end)
        self._file.truncate()

    def add(self, row: dict[str, Any]) -> None:
        """Write an answer down.

        Raises:
            ToolmemError: when the disk is full.
        """
        try:
            self._file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        self.rows.append(row)
        self._ends.append(self._file.tell())

    def close(self) -> None:
        """All are there: see that they stay."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_answers(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What a file of answers is about, and the answers in it.

    Raises:
        ToolmemError: when it is something else.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
        head, *rows = [json.loads(line) for line in lines]
        if head["format"] != FORMAT:
            raise KeyError("format")
        about = head["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ToolmemError(
            f"{path} is no file of answers that this version reads ({error!r})"
        ) from error
    return about, rows
