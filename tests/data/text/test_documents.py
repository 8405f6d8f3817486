import gzip
import json
import sys
from collections import Counter
from itertools import islice
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolmem.data.text import sources
from toolmem.data.text.documents import Documents, open_documents
from toolmem.data.text.hub import HubDocuments
from toolmem.errors import ToolmemError

N = 300
TEXTS = [f"document {i} é " + "x" * (i % 17) for i in range(N)]


@pytest.fixture(params=["jsonl", "jsonl.gz", "parquet", "txt"])
def corpus(request, tmp_path, monkeypatch):
    """The same documents in each kind of file, in pieces of many sizes."""
    monkeypatch.setattr(sources, "JSONL_CHUNK_BYTES", 97)  # cuts within lines and between them
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for part, name in enumerate(("deep/a", "b", "c")):
        texts = TEXTS[part * 100 : (part + 1) * 100]
        path = folder / f"{name}.{request.param}"
        lines = "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts)
        if request.param == "jsonl":
            path.write_text(lines.rstrip("\n") if part else lines + "\n\n")
        elif request.param == "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        elif request.param == "parquet":
            pq.write_table(pa.table({"text": texts, "id": range(100)}), path, row_group_size=30)
        else:
            for i, text in enumerate(texts):
                (folder / f"{name}{i:03}.txt").write_text(text)
    (folder / "README.md").write_text("not a document")
    return folder


def test_an_epoch_is_every_document_once(corpus):
    documents = Documents(corpus, shuffle_bytes=500, seed=3)
    for source in (documents, documents.select("all", shuffle=False)):
        stream = source.iterate()
        epochs = [[next(stream) for _ in range(N)] for _ in range(2)]
        for number, epoch in enumerate(epochs):
            assert sorted(p.text for p in epoch) == sorted(TEXTS)
            assert {p.place["epoch"] for p in epoch} == {number}
        assert sorted(source.once()) == sorted(TEXTS)
    in_order = [p.text for p in epochs[0]]
    assert in_order == [p.text for p in epochs[1]]
    if not list(corpus.glob("*.txt")):
        assert in_order == TEXTS[100:] + TEXTS[:100]  # b, c, deep/a
    shuffled = [p.text for p in islice(documents.iterate(), 2 * N)]
    assert shuffled[:N] != in_order and shuffled[:N] != shuffled[N:]
    assert shuffled == [
        p.text for p in islice(Documents(corpus, shuffle_bytes=500, seed=3).iterate(), 2 * N)
    ]


def test_every_place_can_be_taken_up(corpus):
    documents = Documents(corpus, shuffle_bytes=500)
    everything = list(islice(documents.iterate(), 2 * N + 30))
    for at in (0, 1, 57, N - 1, N, N + 131):
        again = Documents(corpus, shuffle_bytes=500).iterate(everything[at].place)
        assert list(islice(again, 20)) == everything[at : at + 20]


@pytest.mark.parametrize("readers", [2, 5])
def test_shards_share_an_epoch(corpus, readers):
    documents = Documents(corpus, shuffle_bytes=500)
    found = Counter()
    for number in range(readers):
        share = list(documents.shard(number, readers).once())
        assert share
        found.update(share)
    assert found == Counter(TEXTS)


def test_few_chunks_are_shared_by_document(tmp_path):
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "one.parquet")
    shares = [list(Documents(tmp_path).shard(i, 4).once()) for i in range(4)]
    assert [len(share) for share in shares] == [75] * 4
    assert sorted(text for share in shares for text in share) == sorted(TEXTS)


def test_held_out_documents_depend_on_their_text_alone(corpus, tmp_path):
    documents = Documents(corpus, val_fraction=0.2)
    held_out = list(documents.select("validation").once())
    train = list(documents.select("train").once())
    assert sorted(held_out + train) == sorted(TEXTS)
    assert 30 < len(held_out) < 90
    (tmp_path / "copy.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in held_out * 2)
    )
    copy = Documents(tmp_path / "copy.jsonl", val_fraction=0.2)
    assert not list(copy.select("train").once())
    with pytest.raises(ToolmemError, match="no document for train"):
        next(copy.select("train").iterate())


def test_what_a_path_may_be(corpus):
    files = sorted(p for p in corpus.rglob("*") if p.is_file() and p.suffix != ".md")
    suffix = files[0].name.split(".", 1)[1]
    assert Documents(str(corpus)).files == Documents(corpus).files == files
    assert Documents(f"{corpus}/**/*.{suffix}").files == files
    assert Documents([str(files[1]), corpus / "deep"]).files[0] == files[1]
    assert Documents([corpus, corpus]).files == files
    changed = Documents(files[:-1])
    assert changed.fingerprint != Documents(files).fingerprint


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_bad_lines_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "JSONL_CHUNK_BYTES", 16)
    good = '{"text": "fine"}\n'
    for content, message in (
        (good * 3 + '{"text": "cut\n' + good, r"f.jsonl, line 4: not JSON"),
        (
            good + "\n" + '{"body": "b", "id": 3}\n',
            r"line 3: no field 'text' \(it has 'body', 'id'\)",
        ),
        (good + '{"text": 7}\n', r"line 2: the field 'text' is not text but 7"),
        (good + '["text"]\n', r"line 2: a JSON list, not an object"),
        (good.encode() + b'{"text": "\xff"}\n', r"line 2: not JSON"),
        (good + "[" * 100_000, r"line 2: not JSON"),
    ):
        path = write(tmp_path / "f.jsonl", content)
        with pytest.raises(ToolmemError, match=message):
            list(Documents(path, shuffle=False).once())
    packed = write(tmp_path / "g.jsonl.gz", gzip.compress((good + "nonsense\n").encode()))
    with pytest.raises(ToolmemError, match=r"g.jsonl.gz, line 2: not JSON"):
        list(Documents(packed).once())
    write(packed, gzip.compress((good * 999).encode())[:-20])
    with pytest.raises(ToolmemError, match=r"g.jsonl.gz is truncated"):
        list(Documents(packed).once())
    write(packed, b"not gzip")
    with pytest.raises(ToolmemError, match=r"g.jsonl.gz, line 1: .* is damaged \(Not a gzip"):
        list(Documents(packed).once())


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "f.parquet"
    pq.write_table(pa.table({"text": TEXTS, "n": range(N)}), path, compression="none")
    with pytest.raises(ToolmemError, match=r"f.parquet has no column 'body' \(it has text, n\)"):
        list(Documents(path, field="body").once())
    with pytest.raises(ToolmemError, match="the column 'n' is int64, not text"):
        list(Documents(path, field="n").once())
    whole = path.read_bytes()
    write(path, whole[: len(whole) // 2])
    with pytest.raises(ToolmemError, match=r"f.parquet is not a whole Parquet file"):
        Documents(path)
    write(path, whole[:4] + b"\xff" * 3000 + whole[3004:])
    with pytest.raises(ToolmemError, match=r"f.parquet, row group 0: cannot be read"):
        list(Documents(path).once())
    pq.write_table(pa.table({"text": ["a", None]}), path)
    with pytest.raises(ToolmemError, match=r"row group 0, row 2: .* is empty"):
        list(Documents(path).once())


def test_bad_paths_are_named(tmp_path):
    for path, message in (
        (tmp_path / "none.txt", "no such file or folder: .*none.txt"),
        (str(tmp_path / "*.jsonl"), r"no file matches .*\*.jsonl"),
        (tmp_path, "in the folder"),
        ([], "no data given"),
        (write(tmp_path / "a.csv", "x"), "a.csv is of no kind that can be read"),
    ):
        with pytest.raises(ToolmemError, match=message):
            Documents(path)
    with pytest.raises(ToolmemError, match=r"b.txt, line 2: not UTF-8 text \(byte 5\)"):
        list(Documents(write(tmp_path / "b.txt", b"fine\n\xff")).once())


class FakeDataset:
    """As much of `datasets` as is used: rows, an order by seed, and passing over rows."""

    def __init__(self, rows):
        self.rows = rows

    def shuffle(self, seed, buffer_size):
        import random

        rows = list(self.rows)
        random.Random(seed).shuffle(rows)
        return FakeDataset(rows)

    def skip(self, n):
        return FakeDataset(self.rows[n:])

    def __iter__(self):
        return iter(self.rows)


def test_hub_datasets_stream_and_resume(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return FakeDataset([{"text": text} for text in TEXTS])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    documents = open_documents("hf://owner/name?config=small&split=extra", val_fraction=0.2, seed=1)
    assert isinstance(documents, HubDocuments)
    stream = list(islice(documents.iterate(), 2 * N))
    assert asked[0] == ("owner/name", "small", "extra", True)
    assert sorted(p.text for p in stream[:N]) == sorted(p.text for p in stream[N:]) == sorted(TEXTS)
    assert list(islice(documents.iterate(stream[N + 7].place), 9)) == stream[N + 7 : N + 16]
    shares = [list(documents.shard(i, 3).once()) for i in range(3)]
    assert sorted(text for share in shares for text in share) == sorted(TEXTS)
    split = [list(documents.select(part).once()) for part in ("train", "validation")]
    assert sorted(text for part in split for text in part) == sorted(TEXTS) and len(split[1]) > 30
    with pytest.raises(ToolmemError, match="no text in the field 'body'"):
        next(open_documents("hf://owner/name", field="body").iterate())
    with pytest.raises(ToolmemError, match="no dataset's address"):
        open_documents("hf://owner/name?revision=3")


def test_hub_without_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ToolmemError, match=r"toolmem\[hub\]"):
        open_documents("hf://owner/name")


def test_hub_out_of_reach(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ToolmemError, match=r"cannot be opened .no route"):
        next(open_documents("hf://owner/name").iterate())
