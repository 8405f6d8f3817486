"""Files that vanish or change under a run are refused by name, while it trains and when it goes on."""

from __future__ import annotations

import json
import os
import shutil
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolmem.data.modules.text import TextDataModule
from toolmem.data.text.documents import Documents
from toolmem.errors import ToolmemError

N = 40


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for shard in range(8):
        texts = [f"document {shard} {i} " + "x" * 300 for i in range(N)]
        name = folder / ("deep" if shard % 2 else "") / f"s{shard}"
        if shard < 4:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            name.with_suffix(".jsonl").write_text(lines)
        else:
            pq.write_table(pa.table({"text": texts}), name.with_suffix(".parquet"))
    return folder


def spoil(path, how):
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "shorter":
        path.write_bytes(content[:-300] if path.suffix == ".jsonl" else content[:-20])
    elif how == "appended":
        path.write_bytes(content + b'{"text": "more"}\n')
    elif how == "rewritten":  # of the same size
        path.write_bytes(content.replace(b"document", b"deposits"))
    os.utime(path, ns=(1, 1)) if path.exists() else None


@pytest.mark.parametrize("how", ["gone", "shorter", "appended", "rewritten"])
@pytest.mark.parametrize("name", ["deep/s1.jsonl", "s6.parquet"])
@pytest.mark.parametrize("policy", ["fatal", "skip"])
def test_under_a_run(how, name, policy, corpus):
    documents = Documents(corpus, shuffle_bytes=4000, on_bad_document=policy)
    stream = documents.iterate()
    next(stream)
    spoil(corpus / name, how)
    what = "is gone" if how == "gone" else "has changed since"
    with pytest.raises(ToolmemError, match=rf"{os.path.basename(name)} .*{what}"):
        list(islice(stream, 9 * N))


def make(path, **options):
    return TextDataModule(str(path), seq_len=64, batch_size=4, **options)


@pytest.mark.parametrize("how", ["gone", "shorter", "appended", "rewritten"])
def test_on_going_on(how, corpus):
    data = make(corpus)
    for batch in islice(data.train_dataloader(), 5):
        data.consumed(batch.state)
    state = json.loads(json.dumps(data.state_dict()))
    spoil(corpus / "deep" / "s3.jsonl", how)
    resumed = make(corpus)
    resumed.load_state_dict(state)
    what = "is gone" if how == "gone" else "has changed"
    with pytest.raises(
        ToolmemError, match=rf"path: deep/s3\.jsonl {what} since its run read it .8 f"
    ):
        resumed.train_dataloader()
    if how == "gone":
        return
    (corpus / "s9.jsonl").write_text('{"text": "new"}\n')
    (corpus / "deep" / "s3.jsonl").unlink()
    more = make(corpus)
    more.load_state_dict(state)
    with pytest.raises(ToolmemError, match=r"s3\.jsonl is gone since"):
        more.train_dataloader()


def test_a_moved_and_touched_corpus_is_the_same(corpus, tmp_path):
    data = make(corpus)
    stream = iter(data.train_dataloader())
    for batch in islice(stream, 5):
        data.consumed(batch.state)
    for path in corpus.rglob("*.*"):
        os.utime(path, ns=(5, 5))  # the same content: training goes on
    following = next(stream)
    shutil.copytree(corpus, tmp_path / "elsewhere" / "copy")
    resumed = make(tmp_path / "elsewhere" / "copy")
    resumed.load_state_dict(data.state_dict())
    assert next(iter(resumed.train_dataloader())).tokens.equal(following.tokens)


def test_one_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox\n" * 900)
    data = make(path)
    data.setup()
    data.consumed(next(iter(data.train_dataloader())).state)
    state = data.state_dict()
    assert set(state["shards"]) == {"text.txt"}
    path.write_text("the quick brown cat\n" * 900)
    with pytest.raises(ToolmemError, match=r"text\.txt has changed since its run listed it"):
        data.state_dict()
    other = make(path)
    other.setup()
    other.load_state_dict(state)
    with pytest.raises(ToolmemError, match=r"path: text\.txt has changed since its run read it"):
        other.train_dataloader()


def test_a_state_from_before_files_were_kept(corpus):
    """Checkpoints of earlier versions say nothing of files: they go on by names and sizes alone."""
    data = make(corpus)
    data.consumed(next(iter(data.train_dataloader())).state)
    state = data.state_dict()
    del state["shards"]
    resumed = make(corpus)
    resumed.load_state_dict(state)
    next(iter(resumed.train_dataloader()))
