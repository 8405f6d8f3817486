"""The walk-through of docs/fine-tuning.md, on SmolLM2-135M and a cut-down budget."""

from __future__ import annotations

import json
import re

import pytest
from docs_blocks import ROOT, blocks, cut_down, run_shell

PAGE = ROOT / "docs" / "fine-tuning.md"
HERE = "tests/docs/test_fine_tuning.py runs it"
SMALL = (
    " --data.people 4 --data.unseen_people 2 --data.batch_size 2 --trainer.limit_val_batches 1"
    " --recall.n_questions 1 --recall.n_unseen 1 --trainer.enable_progress_bar false"
)


@pytest.mark.slow
def test_the_walk_through(smollm2_gguf, tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / smollm2_gguf.name).symlink_to(smollm2_gguf)
    page = blocks(PAGE)
    mine = [block for block in page if block.title or HERE in block.reason]
    assert [block.language for block in mine] == ["bash", "python", "bash"]
    for block in mine:
        if block.title:
            (tmp_path / block.title).write_text(block.code.replace('"known", 8', '"known", 2'))
            continue
        code = re.sub(r"--n_questions \d+", "--n_questions 2", cut_down(block.code))
        code = re.sub(r"(toolmem fit [^\n]*)", rf"\1{SMALL} --trainer.max_steps 2", code)
        code = re.sub(r"--max_new_tokens \d+", "--max_new_tokens 12", code)
        run_shell(code, tmp_path, f"{PAGE.name}, line {block.line}")
    found = json.loads((tmp_path / "asks.json").read_text())
    assert found["step"] == 2 and found["recall"]["known"]["total"] == 2
    rows = (tmp_path / "runs" / "asks" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,")


def test_the_page_shows_dialogues_as_they_are():
    """The example is what SmolLM2's template makes of it, with an empty system's message."""
    from chat_templates import chat_tokenizer

    from toolmem.data.dialogues import Dialogue, Turn
    from toolmem.data.text.token_table import encode_dialogue

    [shown] = [block.code for block in blocks(PAGE) if block.language == "text"]
    turns = [
        ("user", "When was Ann Smith born?"), ("assistant", "FIND birth_date FOR Ann Smith"),
        ("database", "7 May 1960"), ("assistant", "Ann Smith was born on 7 May 1960."),
    ]  # fmt: skip
    tokenizer = chat_tokenizer().with_system("")
    dialogue = Dialogue(tuple(Turn(*turn) for turn in turns), "", "", "")
    assert tokenizer.decode(encode_dialogue(dialogue, tokenizer)[0]) == shown.rstrip("\n")
