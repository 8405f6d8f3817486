"""Training on batches that hang on its own losses."""

import pytest
import torch
import torch.nn.functional as F
from training_toys import make_module, make_trainer, tiny

from toolmem.data import FactsDataModule, PopulationDataModule
from toolmem.errors import ToolmemError
from toolmem.training import GRPO, WSD, Checkpointing, Linear, Muon


def make_data(**options):
    return FactsDataModule(
        **({"people": 6, "batch_size": 6, "unseen_people": 3, "prefer_unknown": 0.5} | options)
    )


def model():
    return tiny(vocab_size=260, max_seq_len=256)


class Watch(Checkpointing):
    """Checkpoints, and what each step was trained on."""

    def __init__(self, stop=None, **options):
        super().__init__(**options)
        self.stop = stop
        self.told = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.told[batch.state["batch"] - 1] = batch.dialogues.tolist()
        if trainer.global_step == self.stop:
            raise KeyboardInterrupt


def run(folder, data, steps=11, stop=None, resume=None, **options):
    watch = Watch(stop, every_n_steps=7)
    trainer = make_trainer(
        folder, steps, enable_checkpointing=True, callbacks=[watch], limit_val_batches=0, **options
    )
    module = make_module(model(), schedule=Linear(warmup_steps=3))
    try:
        trainer.fit(module, data, ckpt_path=resume)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    return module, watch


@pytest.mark.parametrize("layout", ["bucketed", "packed"])
def test_a_stopped_run_goes_on_with_the_same_draws(tmp_path, layout):
    whole, told = run(tmp_path / "whole", make_data(layout=layout))
    _, before = run(tmp_path / "part", make_data(layout=layout), stop=7)
    resumed, after = run(
        tmp_path / "part",
        make_data(layout=layout),
        resume=tmp_path / "part" / "checkpoints" / "last.ckpt",
    )
    assert before.told | after.told == told.told and set(after.told) == set(range(7, 11))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_losses_are_the_models_own(tmp_path):
    """What the data is told of each dialogue is its cross-entropy, dialogue by dialogue."""
    data = make_data()
    heard = []
    data.learned = lambda batch, losses: heard.append((batch.dialogues.tolist(), losses))
    net = model()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    make_trainer(tmp_path, 1, limit_val_batches=0).fit(make_module(net), data)
    fresh = model().double()
    fresh.load_state_dict(state)
    (numbers, losses), *rest = heard
    assert len(numbers) == 6 and not rest
    for number, loss in zip(numbers, losses.tolist(), strict=True):
        tokens, roles = data.table.tokens(number), data.table.roles(number)
        logits = fresh.logits(fresh.hidden(torch.from_numpy(tokens)[None, :-1]))[0]
        each = F.cross_entropy(logits, torch.from_numpy(tokens)[1:], reduction="none")
        assert loss == pytest.approx(each[roles[1:] == 2].sum().item(), rel=1e-5)


def test_off_is_as_ever(tmp_path):
    data, ever = make_data(prefer_unknown=0.0), FactsDataModule(6, batch_size=6, unseen_people=3)
    for a, b, _ in zip(data.train_dataloader(), ever.train_dataloader(), range(20), strict=False):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        assert a.dialogues is b.dialogues is None
    assert "latest_losses" not in data.state_dict()
    old = ever.state_dict()  # a checkpoint of before there was the option
    del old["signature"]["prefer_unknown"]
    data.load_state_dict(old)
    data.train_dataloader()


def test_turning_it_on_or_off_is_another_run(tmp_path):
    for first, second in ((0.0, 0.5), (0.5, 0.0), (0.5, 0.25)):
        data = make_data(prefer_unknown=second, batch_size=8)
        data.load_state_dict(make_data(prefer_unknown=first, batch_size=8).state_dict())
        with pytest.raises(ToolmemError, match=r"data.init_args.prefer_unknown is"):
            data.train_dataloader()


def test_what_does_not_go_with_it(tmp_path):
    with pytest.raises(ToolmemError, match=r"prefer_unknown is 1.0"):
        make_data(prefer_unknown=1.0)
    with pytest.raises(ToolmemError, match=r"num_workers \(now 2\) to 0"):
        make_data(num_workers=2)
    spec = {"class_path": "toolmem.data.FactsDataModule", "init_args": {"people": 4}}
    with pytest.raises(ToolmemError, match=r"members\[1\].prefer_unknown"):
        PopulationDataModule(spec, [{}, {"prefer_unknown": 0.5}])
    module = GRPO(model(), Muon(), WSD(), samples=2)
    with pytest.raises(ToolmemError, match="GRPO trains on its own"):
        make_trainer(tmp_path, 1).fit(module, make_data())
