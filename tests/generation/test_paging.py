"""Pages under random schedules: what a branch holds is what it was fed, wherever its pages have been."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_engine import ARCHITECTURES, talkative

from toolmem.errors import ToolmemError
from toolmem.generation.paging import Pager
from toolmem.generation.pieces import NoRoom
from toolmem.generation.prefixes import PrefixTree
from toolmem.generation.spill import SpillFile
from toolmem.models import Transformer

MODELS = {
    "attention": (Transformer, {"n_heads": 2, "n_kv_heads": 1}),
    "convolution": (Transformer, {"n_heads": 2, "conv_width": 3, "residual_conv": 2}),
    "window": (Transformer, {"n_heads": 2, "window": [5, 0]}),
    "latent": ARCHITECTURES["latent attention"],
    "jamba": ARCHITECTURES["jamba"],
    "mamba2": ARCHITECTURES["mamba2"],
}
BUILT = {}


def model_of(name):
    if name not in BUILT:
        BUILT[name] = talkative(*MODELS[name])
    return BUILT[name]


@torch.no_grad()
def feed(model, pager, branches, texts, chunks):
    """Run chunks through the model; every branch's logits must be those of its whole text."""
    rows = np.array([pager.activate(branch) for branch in branches])
    counts = np.array([len(chunk) for chunk in chunks])
    pager.prepare(rows, counts)
    order = np.argsort(-(-(pager.lengths[rows] + counts) // pager.page_size), kind="stable")
    rows, counts = rows[order], counts[order]
    padded = torch.zeros(len(rows), int(counts.max()), dtype=torch.int64)
    for at, i in enumerate(order):
        padded[at, : counts[at]] = torch.tensor(chunks[i])
    logits = model(padded, cache=pager.cache(rows, counts), counts=torch.from_numpy(counts))
    pager.lengths[rows] += counts
    for at, i in enumerate(order):
        texts[i].extend(chunks[i])
        whole = model(torch.tensor([texts[i]]))[0]
        torch.testing.assert_close(
            logits[at, : counts[at]], whole[-int(counts[at]) :], atol=1e-4, rtol=0
        )


steps = st.lists(
    st.tuples(
        st.sampled_from(["new", "feed", "feed", "feed", "fork", "free", "away", "idle", "rewind"]),
        st.integers(0, 10**6),
    ),
    min_size=4,
    max_size=25,
)


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(steps=steps, places=st.integers(9, 40), host=st.sampled_from([0, 3, 1000]))
def test_random_schedules(name, steps, places, host):
    model = model_of(name)
    measured = Pager(model, max_active=1, page_size=4).bytes_each
    unit = 16 * measured["page"] + measured["slot"]
    pager = Pager(
        model,
        max_active=3,
        page_size=4,
        # room for a few dialogues, however the model divides it
        memory_limit=max(places * measured["page"] + 4 * measured["slot"], 4 * unit),
        host_limit=host * max(measured.values()),
    )
    held = {}  # branch: its text
    for op, number in steps:
        draw = np.random.default_rng(number)
        branches = list(held)
        one = branches[number % len(branches)] if branches else None
        if op == "new" or one is None:
            held[pager.new()] = []
        elif op == "fork" and len(held) < 8:
            held[pager.fork(one)] = list(held[one])
        elif op == "free":
            del held[one]
            pager.free(one)
        elif op == "away":
            pager.send_away(one)
        elif op == "idle":
            pager.deactivate(one)
        elif op == "rewind" and held[one] and len(held[one]) < 30:
            pager.activate(one)
            rows = np.array([one.row])
            pager.prepare(rows, np.array([1]))  # its own copies first: others keep what they have
            before, length = pager.snapshot(rows), len(held[one])
            drafts = draw.integers(0, 260, 3).tolist()
            feed(model, pager, [one], [list(held[one])], [drafts])
            pager.rewind(rows, np.array([length]), before)
            assert one.length == length
        elif op == "feed":
            chosen = [b for b in branches if len(held[b]) < 40][: 1 + number % 3]
            chunks = [draw.integers(0, 260, draw.integers(1, 9)).tolist() for _ in chosen]
            for branch in branches:
                if branch not in chosen and branch.row is not None:
                    pager.deactivate(branch)
            try:
                if chosen:
                    feed(model, pager, chosen, [held[b] for b in chosen], chunks)
            except NoRoom:
                pass
        assert pager.bytes_used() <= pager.memory_limit
        assert pager.host_bytes <= pager.host_limit
        for branch, text in held.items():
            assert branch.length == len(text)
    for branch in held:
        pager.free(branch)
    assert pager.live == {"page": 0, "slot": 0}
    assert pager.bytes_used() == pager.host_bytes == pager.spilled_bytes() == 0
    pager.close()


def test_shared_pages_are_copied_only_when_written_to():
    model = model_of("attention")
    pager = Pager(model, max_active=4, page_size=4)
    first, text = pager.new(), []
    feed(model, pager, [first], [text], [list(range(10))])
    assert pager.used("page") == 3
    pager.deactivate(first)
    forks = [pager.fork(first) for _ in range(3)]
    assert pager.used("page") == 3
    texts = [list(text) for _ in forks]
    feed(model, pager, forks, texts, [[i + 1] for i in range(3)])
    assert pager.used("page") == 3 + 3  # each its own last page; the full ones are still shared
    feed(model, pager, [first], [text], [[77, 78, 79]])
    assert pager.used("page") == 3 + 3 + 1  # the one who wrote last has the old page for itself


def test_a_file_takes_what_the_host_has_no_room_for(tmp_path):
    file = SpillFile(tmp_path)
    records = [[torch.randn(3, 2), torch.arange(4, dtype=torch.int16) * n] for n in range(5)]
    numbers = [file.write(record) for record in records]
    file.free(numbers[1])
    assert file.write(records[4]) == numbers[1]  # places are used again
    assert file.used_bytes == 5 * (24 + 8)
    for number, record in ((numbers[0], records[0]), (numbers[1], records[4])):
        for got, wanted in zip(file.read(number, record), record, strict=True):
            assert torch.equal(got, wanted)
    file.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ToolmemError, match="nowhere"):
        SpillFile(tmp_path / "nowhere")


@pytest.mark.parametrize("exact", [False, True])
@settings(max_examples=20, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_tree_finds_the_longest_known_beginning(exact, data):
    model = model_of("jamba" if exact else "attention")
    pager = Pager(model, max_active=2, page_size=3)
    tree = PrefixTree(pager, exact=exact)
    texts = data.draw(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=10), max_size=6))
    for text in texts:
        branch = tree.match(text)
        known = 0 if branch is None else branch.length
        branch = branch or pager.new()
        feed(model, pager, [branch], [text[:known]], [text[known:]])
        tree.remember(text, branch)
        pager.free(branch)
    wanted = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=12))
    found = tree.match(wanted)

    def common(text):
        pairs = zip(text, wanted, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(wanted)))

    if exact:  # only where somebody stopped
        best = max((len(t) for t in texts if common(t) == len(t) < len(wanted)), default=0)
    else:  # whole pages, and never the last token
        best = max((min(common(t), len(wanted) - 1) // 3 * 3 for t in texts), default=0)
    assert (0 if found is None else found.length) == best
    if found is not None:
        feed(model, pager, [found], [wanted[:best]], [wanted[best:]])
        pager.free(found)
    tree.clear()
    assert pager.live == {"page": 0, "slot": 0}
