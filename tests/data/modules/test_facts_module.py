import json
from itertools import islice

import pytest
import torch

from toolmem.data.factbase import Factbase
from toolmem.data.modules.base import StatefulDataModule
from toolmem.data.modules.facts import FactsDataModule
from toolmem.data.people import ATTRIBUTES
from toolmem.data.text.token_table import encode_dialogue
from toolmem.errors import ToolmemError


def make(**options):
    return FactsDataModule(**({"people": 40, "batch_size": 16, "unseen_people": 9} | options))


def rows_of(batches):
    """Every dialogue of the batches, as the text of its row without padding."""
    return [
        bytes(t if t < 256 else 0 for t in [*row.tolist()]).rstrip(b"\0").split(b"\0", 1)[1]
        for batch in batches
        for row in batch.tokens
    ]


def test_what_is_known_before_setup():
    data = make(setting="in_tool")
    assert data.vocab_size == 260 and data.batch_size == 16
    info = json.loads(json.dumps(data.checkpoint_info()))
    assert info["tokenizer"] == {"type": "byte"} and info["setting"] == "in_tool"
    assert info["templates"][0]["name"] == "in_tool"
    assert info["factbase"]["people"] == 40
    assert info["factbase"]["fingerprint"] == data.population.fingerprint()


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_an_epoch_tells_every_fact_once(setting):
    data = make(setting=setting)
    data.setup()
    batches = list(islice(data.train_dataloader(), 10))
    assert batches[9].state["epoch"] == 1
    expected = sorted(
        data.tokenizer.decode_bytes(encode_dialogue(d, data.tokenizer)[0][1:])
        for d in data.question_table.dialogues()
    )
    found = sorted(
        data.tokenizer.decode_bytes([t for t in row.tolist() if t][1:])
        for batch in batches
        for row in torch.cat([batch.tokens[:, :1], batch.targets], 1)
    )
    assert found == expected and len(found) == 160
    assert max(batch.tokens.shape[1] for batch in batches) <= data.seq_len


def test_validation_is_fixed_and_asks_whom_it_should():
    in_tool, in_weight = make(setting="in_tool"), make(n_val_questions=50)
    names = {name.encode() for name in in_tool.population.names}

    def asked(data):
        rows = [r for batch in data.val_dataloader() for r in rows_of([batch])]
        return rows, [any(name in row for name in names) for row in rows]

    rows, known = asked(in_tool)
    assert len(rows) == 36 and not any(known)
    rows, known = asked(in_weight)
    assert len(rows) == 50 and all(known)
    first, second = list(in_tool.val_dataloader()), list(in_tool.val_dataloader())
    assert len(in_tool.val_dataloader()) == len(first) == 3
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, second, strict=True))
    rows, known = asked(make(setting="in_tool", val_split="known", n_val_questions=50))
    assert len(rows) == 50 and all(known)


def test_questions_are_a_fixed_sample():
    data = make()
    known, unseen = data.questions("known", 30), data.questions("unseen", 30)
    assert len(known) == len(unseen) == 30
    assert known == make().questions("known", 30)
    assert {q.person for q in known} <= set(data.population.names)
    assert {q.person for q in unseen} <= set(data.unseen_population.names)
    words = {word for name in data.population.names for word in name.split()}
    assert not words & {word for q in unseen for word in q.person.split()}
    assert {q.attribute for q in known} == set(ATTRIBUTES)
    assert len(data.questions("unseen", 10_000)) == 36
    assert make(unseen_people=0).questions("unseen", 3) == []


def test_held_out_questions_are_never_trained_on():
    data = make(templates=["in_weight", "paragraphs"], held_out=0.25)
    held_out = data.questions("held_out", 1000)
    known = data.questions("known", 1000)
    assert len(held_out) == 40 and len(known) == 120
    assert not {q.turns for q in held_out} & {q.turns for q in known}
    n_epoch = len(data.table) - 40
    seen, batches = [], iter(data.train_dataloader())
    while len(seen) < n_epoch:
        seen += rows_of([next(batches)])
    assert len(seen) == n_epoch > 160

    def as_rows(questions):
        return {f"{q.question}\0{q.conclusion}".encode() for q in questions}

    assert as_rows(known) < set(seen)
    assert not as_rows(held_out) & set(seen)
    assert set(rows_of(data.val_dataloader())) == as_rows(held_out)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_resuming_after_what_was_consumed(num_workers, layout, take):
    """Batches that were fetched ahead, but not trained on, come again."""
    options = {"layout": layout, "num_workers": num_workers}
    everything = take(make(**options).train_dataloader(), 24)
    data = make(**options)
    for batch in take(data.train_dataloader(), 15)[:13]:
        data.consumed(batch.state)
    state = json.loads(json.dumps(data.state_dict()))
    assert state["stream"]["epoch"] == 1
    resumed = make(**options)
    resumed.load_state_dict(state)
    resumed.setup()
    for a, b in zip(take(resumed.train_dataloader(), 11), everything[13:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert torch.equal(a.loss_mask, b.loss_mask) and a.state == b.state


def test_resuming_on_other_data_is_refused_but_validating_is_not():
    data = make()
    data.consumed(next(iter(data.train_dataloader())).state)
    state = data.state_dict()
    for options, key in (
        ({"batch_size": 8}, "batch_size"),
        ({"seed": 1}, "people"),
        ({"layout": "rows"}, "layout"),
        ({"templates": "biographies"}, "templates"),
    ):
        other = make(**options)
        other.load_state_dict(state)
        assert len(list(other.val_dataloader())) > 0
        with pytest.raises(ToolmemError, match=f"cannot resume from .*: data.init_args.{key}"):
            other.train_dataloader()
    with pytest.raises(ToolmemError, match="format 99"):
        make().load_state_dict(state | {"format": 99})


def test_any_number_of_devices_can_resume(monkeypatch):
    data = make()
    whole = list(islice(data.train_dataloader(), 9))
    data.consumed(whole[3].state)
    for rank in range(2):
        resumed = make()
        resumed.load_state_dict(data.state_dict())
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, 2))
        for a, b in zip(islice(resumed.train_dataloader(), 5), whole[4:], strict=True):
            assert sorted(rows_of([a])) == sorted(rows_of([b])[rank::2])


def test_packed_rows_have_the_models_length():
    data = make(layout="packed")
    assert data.seq_len == 256
    widths = [batch.tokens.shape[1] for batch in islice(data.train_dataloader(), 20)]
    assert max(widths) <= 256 and max(widths) > 200
    assert make(layout="packed", seq_len=128).seq_len == 128
    assert make(layout="packed", seq_len=10).seq_len == make().seq_len


def test_your_own_table(tmp_path):
    path = tmp_path / "pets.csv"
    path.write_text("name,colour\n" + "".join(f"Pet{i} Smith,red{i}\n" for i in range(8)))
    data = FactsDataModule(people=str(path), batch_size=4, unseen_people=3)
    data.setup()
    assert {q.attribute for q in data.questions("known", 99)} == {"colour"}
    assert data.checkpoint_info()["factbase"]["source"]


def test_the_factbase_is_the_population(tmp_path):
    data = make()
    fingerprint = data.write_factbase(tmp_path / "facts.duckdb")
    assert fingerprint == data.checkpoint_info()["factbase"]["fingerprint"]
    with Factbase.open(tmp_path / "facts.duckdb") as factbase:
        assert factbase.population().names == data.population.names


def test_names_may_run_out_unless_asked_for():
    data = make(people=140_000, unseen_people=None)
    assert data.unseen_population is None
    with pytest.raises(ToolmemError, match="unseen"):
        _ = make(people=140_000, unseen_people=5).unseen_population


@pytest.mark.parametrize(
    "options, message",
    [
        ({"templates": "in_tool"}, "the database speaks, but data.init_args.setting is in_weight"),
        ({"templates": "in_weight", "setting": "in_tool"}, "the database never speaks"),
        ({"templates": "nowhere"}, "no folder nowhere"),
        ({"held_out": 1.0}, "data.init_args.held_out is 1.0"),
        ({"val_split": "held_out"}, "data.init_args.held_out is 0"),
        ({"batch_size": 0}, "data.init_args.batch_size"),
        ({"tokenizer": "missing.json"}, "no tokenizer at missing.json"),
    ],
)
def test_mistakes_are_told(options, message):
    with pytest.raises(ToolmemError, match=message):
        make(**options)
    with pytest.raises(ToolmemError, match=r"data.init_args.val_split is unseen"):
        make(unseen_people=0, val_split="unseen").val_dataloader()


@pytest.mark.parametrize("layout", ["bucketed", "rows", "packed"])
def test_which_dialogues_a_batch_tells(layout, monkeypatch):
    """Read back from its tokens, over an epoch's end, several template sets, and two processes."""
    for rank in range(2):
        monkeypatch.setattr(StatefulDataModule, "rank_and_world", (rank, 2))
        data = make(templates=["in_weight", "paragraphs"], held_out=0.25, layout=layout)
        for batch in islice(data.train_dataloader(), 14):
            told = [encode_dialogue(d, data.tokenizer)[0].tolist() for d in data.dialogues(batch)]
            rows = [[row[0], *rest] for row, rest in zip(
                batch.tokens.tolist(), batch.targets.tolist(), strict=True
            )]  # fmt: skip
            if layout == "packed":
                inside = str(batch.tokens.flatten().tolist())
                assert all(str(d[:-1])[1:-1] in inside for d in told)
                assert batch.n_tokens == sum(len(d) - 1 for d in told)
            else:
                assert [row[: len(d)] for row, d in zip(rows, told, strict=True)] == told
