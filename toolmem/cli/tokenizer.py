"""``toolmem tokenizer train``: make a tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from toolmem.errors import ToolmemError


def train(
    paths: list[str],
    vocab_size: int = 4096,
    out: str = "tokenizer.json",
    text_field: str = "text",
    max_chars: int = 50_000_000,
) -> None:
    """Train a byte-level BPE tokenizer on text files, and write it as a tokenizer.json.

    The same files give the same tokenizer.

    Args:
        paths: .txt, .jsonl or .parquet files, folders or globs.
        vocab_size: ids wanted, the four role tokens included.
        out: the file to write.
        text_field: the Parquet column or JSON key that holds the text.
        max_chars: characters to train on at most; more text hardly changes the result.
    """
    from toolmem.console import progress, stdout
    from toolmem.data.hf_tokenizer import save_tokenizer, train_tokenizer
    from toolmem.data.text.documents import Documents

    documents = Documents([*paths], field=text_field)
    if Path(out).is_dir():
        raise ToolmemError(f"{out} is a folder: name the file to write with --out")
    counts = {"characters": 0, "documents": 0}
    total = min(max_chars, sum(chunk.size for chunk in documents.chunks))
    with progress() as bar:
        task = bar.add_task("reading characters", total=total)

        def texts() -> Iterator[str]:
            for text in documents.once():
                counts["characters"] += len(text)
                counts["documents"] += 1
                bar.update(task, completed=min(counts["characters"], total))
                yield text
                if counts["characters"] >= max_chars:
                    break
            bar.update(task, completed=total)
            bar.update(task, description="merging pairs")

        tokenizer = train_tokenizer(texts(), vocab_size)
    if not counts["characters"]:
        raise ToolmemError(f"there is no text in {', '.join(paths)}: give other files")
    save_tokenizer(tokenizer, out)
    stdout().print(
        f"{out}: {tokenizer.vocab_size:,} ids from {counts['characters']:,} characters of "
        f"{counts['documents']:,} documents",
        highlight=False,
        soft_wrap=True,
    )
    if tokenizer.vocab_size < vocab_size:
        stdout().print(f"(fewer than the {vocab_size:,} asked for: the text has no more pairs)")


def main(command: str, argv: list[str]) -> int:
    """Entry of ``toolmem tokenizer``."""
    from toolmem.cli.functions import choose

    example = "toolmem tokenizer train shards/*.parquet --vocab_size 8192 --out tokenizer.json"
    choose({"train": (train, ["paths"], example)}, argv, prog=f"toolmem {command}")
    return 0
