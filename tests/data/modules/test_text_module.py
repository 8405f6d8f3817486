import json
from itertools import islice

import numpy as np
import pytest
import torch

from toolmem.data.hf_tokenizer import save_tokenizer, train_tokenizer
from toolmem.data.modules.base import StatefulDataModule
from toolmem.data.modules.text import TextDataModule
from toolmem.errors import ToolmemError

TEXT = "".join(f"line {i}: the quick brown fox jumps over dog {i * i}.\n" for i in range(300))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLMEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TOOLMEM_DATA", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in TEXT.splitlines()))
    return str(path)


def make(path, **options):
    return TextDataModule(path, **({"seq_len": 32, "batch_size": 4} | options))


def targets_of(batches):
    return torch.cat([b.targets[b.loss_mask] for b in batches]).tolist()


def test_bytes_of_one_file_train_on_nine_tenths_and_validate_on_the_last(text_file):
    data = make(text_file)
    data.setup()
    cut = int(len(TEXT) * 0.9)
    held_out = TEXT.encode()[cut:]
    assert bytes(targets_of(data.val_dataloader())) == held_out[1:]
    assert data.vocab_size == 260
    for batch in islice(data.train_dataloader(), 200):
        for row, target in zip(batch.tokens, batch.targets, strict=True):
            text = bytes([*row.tolist(), target[-1]])
            assert text in TEXT.encode()[:cut]


def test_trained_tokenizer_is_made_once_and_found_again(text_file, cache):
    data = make(text_file, train_tokenizer=280)
    assert data.vocab_size == 280
    [path] = (cache / "tokenizers").iterdir()
    written = path.stat().st_mtime_ns
    again = make(text_file, train_tokenizer=280)
    assert again.tokenizer.spec() == data.tokenizer.spec()
    assert path.stat().st_mtime_ns == written
    make(text_file, train_tokenizer=270).vocab_size  # noqa: B018
    assert len(list((cache / "tokenizers").iterdir())) == 2
    data.setup()
    held_out = data.tokenizer.decode(targets_of(data.val_dataloader()))
    assert TEXT.endswith(held_out) and len(held_out) > 0.09 * len(TEXT)
    trained = data.tokenizer.decode(next(iter(data.train_dataloader())).tokens[0].tolist())
    assert trained in TEXT


def test_tokenizer_is_not_trained_on_what_is_held_out(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abab " * 900 + "zqzqzq " * 60)
    data = make(str(path), train_tokenizer=290)
    vocabulary = json.loads(data.tokenizer.spec()["json"])["model"]["vocab"]
    assert "abab" in vocabulary and not any("zq" in token for token in vocabulary)


def test_documents_are_held_out_whole(corpus):
    data = make(corpus, val_fraction=0.2, shuffle=False)
    data.setup()
    first_token = next(iter(data.val_dataloader())).tokens[0, :1].tolist()
    ids = first_token + targets_of(data.val_dataloader())
    val = bytes(t if t < 256 else 10 for t in ids).decode()
    held_out = [line for line in val.split("\n") if line.startswith("line")]
    assert 30 < len(held_out) < 90
    stream = next(
        iter(make(corpus, val_fraction=0.2, shuffle=False, batch_size=300).train_dataloader())
    )
    trained = bytes(t if t < 256 else 10 for t in stream.tokens.flatten().tolist()).decode()
    lines = trained.split("\n")[:-1]
    assert not set(lines) & set(held_out)
    first = [line for line in TEXT.splitlines() if line not in held_out]
    assert lines[:50] == first[:50]


def test_validation_on_data_of_its_own(corpus, text_file):
    data = make(corpus, val_path=text_file, val_batches=5)
    assert len(data.val_dataloader()) == 5
    assert bytes(targets_of(data.val_dataloader())) == TEXT.encode()[1 : 5 * 4 * 32 + 1]
    one = make(text_file, val_path=corpus)
    one.setup()
    tokens, held_out = one._sequences
    assert len(tokens) == len(TEXT) and len(held_out) == 0
    assert len(list(one.val_dataloader())) > 3


def test_blocked_documents(corpus):
    data = make(corpus, block_documents=True, val_fraction=0.2)
    for batches in (islice(data.train_dataloader(), 5), data.val_dataloader()):
        for batch in batches:
            ends = batch.tokens[:, :-1] == 259
            steps = batch.documents[:, 1:] - batch.documents[:, :-1]
            real = batch.documents[:, 1:] >= 0
            assert torch.equal(steps[real].bool(), ends[real])
            assert (batch.documents[:, 0] <= 0).all()
    assert next(iter(make(corpus).train_dataloader())).documents is None


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("kind", ["text_file", "corpus"])
def test_resuming_after_what_was_consumed(kind, num_workers, request, take):
    path = request.getfixturevalue(kind)
    total = 200 if kind == "corpus" else 230
    everything = take(make(path, num_workers=num_workers).train_dataloader(), total)
    data = make(path, num_workers=num_workers)
    for batch in take(data.train_dataloader(), total - 18)[:-3]:
        data.consumed(batch.state)
    state = json.loads(json.dumps(data.state_dict()))
    assert '"epoch": 1' in json.dumps(state["stream"])
    resumed = make(path, num_workers=num_workers)
    resumed.load_state_dict(state)
    after = take(resumed.train_dataloader(), 21)
    for a, b in zip(after, everything[-21:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert a.state == b.state


def test_ranks_of_documents_keep_their_own_places(corpus, monkeypatch):
    streams = []
    for rank in range(2):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, 2))
        data = make(corpus)
        batches = list(islice(data.train_dataloader(), 12))
        assert batches[0].tokens.shape == (2, 32)
        for batch in batches[:7]:
            data.consumed(batch.state)
        streams.append((data.state_dict(), batches))
    state = streams[0][0] | {"stream": {"ranks": [s["stream"] for s, _ in streams]}}
    for rank in range(2):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, 2))
        resumed = make(corpus)
        resumed.load_state_dict(state)
        for a, b in zip(islice(resumed.train_dataloader(), 5), streams[rank][1][7:], strict=True):
            assert torch.equal(a.tokens, b.tokens)
    monkeypatch.setattr(StatefulDataModule, "rank_and_world", (0, 3))
    other = make(corpus, batch_size=6)
    other.load_state_dict(state | {"signature": other.signature()})
    with pytest.raises(ToolmemError, match="world_size 2, this one has 3"):
        other.train_dataloader()
    with pytest.raises(ToolmemError, match="cannot be shared equally by 3"):
        make(corpus, batch_size=4).train_dataloader()


def test_resuming_on_other_data_or_workers_is_refused(corpus, tmp_path):
    data = make(corpus)
    data.consumed(next(iter(data.train_dataloader())).state)
    state = data.state_dict()
    more = tmp_path / "corpus.jsonl"
    more.write_text(more.read_text() + '{"text": "one more"}\n')
    for options, key in (({}, "path"), ({"seq_len": 16}, "path|seq_len")):
        other = make(corpus, **options)
        other.load_state_dict(state)
        with pytest.raises(ToolmemError, match=f"cannot resume from .*: data.init_args.({key})"):
            other.train_dataloader()


def test_path_from_the_environment(text_file, monkeypatch):
    with pytest.raises(ToolmemError, match=r"data.init_args.path is not set: .*TOOLMEM_DATA"):
        make(None)
    monkeypatch.setenv("TOOLMEM_DATA", text_file)
    assert make(None).path == text_file


def test_tokenizer_file(text_file, tmp_path):
    save_tokenizer(train_tokenizer([TEXT], 320), tmp_path / "tok.json")
    data = make(text_file, tokenizer=str(tmp_path / "tok.json"))
    data.setup()
    assert 270 < data.vocab_size <= 320
    assert data._sequences[0].dtype == np.uint16
    assert data.checkpoint_info()["tokenizer"]["type"] == "hf"


def test_real_corpus(shared_data):
    data = TextDataModule(str(shared_data / "corpus"), seq_len=256, batch_size=8, val_batches=2)
    batch = next(iter(data.train_dataloader()))
    assert batch.tokens.shape == (8, 256) and (batch.tokens == 259).any()
    assert len(list(data.val_dataloader())) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenizer": "t.json", "train_tokenizer": 300}, "set one"),
        ({"val_fraction": 1.5}, "data.init_args.val_fraction is 1.5"),
        ({"seq_len": 0}, "must be at least 1"),
        ({"val_path": "nowhere.txt"}, "no such file or folder: nowhere.txt"),
        ({"path": "nowhere"}, "no such file or folder: nowhere.* Shakespeare"),
    ],
)
def test_mistakes_are_told(options, message, text_file):
    with pytest.raises(ToolmemError, match=message):
        make(**({"path": text_file} | options))


def test_too_little_text_is_told(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("too short")
    with pytest.raises(ToolmemError, match=r"short.txt has 8 tokens, too few"):
        make(str(path)).train_dataloader()
    path.write_text("")
    with pytest.raises(ToolmemError, match=r"short.txt is empty"):
        make(str(path)).setup()
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "alone"}\n')
    with pytest.raises(ToolmemError, match=r"of the documents of .*one.jsonl, held out"):
        make(str(one)).val_dataloader()


def _rank(rank, rendezvous, corpus, results):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    StatefulDataModule.rank_and_world = (rank, 2)
    data = make(corpus)
    batches = list(islice(data.train_dataloader(), 9))
    for batch in batches[:6]:
        data.consumed(batch.state)
    torch.save((data.state_dict(), batches[6].tokens), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_checkpoint_of_one_process_holds_the_places_of_all(corpus, tmp_path, monkeypatch):
    arguments = (str(tmp_path / "rendezvous"), corpus, str(tmp_path))
    torch.multiprocessing.spawn(_rank, arguments, nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert saved[0][0] == saved[1][0]
    for rank in range(2):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, 2))
        resumed = make(corpus)
        resumed.load_state_dict(saved[0][0])
        assert torch.equal(next(iter(resumed.train_dataloader())).tokens, saved[rank][1])
