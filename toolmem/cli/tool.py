"""``toolmem tool``: try a tool by hand, or ask it many things at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from toolmem.cli.functions import choose
from toolmem.console import progress, stdout
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error
from toolmem.jsonl import completed_rows, read_prompts

if TYPE_CHECKING:
    from toolmem.tools import Answer, SqlTool

CHUNK = 256  # queries between two writes to the output file


def sql(
    file: str,
    query: str | None = None,
    queries: str | None = None,
    out: str | None = None,
    timeout_s: float = 1.0,
    max_rows: int = 16,
    max_answer_bytes: int = 256,
) -> None:
    """Ask a factbase: one query, or a file of them.

    Args:
        file: the factbase, a DuckDB file with a table people.
        query: FIND attribute FOR name, or one SELECT over the table people.
        queries: a JSONL file of rows {"query": "..."}; needs --out.
        out: the JSONL file to write, one row a query, in order; goes on where it was killed.
        timeout_s: seconds after which a query is interrupted.
        max_rows: rows of an answer; more are an error answer.
        max_answer_bytes: bytes of an answer; more are an error answer.

    Raises:
        ToolmemError: for a file that cannot be used; a bad query is an error *answer*.
    """
    if (query is None) == (queries is None):
        raise ToolmemError("give either one QUERY, or --queries FILE.jsonl")
    if (queries is None) != (out is None):
        raise ToolmemError("--queries FILE.jsonl and --out FILE.jsonl go together")
    for option, value, least in (
        ("--timeout_s", timeout_s, 0.001),
        ("--max_rows", max_rows, 1),
        ("--max_answer_bytes", max_answer_bytes, 32),
    ):
        if not value >= least:
            raise ToolmemError(f"{option} {value}: it must be at least {least}")
    from toolmem.tools import SqlTool

    with SqlTool(
        file, timeout_s=timeout_s, max_rows=max_rows, max_answer_bytes=max_answer_bytes
    ) as tool:
        if query is not None:
            show(tool.answer(query))
        elif queries is not None and out is not None:
            answer_file(tool, Path(queries), Path(out))


def calculator(query: str) -> None:
    """Ask the calculator.

    Args:
        query: CALCULATE and an expression.
    """
    from toolmem.tools import Calculator

    show(Calculator().answer(query))


def show(answer: Answer) -> None:
    """Print an answer, red when it is an error."""
    style = "red" if answer.error else None
    stdout().print(answer.text, style=style, markup=False, highlight=False, soft_wrap=True)


def answer_file(tool: SqlTool, queries: Path, out: Path) -> None:
    """Answer every row of a JSONL file, in order, going on where an earlier call was killed.

    Raises:
        ToolmemError: naming a bad row of either file, or what cannot be written.
    """
    if out.resolve() == queries.resolve():
        raise ToolmemError(f"--out {out} is the file of queries itself: name another")
    texts = read_prompts(queries, field="query")
    done = completed_rows(out, texts, field="query")
    errors = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "a", encoding="utf-8") as stream, progress() as bar:
            task = bar.add_task("answering", total=len(texts), completed=done)
            for query, answer in answers(tool, texts[done:]):
                row = {
                    "query": query,
                    "answer": answer.text,
                    "error": answer.error,
                    "seconds": round(answer.seconds, 7),
                }
                # ASCII, so that whatever the query holds, a row is one line of valid UTF-8
                stream.write(json.dumps(row) + "\n")
                errors += answer.error
                done += 1
                if done % CHUNK == 0:
                    stream.flush()
                bar.update(task, completed=done)
    except OSError as error:
        raise explain_os_error(error, out) from error
    text = f"{out}: {len(texts):,} answers ({errors:,} errors among those asked now)"
    stdout().print(text, markup=False, highlight=False, soft_wrap=True)


def answers(tool: SqlTool, queries: Sequence[str]) -> Iterator[tuple[str, Answer]]:
    """Each query with its answer, in order; lookups by name are answered a chunk at a time."""
    for start in range(0, len(queries), CHUNK):
        chunk = list(queries[start : start + CHUNK])
        for query, quick in zip(chunk, tool.answer_now(chunk), strict=True):
            yield query, tool.answer(query) if quick is None else quick


def main(command: str, argv: list[str]) -> int:
    """Run ``toolmem tool``.

    Args:
        command: ``tool``.
        argv: the words after it.
    """
    choose(
        {
            "sql": (
                sql,
                ("file", "query"),
                'toolmem tool sql facts.duckdb "FIND birth_date FOR Ann Smith"',
            ),
            "calculator": (
                calculator,
                ("query",),
                'toolmem tool calculator "CALCULATE 1987 - 1950"',
            ),
        },
        argv,
        prog=f"toolmem {command}",
    )
    return 0
