"""The probe measures what it says, when it says, and changes nothing."""

import csv

import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

from toolmem.data import FactsDataModule, PopulationDataModule
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_token_losses
from toolmem.models import Transformer
from toolmem.training import (
    EMA,
    WSD,
    Checkpointing,
    CSVLogger,
    Member,
    Muon,
    PopulationModule,
    RecallProbe,
    TokenLossProbe,
)


def facts(setting="in_tool", **changes):
    arguments = {"people": 6, "setting": setting, "unseen_people": 4, "batch_size": 8}
    return FactsDataModule(**(arguments | changes))


def make_model(dropout=0.1):
    torch.manual_seed(0)
    return Transformer(260, dim=8, n_layers=1, n_heads=2, max_seq_len=512, dropout=dropout)


def fit(folder, callbacks=(), data=None, max_steps=4, ckpt_path=None, dropout=0.1, **options):
    trainer = make_trainer(
        folder,
        max_steps,
        logger=CSVLogger(folder),
        callbacks=list(callbacks),
        limit_val_batches=0,
        **options,
    )
    module = make_module(make_model(dropout))
    torch.manual_seed(1)
    trainer.fit(module, data or facts(), ckpt_path=ckpt_path)
    return module


def rows(folder):
    with open(folder / "metrics.csv") as stream:
        return [row for row in csv.DictReader(stream) if row.get("loss/known/other")]


def test_what_is_logged_and_when(tmp_path):
    probe = TokenLossProbe(steps=[0, 1, 3], n_questions=5, n_unseen=3)
    data = facts()
    module = fit(tmp_path, [probe], data)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == ["0", "1", "3", "4"]
    for split, n in (("known", 5), ("unseen", 3)):
        module.model.eval()
        expected = measure_token_losses(module.model, data.tokenizer, data.questions(split, n))
        assert set(expected) == {"query", "name", "copied", "other"}
        for kind, found in expected.items():
            assert float(logged[-1][f"loss/{split}/{kind}"]) == pytest.approx(found.loss, rel=1e-6)
            assert float(logged[-1][f"accuracy/{split}/{kind}"]) == pytest.approx(found.accuracy)
    # before the first step: the model as it was made
    first = measure_token_losses(make_model().eval(), data.tokenizer, data.questions("known", 5))
    assert float(logged[0]["loss/known/name"]) == pytest.approx(first["name"].loss, rel=1e-6)


def test_in_weight_has_what_is_memorised_and_no_queries(tmp_path):
    fit(tmp_path, [TokenLossProbe(every_n_steps=2, n_unseen=0)], facts("in_weight"))
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == ["2", "4"]
    named = {name for name in logged[0] if name.startswith("loss/")}
    assert named == {"loss/known/name", "loss/known/memorised", "loss/known/other"}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_the_same_with_and_without_it(tmp_path, accumulate):
    options = {"accumulate_grad_batches": accumulate}
    with_it = fit(tmp_path / "a", [TokenLossProbe(steps=[0], every_n_steps=1)], **options)
    without = fit(tmp_path / "b", **options)
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_it.model.training


def test_a_resumed_run_logs_the_same(tmp_path):
    def go(folder, *more, **options):
        probe, keep = TokenLossProbe(steps=[0, 1], every_n_steps=2), Checkpointing(every_n_steps=4)
        options |= {"max_steps": 8, "enable_checkpointing": True, "dropout": 0.0}
        return fit(folder, [probe, keep, *more], **options)

    go(tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(Killed):
        go(part, Kill())
    assert [row["step"] for row in rows(part)] == ["0", "1", "2", "4", "6"]
    go(part, ckpt_path=part / "checkpoints" / "last.ckpt")
    assert (part / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()
    assert [row["step"] for row in rows(part)] == ["0", "1", "2", "4", "6", "8"]


class Killed(Exception):
    pass


class Kill(Checkpointing):
    """A checkpoint's callback, so that it comes last; it writes none."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 6:
            raise Killed


def test_the_averaged_weights_are_measured(tmp_path):
    data = facts()
    module = fit(tmp_path, [EMA(decay=0.5), TokenLossProbe(steps=[3])], data)
    logged = rows(tmp_path)
    assert [row["step"] for row in logged] == ["3", "4"]
    # at the end the model holds the average
    module.model.eval()
    expected = measure_token_losses(module.model, data.tokenizer, data.questions("known", 256))
    plain = fit(tmp_path / "plain", [TokenLossProbe(steps=[3])])
    assert float(logged[-1]["loss/known/name"]) == pytest.approx(expected["name"].loss, rel=1e-6)
    assert expected["name"].loss != pytest.approx(plain.reported["loss/known/name"][1], rel=1e-3)


def test_other_data_is_passed_over_and_populations_refused(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(tmp_path, 2, callbacks=[TokenLossProbe(every_n_steps=1)])
    trainer.fit(make_module(), ToyData())
    spec = {"class_path": "toolmem.data.FactsDataModule", "init_args": {"people": 4}}
    trainer = make_trainer(tmp_path, 2, callbacks=[TokenLossProbe(every_n_steps=1)])
    with pytest.raises(ToolmemError, match="token_losses looks at one model"):
        trainer.fit(make_module(), PopulationDataModule(spec, [{}]))
    with pytest.raises(ToolmemError, match="token_losses: n_questions"):
        TokenLossProbe(n_questions=0)
    with pytest.raises(ToolmemError, match="token_losses: every_n_steps"):
        TokenLossProbe(steps=[-1])


def test_recall_asks_at_chosen_steps_too(tmp_path):
    probe = RecallProbe(every_n_steps=0, steps=[0, 3], n_questions=2, n_unseen=0, show=False)
    fit(tmp_path, [probe])
    assert [step for step, _ in probe._found] == [0, 3, 4]


def test_each_member_of_a_population_is_asked_at_its_steps(tmp_path):
    spec = {"class_path": "toolmem.data.FactsDataModule", "init_args": {"people": 4}}
    data = PopulationDataModule(spec, [{"seed": 0}, {"seed": 1}])
    arguments = {"optimizer": Muon(lr=1e-2), "schedule": WSD(warmup_steps=2)}
    members = [Member(seed=0), Member(seed=1)]
    module = PopulationModule(make_model(0.0), members=members, **arguments)
    probe = RecallProbe(every_n_steps=0, steps=[0, 2], n_questions=2, n_unseen=0, show=False)
    trainer = make_trainer(
        tmp_path, 3, logger=CSVLogger(tmp_path), callbacks=[probe], limit_val_batches=0
    )
    trainer.fit(module, data)
    for folder in (tmp_path, tmp_path / "members" / "0", tmp_path / "members" / "1"):
        with open(folder / "metrics.csv") as stream:
            asked = [r["step"] for r in csv.DictReader(stream) if r["recall/exact_match"]]
        assert asked == ["0", "2", "3"]
