import json
from itertools import islice

import numpy as np
import pytest
import torch

from toolmem.data.stream import make_loader
from toolmem.data.text.documents import Documents
from toolmem.data.text.tokens import TokenGenerator, held_out_batches
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError

N = 60
TEXTS = [f"<{i}>" + "abcdefghij" * (i % 7) for i in range(N)] + ["z" * 700]


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Documents(path, shuffle_bytes=300, seed=5)


def generator(documents, **options):
    defaults = {"seq_len": 32, "batch_size": 3}
    return TokenGenerator(documents, ByteTokenizer(), **(defaults | options))


def stream_of(documents, n):
    """The stream written out plainly: documents, each with its end token."""
    ids = []
    texts = documents.iterate()
    while len(ids) <= n:
        ids += [*next(texts).text.encode(), 259]
    return ids[: n + 1]


@pytest.mark.parametrize("seq_len", [1, 32, 500])
def test_rows_are_the_stream_cut_without_padding_or_mask(documents, seq_len):
    batches = list(islice(generator(documents, seq_len=seq_len), 40))
    ids = stream_of(documents, 40 * 3 * seq_len)
    assert torch.cat([b.tokens.flatten() for b in batches]).tolist() == ids[:-1]
    assert torch.cat([b.targets.flatten() for b in batches]).tolist() == ids[1:]
    assert all(b.loss_mask.all() and b.documents is None for b in batches)
    assert all(b.tokens.shape == (3, seq_len) and b.n_tokens == 3 * seq_len for b in batches)


def test_blocked_documents_are_numbered_within_rows(documents):
    for batch in islice(generator(documents, block_documents=True), 30):
        for tokens, numbers in zip(batch.tokens.tolist(), batch.documents.tolist(), strict=True):
            number, expected = 0, []
            for token in tokens:
                expected.append(number)
                number += token == 259
            assert numbers == expected
    assert batch.documents.dtype == torch.int32


def equal(a, b):
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.documents, b.documents)
        and a.state == b.state
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_in_the_second_epoch(documents, num_workers, take):
    def make():
        return generator(documents, block_documents=True, num_workers=num_workers)

    total = sum(len(text) + 1 for text in TEXTS)
    stop = int(1.5 * total / 96) | 1  # an odd number: the other worker is next
    uninterrupted = take(make_loader(make(), num_workers), stop + 7)
    state = make().state_dict()
    for batch in uninterrupted[:stop]:
        state = make().merge_state(state, batch.state)
    places = [reader["document"]["epoch"] for reader in state["readers"].values()]
    assert 1 in places and len(places) == max(1, num_workers)
    resumed = make()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    after = take(make_loader(resumed, num_workers), 7)
    assert all(map(equal, after, uninterrupted[stop:]))
    assert not equal(after[0], uninterrupted[0])


def test_ranks_and_workers_read_different_documents(documents):
    whole = sorted("".join(TEXTS))
    shares = []
    for rank in range(2):
        for reader in range(2):
            share = list(documents.shard(rank * 2 + reader, 4).once())
            stream = generator(documents, rank=rank, world_size=2, num_workers=2)._read(reader)
            ids = torch.cat([b.tokens.flatten() for b in islice(stream, 3)]).tolist()
            plain = [i for text in share * 9 for i in [*text.encode(), 259]]
            first = [*next(documents.shard(rank * 2 + reader, 4).iterate()).text.encode(), 259]
            assert ids[: len(first)] == first and len(plain) >= len(ids)
            shares += share
    assert sorted("".join(shares)) == whole


def test_other_workers_than_before_are_refused(documents):
    state = {"next": 0, "readers": {"0": None, "1": None}}
    with pytest.raises(ToolmemError, match="2 workers, this run has 1"):
        generator(documents).load_state_dict(state)
    with pytest.raises(ToolmemError, match="made for 2"):
        next(iter(generator(documents, num_workers=2)))
    with pytest.raises(ToolmemError, match="at least 1"):
        generator(documents, seq_len=0)


def test_held_out_documents_as_one_stream(documents):
    ordered = documents.select("all", shuffle=False)
    tokens, numbers = held_out_batches(ordered, ByteTokenizer(), 32, 3)
    assert tokens.tolist() == [i for text in TEXTS for i in [*text.encode(), 259]]
    assert numbers.tolist() == [n for n, text in enumerate(TEXTS) for _ in range(len(text) + 1)]
    short, _ = held_out_batches(ordered, ByteTokenizer(), 32, 3, max_batches=2)
    assert np.array_equal(short, tokens[: 2 * 3 * 32 + 1])
