"""JSONL files of prompts, and output files that are gone on with where a process was killed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.files import write_text


def read_rows(path: Path, example: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every row with its line number, from 1; empty lines are passed over.

    Args:
        path: a JSONL file, one object a line.
        example: what a row looks like, for messages.

    Raises:
        ToolmemError: naming file and line.
    """
    try:
        # Not splitlines(): U+2028, U+0085 and their like may stand within a row.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise ToolmemError(f"{path} does not exist: give a JSONL file of {example}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ToolmemError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ToolmemError(f"{path}, line {number}: not JSON ({error.msg})") from error
        except RecursionError as error:
            raise ToolmemError(f"{path}, line {number}: nested too deeply") from error
        if not isinstance(value, dict):
            raise ToolmemError(f"{path}, line {number}: expected {example}")
        yield number, value


def read_prompts(path: Path, field: str = "prompt") -> list[str]:
    """The text of every row.

    Args:
        path: a JSONL file, one object a line.
        field: the key that holds the text.

    Raises:
        ToolmemError: naming file and line.
    """
    example = f'{{"{field}": "..."}}'
    texts: list[str] = []
    for number, row in read_rows(path, example):
        if not isinstance(row.get(field), str):
            raise ToolmemError(f"{path}, line {number}: expected {example}")
        texts.append(row[field])
    if not texts:
        raise ToolmemError(f"{path} holds no {field}")
    return texts


def completed_rows(path: Path, texts: list[str], field: str = "prompt") -> int:
    """How many rows of an output file are whole; a line that a killed process left is cut off.

    Args:
        path: the output file; 0 when it does not exist.
        texts: what the rows must answer, in order.
        field: the key that holds the text.

    Raises:
        ToolmemError: when the file answers something else.
    """
    if not path.exists():
        return 0
    if not path.is_file():
        raise ToolmemError(f"{path} is not a file: name another --out")
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    rows = whole.decode("utf-8", "replace").split("\n")[:-1]
    for number, line in enumerate(rows, start=1):
        try:
            found = json.loads(line).get(field)
        except (json.JSONDecodeError, AttributeError):
            found = None
        if number > len(texts) or found != texts[number - 1]:
            raise ToolmemError(
                f"{path}, line {number} is not the answer to {field} {number} of the input: it "
                "belongs to another call; move it away, or name another --out"
            )
    if len(whole) != len(data):
        with open(path, "r+b") as stream:
            stream.truncate(len(whole))
    return len(rows)


def failed_rows(path: Path) -> dict[int, str]:
    """Rows of an output file that say ``error`` instead of an answer: what they say, by number from 0.

    Args:
        path: the output file, all rows whole; none when it does not exist.
    """
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    return {number: str(row["error"]) for number, row in enumerate(rows) if "error" in row}


def replace_rows(path: Path, others: Mapping[int, str]) -> None:
    """Put other lines in the place of some rows, in one step.

    Args:
        path: the output file, all rows whole.
        others: line by number from 0.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in others.items():
        lines[number] = line
    write_text(path, "\n".join(lines))
