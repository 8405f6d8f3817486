"""What goes wrong with a loss, and what is done about it."""

import itertools
import json

import lightning.pytorch as pl
import pytest
import torch
from training_toys import ToyData, make_batch, make_module, make_trainer

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.training import Checkpointing
from toolmem.training.callbacks import Guard


class Wrong(type(make_module())):
    """Its loss is multiplied in some batches."""

    wrong: dict[int, float]

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.wrong.get(batch.state["batch"] - 1, 1.0)


def trained(folder, wrong, steps=8, guard=None, checkpoint_every=100, **options):
    module = make_module(fused=False)
    module.__class__ = Wrong
    module.wrong = wrong
    kept = []
    callbacks = [] if guard is None else [guard]
    callbacks += [Checkpointing(every_n_steps=checkpoint_every, monitor=None), Keep(kept)]
    trainer = make_trainer(
        folder,
        steps,
        callbacks=callbacks,
        enable_checkpointing=True,
        log_every_n_steps=1,
        **options,
    )
    trainer.fit(module, ToyData())
    return module, kept


class Keep(pl.Callback):
    def __init__(self, kept):
        self.kept = kept

    def on_train_batch_end(self, trainer, module, *_):
        self.kept.append(torch.cat([p.detach().flatten() for p in module.parameters()]))


def same(kept):
    return [torch.equal(a, b) for a, b in itertools.pairwise(kept)]


NAN, INF = float("nan"), float("inf")


def test_a_loss_that_is_no_number_ends_the_run_and_names_its_rows(tmp_path):
    with pytest.raises(
        ToolmemError, match=r"step 3: the loss is nan; its batch has 4 rows"
    ) as caught:
        trained(tmp_path, {3: NAN}, guard=Guard(), checkpoint_every=1)
    path = tmp_path / "guard" / "step_3.json"
    assert str(path) in str(caught.value) and "lower learning rate" in str(caught.value)
    found = json.loads(path.read_text())
    assert found["why"] == "the loss is nan" and found["batches"][0]["state"] == {"batch": 4}
    assert found["batches"][0]["rows"] == [str(row) for row in make_batch(3).tokens.tolist()]
    last = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 3
    assert all(torch.isfinite(w).all() for w in checkpoints.weights_of(last).values())


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_step_is_passed_over_and_counted(tmp_path, value):
    with pytest.warns(UserWarning, match="the step is not taken"):
        module, kept = trained(tmp_path, {2: value, 5: value}, guard=Guard("skip"))
    assert same(kept) == [False, True, False, False, True, False, False]
    assert module.reported["guard/skipped_steps"][1] == 2
    assert torch.isfinite(kept[-1]).all()


def test_a_run_without_trouble_goes_as_if_nobody_had_looked(tmp_path):
    _, watched = trained(tmp_path / "a", {}, guard=Guard("skip", "skip", 5.0, 8))
    _, plain = trained(tmp_path / "b", {})
    assert torch.equal(watched[-1], plain[-1])
    assert not (tmp_path / "a" / "guard").exists()


def test_weights_go_back_to_the_last_checkpoint_and_data_go_on(tmp_path):
    with pytest.warns(UserWarning, match="are those of the last checkpoint"):
        module, kept = trained(tmp_path, {4: NAN}, guard=Guard("roll_back"), checkpoint_every=2)
    # the step after batch 4 has the weights after step 4 (the checkpoint is of step 4)
    assert torch.equal(kept[4], kept[3])
    assert module.reported["guard/roll_backs"][1] == 1
    with pytest.warns(UserWarning, match="last checkpoint"):
        _, kept = trained(tmp_path / "b", {5: NAN}, guard=Guard("roll_back"), checkpoint_every=4)
    assert torch.equal(kept[5], kept[3]) and not torch.equal(kept[4], kept[3])
    assert torch.isfinite(kept[-1]).all()


def test_before_the_first_checkpoint_a_roll_back_is_a_step_not_taken(tmp_path):
    with pytest.warns(UserWarning, match="the step is not taken"):
        module, kept = trained(tmp_path, {2: NAN}, guard=Guard("roll_back"))
    assert same(kept)[1] and module.reported["guard/skipped_steps"][1] == 1


def test_too_many_end_the_run(tmp_path):
    guard = Guard("skip", most=2)
    with (
        pytest.warns(UserWarning, match="Guard"),
        pytest.raises(
            ToolmemError, match="There are 3 such steps within 200, and Guard's most is 2"
        ),
    ):
        trained(tmp_path, dict.fromkeys((2, 3, 4), NAN), guard=guard)


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_spike_is_found_by_the_losses_before(tmp_path, policy):
    guard = Guard(on_spike=policy, spike_deviations=8.0, spike_window=8)
    with pytest.warns(
        UserWarning, match=r"deviations above the median .* of 8 steps; its batch has"
    ):
        _, kept = trained(tmp_path, {12: 1e3}, steps=16, guard=guard)
    assert same(kept)[11] == (policy == "skip")
    assert [path.name for path in (tmp_path / "guard").iterdir()] == ["step_12.json"]


def test_accumulated_micro_batches_are_one_loss(tmp_path):
    with pytest.raises(ToolmemError, match=r"step 1: the loss is nan; its batch has 8 rows"):
        trained(tmp_path, {3: NAN}, guard=Guard(), accumulate_grad_batches=2)


def test_the_loss_is_that_which_is_logged(tmp_path):
    guard = Guard()
    module, _ = trained(tmp_path, {}, steps=5, guard=guard, accumulate_grad_batches=2)
    assert guard.losses[-1] == pytest.approx(module.reported["train/loss"][1], rel=1e-6)


def test_a_run_ends_before_memory_does(tmp_path):
    guard = Guard(host_memory_limit="1KB")
    with pytest.raises(
        ToolmemError, match=r"more than Guard's host_memory_limit 0\.00 GB; last\.ckpt is"
    ):
        trained(tmp_path, {}, guard=guard)
    assert checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["global_step"] >= 1


def test_it_goes_on_from_a_checkpoint():
    one, other = Guard(spike_window=8), Guard(spike_window=8)
    one.losses.extend([3.0, 2.0])
    one.skipped = 4
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert (list(other.losses), other.skipped) == ([3.0, 2.0], 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_nonfinite": "pray"}, "choose stop, skip or roll_back"),
        ({"on_spike": "pray"}, "choose warn, stop, skip or roll_back"),
        ({"spike_window": 2}, "spike_window 8 or more"),
        ({"host_memory_limit": "lots"}, "say it as 32GB"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ToolmemError, match=message):
        Guard(**options)
