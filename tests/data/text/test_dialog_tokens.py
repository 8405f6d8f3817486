from collections import Counter
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import make_population
from toolmem.data.stream import make_loader
from toolmem.data.text.dialog_tokens import DialogTokenGenerator, pack
from toolmem.data.text.token_table import TokenTable
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError


def make_table(people=30, name="in_tool"):
    return TokenTable.build(
        TemplateSet.load(name).questions(make_population(people)), ByteTokenizer()
    )


@pytest.fixture(scope="module")
def table():
    return make_table()


def first(generator, n):
    return list(islice(iter(generator), n))


def told(batch):
    """Every dialogue of a batch as (tokens, which of them bear loss), read from its cells alone."""
    found = []
    for r in range(len(batch)):
        documents = (
            torch.where(batch.targets[r] != 0, 0, -1)
            if batch.documents is None
            else batch.documents[r]
        )
        for number in documents.unique().tolist():
            if number >= 0:
                cells = documents == number
                tokens, targets = batch.tokens[r][cells].tolist(), batch.targets[r][cells].tolist()
                assert tokens[1:] == targets[:-1]
                found.append(((*tokens, targets[-1]), tuple(batch.loss_mask[r][cells].tolist())))
    return sorted(found)


def expected(table, number, mask="assistant"):
    tokens, roles = table.tokens(number), table.roles(number)
    bears = [mask == "all" or role == 2 for role in roles[1:]]
    return tuple(tokens.tolist()), tuple(bears)


@pytest.mark.parametrize("mask", ["assistant", "all"])
@pytest.mark.parametrize("layout", ["rows", "bucketed", "packed"])
def test_a_batch_tells_its_dialogues_and_nothing_else(table, layout, mask):
    generator = DialogTokenGenerator(table, 16, layout=layout, seq_len=300, mask=mask, seed=1)
    for index in (0, 3, 11):
        batch = generator.batch_at(index)
        numbers = generator.dialogues_at(index)
        assert told(batch) == sorted(expected(table, i, mask) for i in numbers)
        assert batch.n_tokens == sum(len(table.tokens(i)) - 1 for i in numbers)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.loss_mask.dtype == torch.bool
        if layout == "packed":
            assert batch.documents.dtype == torch.int32
            assert ((batch.documents == -1) == (batch.tokens == 0)).all()
            assert len(batch) < 16
        assert batch.tokens.shape[1] <= generator.seq_len


@pytest.mark.parametrize("layout", ["rows", "bucketed", "packed"])
@pytest.mark.parametrize("batch_size", [16, 50, 1000])
def test_an_epoch_shows_every_dialogue_once(table, layout, batch_size):
    generator = DialogTokenGenerator(table, batch_size, layout=layout, seq_len=300, window=3)
    per_epoch = generator.batches_per_epoch
    epochs = []
    for epoch in range(2):
        parts = [generator.dialogues_at(epoch * per_epoch + i) for i in range(per_epoch)]
        sizes = [len(part) for part in parts]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(table)))
        epochs.append([part.tolist() for part in parts])
    assert per_epoch == 1 or epochs[0] != epochs[1]
    other = DialogTokenGenerator(table, batch_size, layout=layout, seq_len=300, window=3, seed=1)
    assert other.dialogues_at(0).tolist() != epochs[0][0]


def test_bucketing_wastes_little_and_still_mixes():
    table = make_table(500, "in_weight")
    rows = DialogTokenGenerator(table, 32, layout="rows")
    bucketed = DialogTokenGenerator(table, 32, layout="bucketed")

    def fill(generator):
        batches = first(generator, generator.batches_per_epoch)
        return sum(b.n_tokens for b in batches) / sum(b.tokens.numel() for b in batches)

    assert fill(rows) < 0.85 and fill(bucketed) > 0.95
    # the order of lengths is random from batch to batch, not ascending
    widths = [b.tokens.shape[1] for b in first(bucketed, 30)]
    rising = sum(a <= b for a, b in pairwise(widths))
    assert 5 < rising < 25


def test_ranks_share_each_batch(table):
    for layout in ("rows", "bucketed", "packed"):
        options = {"layout": layout, "seq_len": 300, "batch_size": 17}
        whole = DialogTokenGenerator(table, **options)
        ranks = [DialogTokenGenerator(table, **options, rank=r, world_size=2) for r in range(2)]
        for index in (0, 1, 9):
            parts = [rank.batch_at(index) for rank in ranks]
            assert sorted(told(parts[0]) + told(parts[1])) == told(whole.batch_at(index))
            assert abs(len(ranks[0].share(whole.dialogues_at(index))) * 2 - 17) <= 1
            assert parts[0].state == parts[1].state == whole.batch_at(index).state


def equal(a, b):
    return (
        torch.equal(a.tokens, b.tokens)
        and torch.equal(a.targets, b.targets)
        and torch.equal(a.loss_mask, b.loss_mask)
        and (a.documents is None) == (b.documents is None)
        and (a.documents is None or torch.equal(a.documents, b.documents))
        and a.n_tokens == b.n_tokens
        and a.state == b.state
    )


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_resuming_in_the_second_epoch(table, layout, num_workers, take):
    def make():
        return DialogTokenGenerator(table, 16, layout=layout, seq_len=300, window=3)

    per_epoch = make().batches_per_epoch
    stop = per_epoch + 3
    uninterrupted = take(make_loader(make()), stop + 6)
    before = take(make_loader(make(), num_workers), stop)
    assert before[-1].state["epoch"] == 1
    resumed = make()
    resumed.load_state_dict(before[-1].state)
    after = take(make_loader(resumed, num_workers), 6)
    assert all(map(equal, [*before, *after], uninterrupted))
    assert not equal(after[0], uninterrupted[0])


class TinyModel(torch.nn.Module):
    """Attention by explicit masks in float64: what the layouts must agree on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(260, 16)
        self.place = torch.nn.Embedding(512, 16)
        self.qkv = torch.nn.Linear(16, 48)
        self.head = torch.nn.Linear(16, 260)
        self.double()

    def forward(self, tokens, documents):
        n = tokens.shape[1]
        same = documents[:, :, None] == documents[:, None, :]
        allowed = same & torch.ones(n, n, dtype=torch.bool).tril()
        positions = allowed.sum(-1) - 1  # counted within the document
        x = self.embed(tokens) + self.place(positions)
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(~allowed, -torch.inf)
        return self.head(x + scores.softmax(-1) @ v)


def _loss_sum(model, batch):
    documents = batch.documents
    if documents is None:
        documents = torch.zeros_like(batch.tokens)
    logits = model(batch.tokens, documents)[batch.loss_mask]
    return F.cross_entropy(logits, batch.targets[batch.loss_mask], reduction="sum").item()


@pytest.mark.parametrize("mask", ["assistant", "all"])
def test_layouts_give_the_same_loss(table, mask):
    from toolmem.models import Transformer

    torch.manual_seed(0)
    ours = Transformer(260, dim=16, n_layers=2, n_heads=2, max_seq_len=512, conv_width=4).double()

    def forward(tokens, documents):
        return ours(tokens, documents=documents)

    for model in (TinyModel(), forward):
        losses = {}
        for layout in ("rows", "bucketed", "packed"):
            generator = DialogTokenGenerator(
                table, 120, layout=layout, seq_len=400, window=1, mask=mask
            )
            assert generator.batches_per_epoch == 1
            losses[layout] = _loss_sum(model, generator.batch_at(0))
        assert losses["bucketed"] == pytest.approx(losses["rows"], rel=1e-12)
        assert losses["packed"] == pytest.approx(losses["rows"], rel=1e-12)


def test_a_subset_in_order(table):
    rows = np.array([7, 3, 50, 4, 9])
    generator = DialogTokenGenerator(table, 2, rows=rows, shuffle=False)
    parts = [generator.dialogues_at(i).tolist() for i in range(generator.batches_per_epoch)]
    assert [i for part in parts for i in part] == rows.tolist()
    shuffled = DialogTokenGenerator(table, 2, rows=rows)
    seen = Counter(int(d) for i in range(3) for d in shuffled.dialogues_at(i))
    assert seen == Counter(rows.tolist())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(50, 90))
def test_packing_fits_without_overlap(lengths, capacity):
    lengths = np.array(lengths)
    rows, columns = pack(lengths, capacity)
    cells = Counter()
    for row, column, length in zip(rows, columns, lengths, strict=True):
        assert column >= 0 and column + length <= capacity
        cells.update((row, column + i) for i in range(length))
    assert max(cells.values()) == 1
    n_rows = rows.max() + 1
    assert set(rows) == set(range(n_rows))
    fill = np.bincount(rows, weights=lengths)
    assert n_rows == 1 or (fill <= capacity / 2).sum() <= 1  # no two rows could have been one


def test_mistakes_are_told(table):
    for options, message in (
        ({"layout": "diagonal"}, "unknown layout 'diagonal'"),
        ({"mask": "user"}, "unknown mask 'user'"),
        ({"batch_size": 0}, "at least 1"),
        ({"layout": "packed", "seq_len": 20}, "needs seq_len of at least"),
        ({"layout": "packed"}, "needs seq_len of at least"),
        ({"rows": np.array([1]), "world_size": 2}, "cannot be shared by 2 processes"),
        ({"batch_size": 1, "world_size": 2}, "smaller than the number of processes"),
    ):
        with pytest.raises(ToolmemError, match=message):
            DialogTokenGenerator(table, **options)
    with pytest.raises(ToolmemError, match="not the state"):
        DialogTokenGenerator(table).load_state_dict({})


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_spans_are_what_the_assistant_did_not_write(table, layout):
    seq_len = int(table.lengths.max()) * 2 if layout == "packed" else None
    generator = DialogTokenGenerator(
        table, 8, layout=layout, seq_len=seq_len, with_spans=True, seed=3
    )
    assert DialogTokenGenerator(table, 8).batch_at(0).spans is None
    ids = ByteTokenizer().role_ids
    batch = generator.batch_at(1)
    for tokens, targets, bears, spans in zip(
        batch.tokens.tolist(),
        batch.targets.tolist(),
        batch.loss_mask.tolist(),
        batch.spans.tolist(),
        strict=True,
    ):
        speaker, number, seen = "user", None, set()
        for i, (token, span) in enumerate(zip(tokens, spans, strict=True)):
            if targets[i] == 0:  # padding, or a shorter dialogue's last token
                continue
            # a role token belongs to whoever speaks before it
            assert (span < 0) == (speaker == "assistant")
            if span >= 0:
                assert span == number or (number is None and span not in seen)
                seen.add(span)
            number = span if span >= 0 else None
            # nothing within a span is a target that bears loss
            assert not (bears[i] and span >= 0 and i + 1 < len(spans) and spans[i + 1] == span)
            speaker = {v: k for k, v in ids.items()}.get(token, speaker)
            if targets[i] == ids["end"]:
                speaker, number = "user", None


def test_spans_and_loss_everywhere_are_refused(table):
    with pytest.raises(ToolmemError, match="mask: all"):
        DialogTokenGenerator(table, 8, mask="all", with_spans=True)
