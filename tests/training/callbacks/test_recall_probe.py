import json
import random

import numpy as np
import pytest
import torch
from training_toys import ToyData, make_module, make_trainer

from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.training import RecallProbe
from toolmem.training.callbacks.recall import undisturbed


def facts(setting="in_weight", **changes):
    from toolmem.data.modules import FactsDataModule

    arguments = {
        "people": 6,
        "setting": setting,
        "unseen_people": 4,
        "n_val_questions": 4,
        "batch_size": 8,
    }
    return FactsDataModule(**(arguments | changes))


def fit(folder, probe, data=None, max_steps=4, **options):
    torch.manual_seed(0)
    model = Transformer(260, dim=8, n_layers=1, n_heads=2, max_seq_len=512, dropout=0.1)
    module = make_module(model)
    callbacks = [] if probe is None else [probe]
    trainer = make_trainer(folder, max_steps, callbacks=callbacks, limit_val_batches=0, **options)
    torch.manual_seed(1)
    trainer.fit(module, data or facts())
    return module, trainer


@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_logs_recall_and_keeps_samples(tmp_path, capsys, setting):
    probe = RecallProbe(every_n_steps=3, n_questions=5, n_unseen=3, n_samples=2)
    module, _ = fit(tmp_path, probe, facts(setting))
    reported = {name: step for name, (step, _) in module.reported.items() if "recall" in name}
    attributes = [name for name in reported if name.startswith("recall/exact_match/")]
    assert attributes and set(reported) == {
        "recall/exact_match",
        "recall/unseen/exact_match",
        *attributes,
    }
    assert set(reported.values()) == {4}
    assert module.reported["recall/exact_match"][1] == 0.0
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [
        "step_3.jsonl",
        "step_4.jsonl",
    ]
    lines = (tmp_path / "samples" / "step_4.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert [s["split"] for s in samples] == ["known"] * 2 + ["unseen"] * 2
    assert samples[0]["turns"][0]["role"] == "user"
    assert (tmp_path / "facts.duckdb").exists() == (setting == "in_tool")
    assert capsys.readouterr().err.count("user: ") == 2 * 2


def test_training_is_the_same_with_and_without_it(tmp_path):
    with_it, _ = fit(tmp_path / "a", RecallProbe(every_n_steps=1, n_questions=4, show=False))
    without, _ = fit(tmp_path / "b", None)
    for a, b in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)
    assert with_it.model.training


def test_modes_and_random_numbers_are_put_back():
    model = Transformer(11, dim=8, n_layers=2, n_heads=2, max_seq_len=9)
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with pytest.raises(KeyError), undisturbed(model):
        assert not model.training and not torch.is_grad_enabled()
        random.random(), np.random.rand(), torch.rand(3)
        raise KeyError
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_training_stops_when_enough_is_recalled(tmp_path, monkeypatch):
    from toolmem.evaluation.recall import Sample

    asked = []

    def measure(model, tokenizer, questions, *, answered, **options):
        asked.append(len(questions))
        for number in range(len(questions)):
            answered(Sample("birth_date", "", "", number <= len(asked), (), "end"))

    monkeypatch.setattr("toolmem.evaluation.recall.measure_recall", measure)
    probe = RecallProbe(every_n_steps=2, n_questions=5, n_unseen=0, stop_at=0.75)
    module, trainer = fit(tmp_path, probe, max_steps=50)
    assert trainer.global_step == 6
    assert module.reported["recall/exact_match"] == (6, 0.8)
    assert module.reported["recall/exact_match/birth_date"] == (6, 0.8)
    assert asked == [5, 5, 5]
    assert probe.ended == "recall reached"


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", [0, 3, 4, 7, 8, 10])
def test_a_round_that_was_killed_asks_again_only_what_is_missing(tmp_path, monkeypatch, kill_at):
    """Eight questions and three, two at a time, in parts of four; a cut line is cut off."""
    from toolmem.evaluation import answers, recall

    options = {"every_n_steps": 2, "n_questions": 8, "n_unseen": 3, "batch_size": 2, "n_samples": 2}
    fit(tmp_path / "whole", RecallProbe(**options, show=False))
    plain_add, plain_measure, asked = answers.Answers.add, recall.measure_recall, []

    def add(self, row):
        if len(self.rows) == kill_at and not asked:
            self._file.write(b'{"split": "kno')
            self._file.flush()
            raise Killed
        plain_add(self, row)

    def measure(model, tokenizer, questions, **options):
        asked.append(len(questions))
        return plain_measure(model, tokenizer, questions, **options)

    run = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(answers.Answers, "add", add)
        with pytest.raises(Killed):
            fit(run, RecallProbe(**options, show=False))
    left = run / "evaluations" / "recall_step_2.jsonl"
    assert left.read_bytes().endswith(b'{"split": "kno')
    monkeypatch.setattr(recall, "measure_recall", measure)
    fit(run, RecallProbe(**options, show=False))
    first = [4, 4, 3][min(kill_at // 4, 2) :]
    assert asked == first + [4, 4, 3]  # what is left of the first round, and the second
    for name in ("evaluations", "samples"):
        files = sorted((tmp_path / "whole" / name).iterdir())
        assert len(files) == 2
        for file in files:
            assert (run / name / file.name).read_bytes() == file.read_bytes()
    about, rows = answers.read_answers(left)
    assert about["step"] == 2
    assert [row["split"] for row in rows] == ["known"] * 8 + ["unseen"] * 3
    assert ["turns" in row for row in rows] == [True] * 2 + [False] * 6 + [True] * 2 + [False]


def test_another_model_is_asked_anew(tmp_path, monkeypatch):
    """Answers of a run that had other weights at this step, or other questions, are not its own."""
    from toolmem.evaluation import recall

    plain, asked = recall.measure_recall, []

    def measure(model, tokenizer, questions, **options):
        asked.append(len(questions))
        return plain(model, tokenizer, questions, **options)

    monkeypatch.setattr(recall, "measure_recall", measure)

    def go(n_questions=4, **data):
        probe = RecallProbe(every_n_steps=4, n_questions=n_questions, n_unseen=0, show=False)
        fit(tmp_path, probe, facts(**data))
        return len(asked)

    assert [go(), go(), go(seed=3), go(seed=3, n_questions=5)] == [1, 1, 2, 3]


def test_gives_up_what_is_out_of_reach_and_stays_ended_where_it_goes_on(tmp_path):
    """A model that knows nothing, for all of its rounds; the checkpoint at its end is not trained on."""

    def run(ckpt_path=None, **options):
        probe = RecallProbe(
            every_n_steps=2, n_questions=2, n_unseen=0, show=False, stop_at=0.9, **options
        )
        torch.manual_seed(0)
        model = Transformer(260, dim=8, n_layers=1, n_heads=2, max_seq_len=512)
        trainer = make_trainer(tmp_path, 16, callbacks=[probe], limit_val_batches=0)
        trainer.fit(make_module(model), facts(), ckpt_path=ckpt_path)
        return probe, trainer

    probe, trainer = run(give_up_after=0.6)
    assert (trainer.global_step, probe.ended) == (10, "recall out of reach")
    trainer.save_checkpoint(tmp_path / "ended.ckpt")
    probe, trainer = run(tmp_path / "ended.ckpt", give_up_after=0.6)
    assert (trainer.global_step, probe.ended) == (10, "recall out of reach")
    probe, trainer = run()
    assert (trainer.global_step, probe.ended) == (16, None)


def test_a_new_run_in_an_old_folder_asks_its_own_facts(tmp_path):
    from toolmem.data.factbase import Factbase

    probe = RecallProbe(every_n_steps=4, n_questions=1, n_unseen=0, show=False)
    fit(tmp_path, probe, facts("in_tool", seed=1))
    data = facts("in_tool", seed=2)
    fit(tmp_path, probe, data)
    base = Factbase.open(tmp_path / "facts.duckdb")
    assert base.fingerprint == data.population.fingerprint()
    base.close()


def test_data_without_questions_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, 4, callbacks=[RecallProbe(every_n_steps=1)])
    trainer.fit(make_module(), ToyData())
    assert not (tmp_path / "samples").exists()


def test_impossible_values_are_refused():
    with pytest.raises(ToolmemError, match="stop_at"):
        RecallProbe(stop_at=1.5)
    with pytest.raises(ToolmemError, match="give_up_after is 1"):
        RecallProbe(stop_at=0.5, give_up_after=1.0)
    with pytest.raises(ToolmemError, match="give_up_after needs stop_at"):
        RecallProbe(give_up_after=0.5)
    with pytest.raises(ToolmemError, match="n_questions"):
        RecallProbe(n_questions=0)
