"""Tricks of training: z-loss, several tokens ahead, averaged weights, growing batches, exclusions."""

import contextlib

import lightning.pytorch as pl
import pytest
import torch
from training_toys import ToyData, make_batch, make_module, make_trainer, tiny

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.models import MoETransformer
from toolmem.models.context import Extras
from toolmem.training import (
    EMA,
    AdamW,
    BatchSizeWarmup,
    Checkpointing,
    Constant,
    Linear,
    Muon,
)


def uneven(index: int):
    return make_batch(index, rows=2 + index % 3, seq=4 + index % 5, mask=(0.9, 0.1, 0.4)[index % 3])


class Plain(AdamW):
    def build(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr)


def gradients(folder, model, accumulate=1, callbacks=(), steps=1, **options):
    """What steps of SGD with rate 1 took off each parameter."""
    module = make_module(model, optimizer=Plain(lr=1.0), schedule=Constant(), **options)
    before = [p.detach().clone() for p in model.parameters()]
    trainer = make_trainer(
        folder, steps, accumulate_grad_batches=accumulate, callbacks=list(callbacks)
    )
    trainer.fit(module, ToyData(uneven))
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


def plain_loss(model, batches, z_loss=0.0):
    """Cross-entropy and z-loss, mean over all loss-bearing tokens, written out (PaLM, section 5)."""
    total, squares, count = 0.0, 0.0, 0
    for batch in batches:
        logits = model(batch.tokens)
        for row, position in batch.loss_mask.nonzero().tolist():
            log_z = logits[row, position].exp().sum().log()
            total = total + log_z - logits[row, position, batch.targets[row, position]]
            squares = squares + log_z**2
            count += 1
    return (total + z_loss * squares) / count, squares / count


def test_z_loss_in_plain_float64(tmp_path):
    model, expected = tiny().double(), tiny().double()
    loss, _ = plain_loss(expected, [uneven(i) for i in range(3)], 0.1)
    loss.backward()
    found = gradients(tmp_path, model, accumulate=3, z_loss=0.1)
    for mine, other in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-10)


def test_z_loss_is_logged_and_kept_out_of_validation(tmp_path):
    module = make_module(optimizer=Plain(lr=1e-9), schedule=Constant(), z_loss=0.01)
    trainer = make_trainer(tmp_path, 3, log_every_n_steps=3, val_check_interval=3)
    trainer.fit(module, ToyData(uneven))
    loss, squares = plain_loss(tiny(), [uneven(i) for i in range(3)])
    assert module.reported["train/z_loss"][1] == pytest.approx(0.01 * squares.item(), rel=1e-4)
    assert module.reported["train/loss"][1] == pytest.approx(loss.item(), rel=1e-4)
    loss, _ = plain_loss(tiny(), [uneven(i) for i in range(1000, 1003)])
    assert module.reported["val/loss"][1] == pytest.approx(loss.item(), rel=1e-4)
    nothing = Extras()
    module.token_losses(make_batch(0, mask=0.0), module.model.hidden, nothing)
    assert nothing.losses["train/z_loss"] == 0
    with pytest.raises(ToolmemError, match=r"model\.z_loss"):
        make_module(z_loss=-1.0)


def test_experts_are_reported_and_balanced_in_training(tmp_path):
    """The figures of one step of three batches: means over their loss-bearing tokens; biases move once."""

    def make():
        torch.manual_seed(0)
        return MoETransformer(
            11, 8, 2, 2, hidden_dim=8, n_experts=4, top_k=1, normalize_weights=False, max_seq_len=9,
            capacity_factor=0.5, balance_loss=0.01, z_loss=0.001, bias_update_rate=0.25,
        )  # fmt: skip

    expected, weights, plain = {}, 0, make().train()
    for batch in (uneven(i) for i in range(3)):
        extras, count = Extras(), int(batch.loss_mask.sum())
        plain.hidden(batch.tokens, extras=extras)
        weights += count
        for name, value in (extras.losses | extras.metrics).items():
            expected[name] = expected.get(name, 0.0) + count * float(value)
    module = make_module(make(), optimizer=Plain(lr=1e-9), schedule=Constant())
    trainer = make_trainer(tmp_path, 1, log_every_n_steps=1, accumulate_grad_batches=3)
    trainer.fit(module, ToyData(uneven))
    names = {
        "moe/router_entropy", "moe/load_max_over_mean", "moe/dropped_fraction", "moe/balance_loss",
        "moe/z_loss",
    }  # fmt: skip
    assert names == expected.keys() and 0 < expected["moe/dropped_fraction"] < weights
    for name in names:
        wanted = pytest.approx(expected[name] / weights, rel=1e-4)
        assert module.reported[name][1] == wanted
    for block, other in zip(module.model.blocks, plain.blocks, strict=True):
        load = other.feed_forward.router.load
        assert load.sum() > 0 and not block.feed_forward.router.load.any()
        moved = 0.25 * torch.sign(load.sum() - 4 * load).float()
        assert torch.equal(block.feed_forward.router.bias, moved)


def test_tokens_ahead_weigh_the_same_in_any_batches(tmp_path):
    """Accumulated over uneven batches: sums over all tokens, divided once."""
    model, expected = (tiny(multi_token=2).double() for _ in range(2))
    total, count = 0.0, 0
    for batch in (uneven(i) for i in range(3)):
        extras = Extras()
        losses = make_module(expected).token_losses(batch, expected.hidden, extras)
        total = total + losses.sum() + losses.numel() * extras.losses["multi_token/loss"]
        count += losses.numel()
    (total / count).backward()
    found = gradients(tmp_path, model, accumulate=3)
    assert any("multi_token" in name for name, _ in model.named_parameters())
    for mine, other in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-7)


def test_tokens_ahead_are_learned_and_left_out_of_validation(tmp_path):
    module = make_module(tiny(multi_token=1))
    trainer = make_trainer(tmp_path, 150, log_every_n_steps=25, val_check_interval=150)
    trainer.fit(
        module, ToyData()
    )  # rows that count up: the token after next is as sure as the next
    assert module.reported["multi_token/loss_2"][1] < 0.3
    assert module.reported["multi_token/loss"][1] == pytest.approx(
        0.3 * module.reported["multi_token/loss_2"][1], rel=1e-4
    )
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(1000, 1003):
            batch = make_batch(i)
            log_probs = module.model.eval()(batch.tokens).log_softmax(-1)
            picked = log_probs.gather(-1, batch.targets[..., None])[..., 0]
            total, count = total - picked[batch.loss_mask].sum(), count + batch.loss_mask.sum()
    assert module.reported["val/loss"][1] == pytest.approx((total / count).item(), rel=1e-4)


# ---- averaged weights


class Killed(Exception):
    pass


class Kill(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step >= self.step:
            raise Killed


class Weights(pl.Callback):
    """Remembers the weights after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == len(self.seen) + 1:
            self.seen.append([p.detach().clone() for p in pl_module.model.parameters()])


def run(folder, callbacks, max_steps=12, kill=None, resume=None, accumulate=1, every=4):
    module = make_module(schedule=Linear(warmup_steps=3))
    data = ToyData(uneven)
    trainer = make_trainer(
        folder,
        max_steps,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
        callbacks=[*callbacks, Checkpointing(every_n_steps=every), *([Kill(kill)] if kill else [])],
        val_check_interval=5,
        log_every_n_steps=4,
    )
    torch.manual_seed(5)
    with contextlib.suppress(Killed):
        trainer.fit(module, data, ckpt_path=resume)
    return module, data, trainer


def test_average_is_what_the_formula_says_and_what_the_checkpoint_holds(tmp_path):
    weights = Weights()
    module, _, _ = run(tmp_path, [weights, EMA(decay=0.8, start_step=3)], 8, every=8)
    average = [w.double() for w in weights.seen[2]]
    for step in weights.seen[3:]:
        average = [0.8 * a + 0.2 * w.double() for a, w in zip(average, step, strict=True)]
    loaded = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")
    model = checkpoints.build_model(loaded["toolmem"]["model"], "here")
    model.load_state_dict({k.removeprefix("model."): v for k, v in loaded["state_dict"].items()})
    current = list(loaded["current_model_state"].values())
    held = zip(average, model.parameters(), module.model.parameters(), strict=True)
    for expected, kept, left in held:
        torch.testing.assert_close(kept.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(kept, left)  # what fit leaves in the model is the average
    assert all(torch.equal(a, b) for a, b in zip(current, weights.seen[-1], strict=True))


def test_validation_is_on_the_average_and_changes_nothing(tmp_path):
    weights, again = Weights(), Weights()
    module, _, _ = run(tmp_path / "a", [weights, EMA(decay=0.5)], 10)
    plain, _, _ = run(tmp_path / "b", [again], 10)
    for mine, other in zip(weights.seen, again.seen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    average = weights.seen[0]
    for step in weights.seen[1:]:
        average = [0.5 * a + 0.5 * w for a, w in zip(average, step, strict=True)]
    model = tiny()
    for parameter, value in zip(model.parameters(), average, strict=True):
        parameter.data = value
    loss, _ = plain_loss(model, [uneven(i) for i in range(1000, 1003)])
    assert module.reported["val/loss"] == (10, pytest.approx(loss.item(), rel=1e-4))
    assert plain.reported["val/loss"][1] != module.reported["val/loss"][1]


class Stop(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def assert_same_end(first, second):
    first, second = (
        checkpoints.read(folder / "checkpoints" / "last.ckpt") for folder in (first, second)
    )
    for key in ("state_dict", "current_model_state"):
        assert first.get(key, {}).keys() == second.get(key, {}).keys()
        for name, value in first.get(key, {}).items():
            assert torch.equal(value, second[key][name]), (key, name)


@pytest.mark.parametrize(("end", "every", "last"), [(Kill(10), 4, 8), (Stop(7), 100, 7)])
def test_a_killed_or_ended_run_with_an_average_goes_on_exactly(tmp_path, end, every, last):
    """The ended run has no checkpoint but that of its end."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    module, _, _ = run(whole, [EMA(decay=0.7)])
    run(part, [EMA(decay=0.7), end], every=every)
    resumed, data, _ = run(part, [EMA(decay=0.7)], resume=part / "checkpoints" / "last.ckpt")
    assert data.log == list(range(last, 12))
    assert_same_end(whole, part)
    for a, b in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_average_is_not_gone_on_from_without_it(tmp_path):
    run(tmp_path, [EMA()], 4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ToolmemError, match=r"toolmem\.training\.EMA"):
        run(tmp_path, [], resume=last)
    results = make_trainer(tmp_path, callbacks=[EMA()]).validate(
        make_module(), ToyData(uneven), ckpt_path=last, weights_only=True, verbose=False
    )
    assert results[0]["val/loss"] > 0


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"every_n_steps": 0}, {"start_step": -1}])
def test_an_average_of_nothing_is_refused(options):
    with pytest.raises(ToolmemError, match=next(iter(options))):
        EMA(**options)


# ---- growing batches


def test_a_step_of_more_batches_is_the_mean_over_all_their_tokens(tmp_path):
    model, expected = tiny().double(), tiny().double()
    warmup = BatchSizeWarmup({0: 1, 2: 2, 3: 4})
    found = gradients(tmp_path, model, callbacks=[warmup], steps=5)
    start = [p.detach().clone() for p in expected.parameters()]
    batches = [[0], [1], [2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for step in batches:
        expected.zero_grad()
        plain_loss(expected, [uneven(i) for i in step])[0].backward()
        with torch.no_grad():
            for parameter in expected.parameters():
                parameter -= parameter.grad
    for mine, before, now in zip(found, start, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, before - now, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kill", [3, 5, 8])
def test_growing_batches_are_resumed_exactly(tmp_path, kill):
    def warmup():
        return BatchSizeWarmup({0: 1, 2: 2, 5: 4})

    whole, part = tmp_path / "whole", tmp_path / "part"
    _, every_batch, trainer = run(whole, [warmup()], every=1)
    assert len(every_batch.log) == 2 + 3 * 2 + 7 * 4
    assert trainer.accumulate_grad_batches == 1
    run(part, [warmup()], kill=kill, every=1)
    # validation comes every five batches, so best.ckpt is mostly from within a step
    for name in ("last.ckpt", "best.ckpt"):
        _, data, _ = run(part, [warmup()], resume=part / "checkpoints" / name, every=1)
        assert data.log == every_batch.log[data.log[0] :]
        assert_same_end(whole, part)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({}, "step 0"),
        ({1: 2}, "step 0"),
        ({0: 0}, "1 batch"),
        ({0: 1, 5: 2}, "1 step later"),
        ({0: 2, 5: 3}, "1 step later"),
        ({0: 2, 2: 4, 3: 7}, "5 steps later"),
    ],
)
def test_stages_that_cannot_be(stages, words):
    with pytest.raises(ToolmemError, match=words):
        BatchSizeWarmup(stages)


def test_one_owner_of_the_number_of_batches(tmp_path):
    with pytest.raises(ToolmemError, match="accumulate_grad_batches is 2"):
        run(tmp_path, [BatchSizeWarmup({0: 1})], accumulate=2)


# ---- weight decay


@pytest.mark.parametrize("make", [AdamW, Muon])
def test_what_is_excluded_does_not_decay(make):
    """With gradients of zero a step is decay alone."""
    exempt = {
        "embedding.weight": True,
        "blocks.0.mixer.qkv.weight": False,
        "blocks.0.feed_forward.down.weight": True,
        "blocks.1.feed_forward.down.weight": True,
        "blocks.1.mixer.out.weight": True,
        "head.weight": False,
        "norm.weight": True,
    }
    model = tiny()
    config = make(lr=0.1, weight_decay=0.5, no_decay=(r"feed_forward\.down", r"^blocks\.1\.mixer"))
    optimizer = config.build(model)
    parameters = dict(model.named_parameters())
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in parameters.values())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, kept in exempt.items():
        expected = before[name] * (1 if kept else 1 - 0.1 * 0.5)
        torch.testing.assert_close(parameters[name].detach(), expected, atol=1e-6, rtol=1e-5)


def test_a_pattern_that_is_none():
    with pytest.raises(ToolmemError, match=r"no_decay: '\*x'"):
        AdamW(no_decay=("*x",))
