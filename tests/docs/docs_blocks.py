"""Fenced blocks of a Markdown page: found, cut down to a small budget, and run in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(
    r"^(?P<mark><!-- not run: (?P<reason>.+?) -->\n\n?)?"
    r"^```(?P<language>\w+)(?P<options>[^\n]*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
TITLE = re.compile(r'title="([^"]+)"')
# What a command gets so that it ends soon. A later word wins over an earlier one.
CUT = {
    "demo": "--steps 5 --questions 8",
    "fit": (
        "--trainer.max_steps 4 --trainer.val_check_interval 4 --trainer.accelerator cpu "
        "--recall.n_questions 4 --recall.n_unseen 4"
    ),
    "evaluate": "--n_questions 8",
    "generate": "--max_new_tokens 40",
}
NEVER_RUN = ("make test", "make test-quick", "make docs", "make bench")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        page: the file, for messages.
        line: of the opening fence.
        language: python, bash, yaml, ...
        title: a file's name when the block is a file.
        code: what stands inside.
        reason: why it is not run; "" when it is.
    """

    page: Path
    line: int
    language: str
    title: str
    code: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        title = TITLE.search(match["options"])
        found.append(
            Block(
                page,
                text[: match.start("language")].count("\n") + 1,
                match["language"],
                title[1] if title else "",
                match["code"],
                match["reason"] or "",
            )
        )
    return found


def cut_down(code: str) -> str:
    """A shell block on a small budget; lines that only set up or test this very checkout go."""
    lines = []
    for line in code.replace("\\\n", " ").splitlines():
        if line.strip() == "make demo":
            line = "toolmem demo"
        if line.strip() in NEVER_RUN:
            continue
        for command, words in CUT.items():
            if re.search(rf"\btoolmem {command}\b(?! --compare)", line):
                line, hash_, comment = line.partition("  #")
                line = f"{line} {words}{hash_}{comment}"
        lines.append(line)
    return "\n".join(lines)


def run_page(page: Path, folder: Path, languages: tuple[str, ...] = ("python", "bash")) -> int:
    """Run a page's blocks in order: files are written, Python shares one namespace.

    Args:
        page: the Markdown file.
        folder: an empty one, to run in.
        languages: what to run.

    Returns:
        How many blocks ran.
    """
    for name in ("recipes", "docs"):
        link = folder / name
        if not link.exists():
            link.symlink_to(ROOT / name)
    namespace: dict[str, Any] = {"__name__": "docs"}
    ran = 0
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.reason:
            continue
        if block.title:
            file = folder / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.code, encoding="utf-8")
        elif block.language == "python" and "python" in languages:
            try:
                exec(compile(block.code, where, "exec"), namespace)
            except Exception as error:
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            ran += 1
        elif block.language == "bash" and "bash" in languages:
            ran += run_shell(cut_down(block.code), folder, where)
    return ran


def run_shell(code: str, folder: Path, where: str) -> int:
    """Run a shell block; fail with its output."""
    if not code.strip():
        return 0
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100"}
    environment["PYTHONPATH"] = str(ROOT)
    code = re.sub(r"\bPYTHONPATH=\.", f"PYTHONPATH=.:{shlex.quote(str(ROOT))}", code)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert not done.returncode, f"{where}:\n{code}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return 1
