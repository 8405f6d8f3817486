"""Text at addresses: the same documents as of files here, by fsspec's memory and a server of this machine."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from toolmem.data.modules.text import TextDataModule
from toolmem.data.stream import make_loader
from toolmem.data.text import sources
from toolmem.data.text.documents import Documents, open_documents
from toolmem.data.text.hub import HubDocuments
from toolmem.data.text.tokens import TokenGenerator
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError

TEXTS = [f"document {i} é " + "x" * (i % 17) for i in range(120)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "JSONL_CHUNK_BYTES", 97)
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    lines = ["".join(json.dumps({"text": t}) + "\n" for t in TEXTS[a : a + 30]) for a in (0, 30)]
    (folder / "a.jsonl").write_text(lines[0])
    (folder / "deep" / "b.jsonl.gz").write_bytes(gzip.compress(lines[1].encode()))
    pq.write_table(pa.table({"text": TEXTS[60:119]}), folder / "c.parquet", row_group_size=7)
    (folder / "d.txt").write_text(TEXTS[119])
    (folder / "README.md").write_text("not a document")
    return folder


@pytest.fixture
def memory(here):
    fs = fsspec.filesystem("memory")
    fs.put(str(here), "/bucket/corpus", recursive=True)
    yield "memory://bucket/corpus"
    fs.rm("/bucket", recursive=True)


class Ranges(BaseHTTPRequestHandler):
    """Files of a folder, whole or in part, as stores give them."""

    def do_HEAD(self):
        self.do_GET(send=False)

    def do_GET(self, send=True):
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_error(404)
            return
        content = path.read_bytes()
        first, last = 0, len(content) - 1
        if span := self.headers.get("Range"):
            begin, _, end = span.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{hash(content)}"')
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        if send:
            self.wfile.write(content[first : last + 1])

    def log_message(self, *words):
        pass


@pytest.fixture
def http(here):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    server.folder = here
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_store_is_read_as_a_folder_is(here, memory):
    plain = Documents(here, shuffle=False)
    for path in (memory, f"{memory}/**", [f"{memory}/*.*", f"{memory}/deep/b.jsonl.gz"]):
        assert sorted(Documents(path).once()) == sorted(plain.once()) == sorted(TEXTS)
    assert [file.name for file in Documents(memory).files] == [file.name for file in plain.files]
    assert set(Documents(memory).shards) == set(plain.shards)
    mixed = Documents([here / "a.jsonl", f"{memory}/c.parquet"])
    assert sorted(mixed.once()) == sorted(TEXTS[:30] + TEXTS[60:119])


def test_http(here, http, take):
    names = ("a.jsonl", "deep/b.jsonl.gz", "c.parquet", "d.txt")
    documents = Documents([f"{http}/{name}" for name in names], shuffle_bytes=500, seed=1)
    assert sorted(documents.once()) == sorted(TEXTS)
    stream = list(islice(documents.iterate(), 200))
    assert list(islice(documents.iterate(stream[150].place), 9)) == stream[150:159]
    # workers open the addresses by themselves
    generator = TokenGenerator(documents, ByteTokenizer(), 32, 2, num_workers=2)
    batches = take(make_loader(generator, 2), 4)
    assert all(batch.tokens.shape == (2, 32) for batch in batches)
    with pytest.raises(ToolmemError, match=r"no such file, or out of reach: http.*nowhere\.jsonl"):
        Documents(f"{http}/nowhere.jsonl")
    with pytest.raises(ToolmemError, match=r"out of reach: http.*down\.jsonl .*[Cc]onnect"):
        Documents("http://127.0.0.1:9/down.jsonl")
    (here / "a.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ToolmemError, match=r"a\.jsonl has changed since its run listed it"):
        list(documents.once())


def test_a_module_goes_on(memory):
    data = TextDataModule(memory, seq_len=32, batch_size=4)
    stream = iter(data.train_dataloader())
    for batch in islice(stream, 5):
        data.consumed(batch.state)
    resumed = TextDataModule(memory, seq_len=32, batch_size=4)
    resumed.load_state_dict(data.state_dict())
    assert next(iter(resumed.train_dataloader())).tokens.equal(next(stream).tokens)
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/corpus/d.txt", b"other")
    changed = TextDataModule(memory, seq_len=32, batch_size=4)
    changed.load_state_dict(data.state_dict())
    with pytest.raises(ToolmemError, match=r"path: d\.txt has changed since its run read it"):
        changed.train_dataloader()
    fs.rm("/bucket/corpus/d.txt")
    with pytest.raises(ToolmemError, match=r"d\.txt.*is gone"):
        for _ in islice(resumed._documents.iterate(), 500):
            pass


def test_bad_documents_of_a_store(memory):
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/bad/a.jsonl", b'{"text": "good"}\nbad\n')
    fs.pipe("/bucket/bad/b.parquet", b"nothing")
    with pytest.raises(ToolmemError, match=r"memory://.*b\.parquet is not a whole Parquet file"):
        Documents("memory://bucket/bad")
    skipping = Documents("memory://bucket/bad", on_bad_document="skip")
    assert list(skipping.once()) == ["good"] and next(skipping.iterate()).place["bad"] == 2
    with pytest.raises(ToolmemError, match=r"memory://.*a\.jsonl, line 2: not JSON"):
        list(Documents("memory://bucket/bad/a.jsonl").once())


def test_addresses_that_are_none(memory, monkeypatch):
    for address, message in (
        ("memory://bucket/none", r"no \.jsonl, .* file at memory://bucket/none"),
        ("memory://bucket/corpus/README.md", r"no \.jsonl, .* file at memory://"),
        ("memory://bucket/none.jsonl", r"no such file.*: memory://bucket/none\.jsonl"),
        ("s3://[bucket/x.jsonl", "is no address: Invalid"),
        ("nosuch://bucket/x.jsonl", "nothing is known of nosuch://"),
        ("s3://bucket/x.jsonl", r"s3:// needs a package that is not installed .*s3fs"),
    ):
        if address.startswith("s3://b"):
            monkeypatch.setitem(sys.modules, "s3fs", None)
        with pytest.raises(ToolmemError, match=message):
            Documents(address)
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ToolmemError, match=r"pip install 'toolmem\[remote\]'"):
        Documents(memory)


def test_files_of_the_hub_are_addresses_and_datasets_are_streams(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=None))
    assert isinstance(open_documents("hf://owner/name"), HubDocuments)
    asked = []

    class Store(fsspec.implementations.memory.MemoryFileSystem):
        protocol = "hf"

        @classmethod
        def _strip_protocol(cls, path):
            asked.append(path)
            return "/" + str(path).removeprefix("hf://").strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Store)
    Store().pipe("/datasets/owner/name/a.jsonl", b'{"text": "from the hub"}\n')
    found = open_documents("hf://datasets/owner/name/a.jsonl")
    assert isinstance(found, Documents) and list(found.once()) == ["from the hub"]
    assert "hf://datasets/owner/name/a.jsonl" in asked
