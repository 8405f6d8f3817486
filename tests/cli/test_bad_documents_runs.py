"""A run over a corpus with bad documents: fatal in a plain sentence, or counted in its metrics."""

from __future__ import annotations

import csv
import json

import pytest
from cli_toys import changed, write_config

from toolmem.data.text import sources


@pytest.fixture
def corpus(tmp_path):
    sources._told.clear()
    lines = [json.dumps({"text": f"document {i} " + "word " * (i % 9)}) for i in range(200)]
    lines[5] = lines[150] = '{"text": "cut'
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(lines))
    return path


def recipe(corpus, tmp_path, **options):
    data = {"path": str(corpus), "seq_len": 32, "batch_size": 4, "val_batches": 1} | options
    return write_config(
        tmp_path / "text.yaml",
        changed(
            data={"class_path": "toolmem.data.TextDataModule", "init_args": data},
        ),
    )


def rows(run):
    with open(run / "metrics.csv", newline="") as stream:
        return [row for row in csv.DictReader(stream) if row.get("data/bad_documents")]


def test_fatal(corpus, tmp_path, toolmem):
    config = recipe(corpus, tmp_path)
    called = toolmem("fit", "--config", config, "--runs", tmp_path, "--name", "run")
    assert called.code == 2 and "Traceback" not in called.err
    assert "corpus.jsonl, line 6: not JSON" in called.err
    assert "pass over such documents: --data.on_bad_document skip" in called.err


def test_skipped_counted_and_resumed(corpus, tmp_path, toolmem):
    config = recipe(corpus, tmp_path, on_bad_document="skip")
    words = ["fit", "--config", config, "--runs", tmp_path]
    called = toolmem(*words, "--name", "whole")
    assert called.code == 0, called.err
    assert "2 documents could not be read and were passed over" in called.err
    counts = [float(row["data/bad_documents"]) for row in rows(tmp_path / "whole")]
    assert counts and counts[-1] == 2
    toolmem(*words, "--name", "parts", "--trainer.max_steps", "4")
    called = toolmem(*words, "--name", "parts", "--resume", "auto")
    assert called.code == 0, called.err
    assert [row["data/bad_documents"] for row in rows(tmp_path / "parts")] == [
        row["data/bad_documents"] for row in rows(tmp_path / "whole")
    ]
