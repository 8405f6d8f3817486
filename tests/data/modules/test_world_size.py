"""A run that goes on with another number of processes sees the same samples in their order, or is refused."""

from __future__ import annotations

import json
from itertools import islice

import pytest

from toolmem.data import FactsDataModule, MADDataModule, RecallDataModule, TextDataModule
from toolmem.data.modules import PopulationDataModule
from toolmem.data.modules.base import StatefulDataModule
from toolmem.errors import ToolmemError

BATCHES = 7  # of each half


def make_facts(folder):
    return FactsDataModule(people=30, unseen_people=0, batch_size=8, n_val_questions=4)


def make_packed(folder):
    return FactsDataModule(
        people=30, unseen_people=0, batch_size=8, layout="packed", seq_len=256, n_val_questions=4
    )


def make_text(folder):
    path = folder / "text.txt"
    path.write_text("".join(f"line {i}: the quick brown fox\n" for i in range(300)))
    return TextDataModule(str(path), seq_len=32, batch_size=8)


def make_recall(folder):
    return RecallDataModule(batch_size=8)


def make_mad(folder):
    return MADDataModule(batch_size=8)


def make_population(folder):
    member = {
        "class_path": "toolmem.data.FactsDataModule",
        "init_args": {"people": 20, "unseen_people": 0, "batch_size": 8, "n_val_questions": 4},
    }
    return PopulationDataModule(member, [{"seed": 0}, {"seed": 1}])


KINDS = {
    "facts": make_facts,
    "packed": make_packed,
    "text": make_text,
    "recall": make_recall,
    "mad": make_mad,
    "population": make_population,
}


def rows_of(batch):
    """The rows of a batch that bear loss, as a set of their targets and where they count."""
    parts = getattr(batch, "parts", None) or [batch]
    rows = []
    for number, part in enumerate(parts):
        for targets, mask in zip(part.targets, part.loss_mask, strict=True):
            kept = targets[mask].tolist()
            if part.documents is not None or kept:
                rows.append((number, kept))
    return rows


def run(make, folder, world, state, monkeypatch):
    """The batches of all ranks for some steps, as sorted rows, and the state after them."""
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, world))
        data = make(folder)
        data.setup("fit")
        if state is not None:
            data.load_state_dict(json.loads(json.dumps(state)))
        batches = []
        for batch in islice(iter(data.train_dataloader()), BATCHES):
            batches.append(rows_of(batch))
            data.consumed(batch.state)
        ranks.append(batches)
        after = data.state_dict()
    return [[row for rows in step for row in rows] for step in zip(*ranks, strict=True)], after


def tokens(steps):
    """Of each step, what bears loss, whatever row or rank it came in."""
    return [sorted(t for _, row in rows for t in row) for rows in steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_the_global_order_is_kept(kind, before, after, tmp_path, monkeypatch):
    make = KINDS[kind]
    first, state = run(make, tmp_path, 1, None, monkeypatch)
    second, _ = run(make, tmp_path, 1, state, monkeypatch)
    shared, state = run(make, tmp_path, before, None, monkeypatch)
    resumed, _ = run(make, tmp_path, after, state, monkeypatch)
    assert tokens(shared) == tokens(first) and tokens(resumed) == tokens(second)
    assert tokens(first) != tokens(second) and all(tokens(first))
    if kind != "packed":  # where rows are put together anew, samples are the same, rows are not
        assert [sorted(step) for step in shared + resumed] == [
            sorted(step) for step in first + second
        ]


def test_documents_are_refused_with_the_numbers(tmp_path, monkeypatch):
    lines = "".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(200))
    (tmp_path / "c.jsonl").write_text(lines)

    def make(**options):
        options = {"seq_len": 32, "batch_size": 8} | options
        return TextDataModule(str(tmp_path / "c.jsonl"), **options)

    for before, after in ((1, 2), (2, 1), (2, 4)):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (0, before))
        data = make()
        data.consumed(next(iter(data.train_dataloader())).state)
        state = data.state_dict()
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (0, after))
        other = make()
        other.load_state_dict(state)
        words = rf"world_size {before}, this one has {after}; use as many devices as before"
        with pytest.raises(ToolmemError, match=words):
            other.train_dataloader()


@pytest.mark.parametrize("kind", ["facts", "text", "recall"])
def test_another_global_batch_is_refused_with_the_numbers(kind, tmp_path, monkeypatch):
    data = KINDS[kind](tmp_path)
    data.setup("fit")
    data.consumed(next(iter(data.train_dataloader())).state)
    monkeypatch.setattr(StatefulDataModule, "rank_and_world", (0, 2))
    other = KINDS[kind](tmp_path)
    other.batch_size = 16  # 8 for each of two, as one had
    other.setup("fit")
    other.load_state_dict(data.state_dict())
    with pytest.raises(ToolmemError, match=r"data.init_args.batch_size is 16, .* had 8"):
        other.train_dataloader()


def test_more_processes_than_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(StatefulDataModule, "rank_and_world", (0, 16))
    data = make_facts(tmp_path)
    data.setup("fit")
    with pytest.raises(
        ToolmemError, match="batch_size 8 is smaller than the number of processes, 16"
    ):
        data.train_dataloader()
