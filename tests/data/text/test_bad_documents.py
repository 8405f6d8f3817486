"""Documents that cannot be read: named and fatal, or counted, told and passed over the same way each time."""

from __future__ import annotations

import gzip
import json
import logging
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from toolmem.data.modules.text import TextDataModule
from toolmem.data.stream import make_loader
from toolmem.data.text import sources
from toolmem.data.text.documents import Documents
from toolmem.data.text.tokens import TokenGenerator
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError

# Lines of a JSONL file that are no documents, and what is said of each.
BAD_LINES = {
    b'{"text": "cut': "not JSON",
    b"\xff\xfe": "not JSON",
    b'{"text": "\xc3"}': "not JSON",
    b"[" * 100_000: "not JSON",
    b"7" * 5000: "not JSON",
    b'["text"]': "a JSON list, not an object",
    b"null": "a JSON NoneType, not an object",
    b'{"body": "b"}': "no field 'text'",
    b'{"text": 7}': "is not text but 7",
    b'{"text": null}': "is not text but None",
    b'{"text": {"text": "deep"}}': "is not text but {",
}


def line(text):
    return json.dumps({"text": text}).encode()


@pytest.fixture(autouse=True)
def untold():
    sources._told.clear()


@pytest.mark.parametrize("content", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_line_is_fatal_or_passed_over(content, tmp_path, caplog):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([line("a"), b"", content, line("b")]))
    words = rf"f\.jsonl, line 3: .*{BAD_LINES[content].replace('{', '.')}.*on_bad_document skip"
    with pytest.raises(ToolmemError, match=words):
        list(Documents(path, shuffle=False).once())
    with caplog.at_level(logging.WARNING, "toolmem.data"):
        assert list(Documents(path, shuffle=False, on_bad_document="skip").once()) == ["a", "b"]
    [said] = caplog.messages
    assert "f.jsonl, line 3: " in said and BAD_LINES[content] in said and "passed over" in said


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.lists(
        st.tuples(st.text(max_size=30), st.none() | st.sampled_from(list(BAD_LINES)[:3]))
    ),
    chunk=st.integers(1, 200),
    packed=st.booleans(),
    shards=st.integers(1, 3),
)
def test_what_is_left_is_what_plain_reading_leaves(
    rows, chunk, packed, shards, tmp_path, monkeypatch
):
    """Any mixture, cut anywhere, shared by any readers: every good line once, every bad one counted."""
    monkeypatch.setattr(sources, "JSONL_CHUNK_BYTES", chunk)
    lines = [bad if bad is not None else line(text) for text, bad in rows]
    path = tmp_path / ("f.jsonl.gz" if packed else "f.jsonl")
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if packed else content)
    good = sorted(text for text, bad in rows if bad is None and text)
    n_bad = sum(bad is not None for _, bad in rows)
    documents = Documents(path, on_bad_document="skip", shuffle_bytes=300)
    found, counted, starved = [], 0, False
    for number in range(shards):
        shard = documents.shard(number, shards)
        share = list(shard.once())
        found += share
        if share:
            stream = list(islice(shard.iterate(), len(share) + 1))
            assert sorted(placed.text for placed in stream[: len(share)]) == sorted(share)
            counted += stream[-1].place["bad"]  # the first of the second epoch knows of all
        else:
            with pytest.raises(ToolmemError, match="no document for all"):
                next(shard.iterate())
            starved = True
    assert sorted(found) == good
    if not starved:
        assert counted == n_bad


def test_a_gigantic_line_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(sources, "JSONL_CHUNK_BYTES", 64)
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([line("a"), line("x" * 3000), line("b"), line("y" * 5000)]))
    with pytest.raises(ToolmemError, match="line 2: a line of more than 0 MiB; split it"):
        list(Documents(path, shuffle=False).once())
    skipping = Documents(path, shuffle=False, on_bad_document="skip")
    assert list(skipping.once()) == ["a", "b"]
    assert list(islice(skipping.iterate(), 3))[-1].place["bad"] == 2
    monkeypatch.setattr(sources, "MAX_UNPACKED_BYTES", 2000)
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress((line("z" * 100) + b"\n") * 100))
    for policy in ("fatal", "skip"):
        with pytest.raises(ToolmemError, match="unpacks to more than"):
            list(Documents(bomb, on_bad_document=policy).once())


def test_truncated_and_damaged_archives(tmp_path):
    packed = gzip.compress(b"\n".join(line(f"document {i}") for i in range(2000)))
    path = tmp_path / "f.jsonl.gz"
    for content in (packed[: len(packed) // 2], b"plain text", packed[:-8] + b"\0" * 8, b""):
        path.write_bytes(content)
        skipping = Documents(path, shuffle=False, on_bad_document="skip")
        if content:
            with pytest.raises(ToolmemError, match=r"f\.jsonl\.gz, line \d+: .*fetch it again"):
                list(Documents(path).once())
        found = list(skipping.once())
        # what was unpacked before the damage stands, in its order
        assert found == [f"document {i}" for i in range(len(found))] == list(skipping.once())


def parquet(path, texts, rows=10):
    pq.write_table(pa.table({"text": texts}), path, row_group_size=rows, compression="none")


def break_row_group(path, number):
    """Overwrite the pages of a row group, and leave the footer."""
    column = pq.ParquetFile(path).metadata.row_group(number).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(path.read_bytes())
    content[first : first + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)


def test_a_corrupt_row_group_is_fatal_or_passed_over(tmp_path, caplog):
    path = tmp_path / "f.parquet"
    parquet(path, [f"text {i}" for i in range(50)])
    break_row_group(path, 2)
    with pytest.raises(ToolmemError, match=r"f\.parquet, row group 2: cannot be read"):
        list(Documents(path, shuffle=False).once())
    skipping = Documents(path, shuffle=False, on_bad_document="skip")
    with caplog.at_level(logging.WARNING, "toolmem.data"):
        left = list(skipping.once())
    assert left == [f"text {i}" for i in range(50) if not 20 <= i < 30]
    assert ["f.parquet, row group 2: cannot be read" in said for said in caplog.messages] == [True]
    assert list(islice(skipping.iterate(), 41))[-1].place["bad"] == 10
    parquet(path, ["a", None, "b"])
    nulls = Documents(path, shuffle=False, on_bad_document="skip")
    assert list(nulls.once()) == ["a", "b"]


def test_shards_that_are_no_parquet(tmp_path):
    parquet(tmp_path / "a.parquet", ["one", "two"])
    for content in (b"", b"PAR1", b"PAR1" + b"\xff" * 500 + b"PAR1", b"nothing"):
        (tmp_path / "b.parquet").write_bytes(content)
        with pytest.raises(ToolmemError, match=r"b\.parquet is not a whole Parquet file"):
            Documents(tmp_path)
        skipping = Documents(tmp_path, on_bad_document="skip")
        assert sorted(skipping.once()) == ["one", "two"]
        assert next(skipping.iterate()).place["bad"] == 1
        assert [next(skipping.shard(i, 2).iterate()).place["bad"] for i in (0, 1)] == [1, 0]


def test_another_column_is_never_passed_over(tmp_path):
    path = tmp_path / "f.parquet"
    parquet(path, ["a"])
    with pytest.raises(ToolmemError, match="has no column 'body'"):
        list(Documents(path, field="body", on_bad_document="skip").once())
    lines = tmp_path / "f.jsonl"
    lines.write_bytes(line("a") + b"\n" + line("b"))
    with pytest.raises(
        ToolmemError, match=r"no document for all .2 cannot be read, and were passed"
    ):
        next(Documents(lines, field="body", on_bad_document="skip").iterate())


def test_empty_files(tmp_path):
    for name in ("a.jsonl", "b.txt", "c.jsonl.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ToolmemError, match="no document for all"):
        next(Documents(tmp_path).iterate())
    (tmp_path / "d.jsonl").write_bytes(line("one"))
    assert list(Documents(tmp_path).once()) == ["one"]


def test_text_that_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff")
    (tmp_path / "b.txt").write_text("fine")
    assert list(Documents(tmp_path, on_bad_document="skip").once()) == ["fine"]


def test_telling_has_an_end(tmp_path, caplog):
    path = tmp_path / "f.jsonl"
    path.write_bytes(b"\n".join([line("good"), *[b"bad"] * 500]))
    with caplog.at_level(logging.WARNING, "toolmem.data"):
        placed = list(islice(Documents(path, on_bad_document="skip").iterate(), 2))[-1]
    assert placed.place["bad"] == 500
    assert len(caplog.messages) == 101 and "not told one by one" in caplog.messages[-1]


def test_an_unknown_policy(tmp_path):
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(ToolmemError, match="choose one of fatal, skip"):
        Documents(tmp_path, on_bad_document="ignore")


@pytest.fixture
def spoilt(tmp_path):
    """A corpus where every 7th line and one row group are bad."""
    folder = tmp_path / "spoilt"
    folder.mkdir()
    texts = [f"<{i}>" + "abcdefghij" * (i % 7) for i in range(120)]
    lines = [b"bad" if i % 7 == 0 else line(text) for i, text in enumerate(texts)]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines))
    parquet(folder / "b.parquet", texts[:40])
    break_row_group(folder / "b.parquet", 1)
    return folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_passing_over_is_resumable(spoilt, num_workers, take):
    def make():
        documents = Documents(spoilt, shuffle_bytes=700, seed=5, on_bad_document="skip")
        return TokenGenerator(documents, ByteTokenizer(), 32, 3, num_workers=num_workers)

    batches = take(make_loader(make(), num_workers), 90)
    state = make().state_dict()
    counts = []
    for n, batch in enumerate(batches):
        if n in (3, 17, 40, 75):
            resumed = make()
            resumed.load_state_dict(json.loads(json.dumps(state)))
            for again, before in zip(
                take(make_loader(resumed, num_workers), 5), batches[n:], strict=False
            ):
                assert again.tokens.equal(before.tokens) and again.state == before.state
        state = make().merge_state(state, batch.state)
        counts.append(sum(r["document"]["bad"] for r in state["readers"].values()))
    assert counts == sorted(counts) and counts[-1] == 18 + 10  # lines, and rows of the group


def test_the_module_counts(spoilt):
    data = TextDataModule(str(spoilt), seq_len=32, batch_size=4, on_bad_document="skip")
    assert data.bad_documents == 0
    for batch in islice(data.train_dataloader(), 60):
        data.consumed(batch.state)
    assert data.bad_documents == 28
    other = TextDataModule(str(spoilt), seq_len=32, batch_size=4)
    other.load_state_dict(data.state_dict())
    assert other._stream_state["readers"]["0"]["document"]["bad"] == 28
    fatal = TextDataModule(str(spoilt), seq_len=32, batch_size=4, on_bad_document="skip")
    fatal.load_state_dict(other.state_dict())
    with pytest.raises(ToolmemError, match=r"data.init_args.on_bad_document is 'skip'.*had None"):
        fatal.train_dataloader()
