from __future__ import annotations

import math

import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

from toolmem.data import FactsDataModule
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_knowledge
from toolmem.models import Transformer
from toolmem.models.quantization import as_stored
from toolmem.training import EMA, KnowledgeProbe, Muon
from toolmem.training.callbacks.stopping import StopAt
from toolmem.training.loggers import CSVLogger, read_rows

STORAGE = ("bfloat16", "int8", "int4", "int2")


def facts(**changes):
    return FactsDataModule(**({"people": 3, "unseen_people": 0, "batch_size": 6} | changes))


def fit(folder, callbacks, max_steps=4, data=None, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = Transformer(260, dim=8, n_layers=1, n_heads=2, max_seq_len=512, dropout=0.1)
    module = make_module(model)
    trainer = make_trainer(
        folder, max_steps, callbacks=callbacks, limit_val_batches=0, logger=CSVLogger(folder), **options
    )  # fmt: skip
    torch.manual_seed(1)
    trainer.fit(module, data or facts(), ckpt_path=ckpt_path)
    return module, trainer


def test_logs_what_the_weights_hold_and_what_comes_back_from_storage(tmp_path):
    module, _ = fit(tmp_path, [KnowledgeProbe(every_n_steps=3, group_size=4)])
    rows = {int(row["step"]): row for row in read_rows(tmp_path / "metrics.csv")}
    assert [step for step, row in rows.items() if row.get("knowledge/bits")] == [3, 4]
    model, data = module.model.eval(), facts()
    size = sum(p.numel() for p in model.parameters())

    def measured(model):
        return measure_knowledge(model, data.tokenizer, data.question_table)

    logged = {name: value for name, (step, value) in module.reported.items() if step == 4}
    found = measured(model)
    assert logged["knowledge/entropy"] == found.entropy > 90
    assert logged["knowledge/loss"] == found.loss
    assert logged["knowledge/bits"] == found.bits
    assert logged["knowledge/facts"] == 12
    assert logged["knowledge/parameters"] == logged["knowledge/active_parameters"] == size
    for storage in STORAGE:
        stored = as_stored(model, storage, group_size=4)
        assert logged[f"knowledge/{storage}/loss"] == measured(stored.model).loss
        assert logged[f"knowledge/{storage}/stored_bits"] == stored.total_bits
        assert logged[f"knowledge/{storage}/bits_per_parameter"] == 0
    losses = [logged[f"knowledge/{name}/loss"] for name in STORAGE]
    assert len({found.loss, *losses}) == 5  # each is a model of its own
    assert f"{found.loss:.8g}" == rows[4]["knowledge/loss"]


def test_training_is_the_same_with_and_without_it(tmp_path):
    with_it, _ = fit(tmp_path / "a", [KnowledgeProbe(every_n_steps=1, n_questions=10)])
    without, _ = fit(tmp_path / "b", [])
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_it.model.training


def test_what_it_learns_is_told_by_attribute(tmp_path):
    """A few steps on one birth place alone, which is then known."""
    data = facts(people=1, attributes=["birth_place"])
    torch.manual_seed(0)
    model = Transformer(260, dim=16, n_layers=1, n_heads=2, max_seq_len=128, tie_embeddings=True)
    module = make_module(model, optimizer=Muon(lr=3e-2))
    trainer = make_trainer(tmp_path, 40, callbacks=[KnowledgeProbe()], limit_val_batches=0)
    trainer.fit(module, data)
    logged = {name: value for name, (_, value) in module.reported.items()}
    assert logged["knowledge/recall"] == 1
    assert logged["knowledge/entropy"] == math.log2(7)
    assert 2.5 < logged["knowledge/bits"] == logged["knowledge/bits/birth_place"] < math.log2(7)
    assert logged["knowledge/bfloat16/recall"] == 1


def test_a_run_that_ends_early_is_measured_once_and_not_again_when_it_goes_on(tmp_path):
    module, trainer = fit(tmp_path, [KnowledgeProbe(storage=[]), StopAt(2)], max_steps=6)
    assert module.reported["knowledge/bits"][0] == 2
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    module, trainer = fit(
        tmp_path, [KnowledgeProbe(storage=[]), StopAt(2)], 6, ckpt_path=tmp_path / "ended.ckpt"
    )
    assert trainer.global_step in (2, 3)
    module, _ = fit(tmp_path, [KnowledgeProbe(storage=[])], 6, ckpt_path=tmp_path / "ended.ckpt")
    assert module.reported["knowledge/bits"][0] == 6
    steps = [row["step"] for row in read_rows(tmp_path / "metrics.csv") if row["knowledge/bits"]]
    assert steps == ["2", "6"]


def test_it_measures_the_average_where_the_run_keeps_one(tmp_path):
    probe = KnowledgeProbe(storage=[])
    module, _ = fit(tmp_path, [EMA(decay=0.5), probe])
    data = facts()
    average = measure_knowledge(module.model.eval(), data.tokenizer, data.question_table)
    assert module.reported["knowledge/loss"] == (4, average.loss)  # which is what the run ends with


def test_data_without_facts_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, 4, callbacks=[KnowledgeProbe(every_n_steps=1)])
    module = make_module()
    trainer.fit(module, ToyData())
    assert not any("knowledge" in name for name in module.reported)


def test_impossible_values_are_refused():
    with pytest.raises(ToolmemError, match="every_n_steps"):
        KnowledgeProbe(every_n_steps=-1)
    with pytest.raises(ToolmemError, match="group_size is 0"):
        KnowledgeProbe(group_size=0)
