import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training_toys import SEQ, ToyData, make_batch, make_module, make_trainer, tiny

from toolmem import checkpoints
from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.training import AdamW, Constant, Cosine


def uneven(index: int) -> Batch:
    """Batches of different sizes, of which very different parts bear loss."""
    return make_batch(index, rows=2 + index % 3, seq=4 + index % 5, mask=(0.9, 0.1, 0.4)[index % 3])


def plain_loss(model, batches):
    """Mean cross-entropy over all loss-bearing tokens of all batches, written out."""
    total, count = 0.0, 0
    for batch in batches:
        log_probs = model(batch.tokens).log_softmax(-1)
        for row in range(batch.tokens.shape[0]):
            for position in range(batch.tokens.shape[1]):
                if batch.loss_mask[row, position]:
                    total = total - log_probs[row, position, batch.targets[row, position]]
                    count += 1
    return total / count


def gradients_of_first_step(tmp_path, make, accumulate, model, **trainer):
    """What a step of SGD with rate 1 took off each parameter: its gradient."""
    module = make_module(model, optimizer=Plain(lr=1.0), schedule=Constant())
    before = [p.detach().clone() for p in model.parameters()]
    fit = make_trainer(tmp_path, 1, accumulate_grad_batches=accumulate, **trainer)
    fit.fit(module, ToyData(make))
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]


class Plain(AdamW):
    def build(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr)


def test_accumulated_uneven_batches_equal_one_big_batch_in_float64(tmp_path):
    model = tiny().double()
    expected = tiny().double()
    plain_loss(expected, [uneven(i) for i in range(4)]).backward()
    found = gradients_of_first_step(tmp_path, uneven, 4, model)
    for mine, other in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-10)


def test_gradients_are_divided_before_they_are_clipped(tmp_path):
    model, expected = tiny().double(), tiny().double()
    plain_loss(expected, [uneven(i) for i in range(3)]).backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.05)
    assert norm > 0.05
    found = gradients_of_first_step(tmp_path, uneven, 3, model, gradient_clip_val=0.05)
    for mine, other in zip(found, expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-10)


def test_a_batch_without_loss_is_no_step_into_nowhere(tmp_path):
    model = tiny()
    found = gradients_of_first_step(tmp_path, lambda i: make_batch(i, mask=0.0), 1, model)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


def test_loss_with_documents_equals_the_documents_apart():
    module = make_module(tiny().double())
    parts = [make_batch(i, rows=3, seq=4) for i in range(2)]
    numbers = torch.tensor([[0] * 4 + [1] * 4] * 3, dtype=torch.int32)
    packed = Batch(
        *(
            torch.cat([getattr(p, name) for p in parts], 1)
            for name in ("tokens", "targets", "loss_mask")
        ),
        documents=numbers,
    )
    total, count = module.loss_sum(packed)
    apart = [module.loss_sum(part) for part in parts]
    assert count == sum(n for _, n in apart)
    torch.testing.assert_close(total, sum(loss for loss, _ in apart))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast(dtype):
    module, batch = make_module(), make_batch(0)
    exact, _ = module.loss_sum(batch)
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = module.loss_sum(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in module.model.parameters())


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_trains_in_other_precisions(tmp_path, precision):
    module = make_module()
    make_trainer(tmp_path, 60, precision=precision, log_every_n_steps=60).fit(module, ToyData())
    assert module.reported["train/loss"][1] < 1.5


def test_every_token_may_bear_loss():
    module, batch = make_module(), make_batch(0, mask=2.0)
    total, count = module.loss_sum(batch)
    assert count == batch.targets.numel()
    logits = module.model(batch.tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
    torch.testing.assert_close(total, expected)


def test_metrics_are_means_over_tokens_since_they_were_last_logged(tmp_path):
    module = make_module(optimizer=Plain(lr=1e-9), schedule=Constant())
    trainer = make_trainer(tmp_path, 6, log_every_n_steps=3, val_check_interval=6)
    reports = []
    module.report = lambda metrics: reports.append((trainer.global_step, dict(metrics)))
    trainer.fit(module, ToyData(uneven))
    training = [(step, m) for step, m in reports if "train/loss" in m]
    assert [step for step, _ in training] == [3, 6]
    model = tiny()
    for (step, metrics), start in zip(training, (0, 3), strict=True):
        batches = [uneven(i) for i in range(start, start + 3)]
        assert metrics["train/loss"] == pytest.approx(plain_loss(model, batches).item(), rel=1e-5)
        assert metrics["train/tokens"] == sum(uneven(i).n_tokens for i in range(step))
        assert metrics["train/learning_rate"] == 1e-9
    validation = [uneven(i) for i in range(1000, 1003)]
    (step, metrics) = next((s, m) for s, m in reports if "val/loss" in m)
    assert step == 6
    assert metrics["val/loss"] == pytest.approx(plain_loss(model, validation).item(), rel=1e-5)


def test_validate_test_and_predict(tmp_path):
    module, data = make_module(), ToyData(uneven)
    trainer = make_trainer(tmp_path)
    batches = [uneven(i) for i in range(1000, 1003)]
    expected = plain_loss(module.model, batches).item()
    assert trainer.validate(module, data, verbose=False)[0]["val/loss"] == pytest.approx(expected)
    assert trainer.test(module, data, verbose=False)[0]["test/loss"] == pytest.approx(expected)
    rows = trainer.predict(module, data)
    loss = sum(r["loss"].sum() for r in rows) / sum(r["count"].sum() for r in rows)
    assert loss.item() == pytest.approx(expected)
    one = replace(batches[0], loss_mask=batches[0].loss_mask.clone(), loss_positions=None)
    one.loss_mask[1:] = False
    total, count = module.loss_sum(one)
    assert rows[0]["loss"][0].item() == pytest.approx(total.item())
    assert rows[0]["count"][0].item() == count


def test_early_stopping_sees_what_is_reported(tmp_path):
    from lightning.pytorch.callbacks import EarlyStopping

    stop = EarlyStopping("val/loss", stopping_threshold=100.0)
    trainer = make_trainer(tmp_path, 50, val_check_interval=5, callbacks=[stop])
    trainer.fit(make_module(), ToyData())
    assert trainer.global_step == 5


def test_an_endless_schedule_needs_no_max_steps_and_others_name_it(tmp_path):
    trainer = make_trainer(tmp_path, -1, limit_train_batches=3, max_epochs=1)
    trainer.fit(make_module(schedule=Constant()), ToyData())
    assert trainer.global_step == 3
    with pytest.raises(ToolmemError, match=r"trainer\.max_steps"):
        make_trainer(tmp_path, -1, max_epochs=1).fit(make_module(schedule=Cosine()), ToyData())


def test_a_data_module_without_our_hooks_trains_too(tmp_path):
    from training_toys import Stream, loader

    trainer = make_trainer(tmp_path, 3)
    trainer.fit(make_module(), loader(Stream(0, None)))
    assert trainer.global_step == 3


@pytest.mark.slow
def test_compiled_training_equals_eager_and_keeps_names(tmp_path):
    losses = []
    for compile in (False, True):
        module = make_module(compile=compile)
        assert [n for n, _ in module.named_parameters()] == [
            f"model.{n}" for n, _ in tiny().named_parameters()
        ]
        make_trainer(tmp_path, 6, log_every_n_steps=6).fit(module, ToyData(uneven))
        losses.append(module.reported["train/loss"][1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_module import Plain, uneven
from training_toys import ToyData, make_module, make_trainer, tiny
from toolmem.training import Checkpointing, Constant
import torch.distributed as dist

class Shard(ToyData):
    def train_dataloader(self):
        rank = dist.get_rank()
        self.make = lambda i: uneven(2 * i + rank)
        return super().train_dataloader()
    def val_dataloader(self):
        rank = dist.get_rank()
        self.make = lambda i: uneven(2 * i + rank)
        return super().val_dataloader()

module = make_module(tiny().double(), optimizer=Plain(lr=1.0), schedule=Constant())
trainer = make_trainer(
    {folder!r}, 1, devices=2, strategy="ddp", accumulate_grad_batches=2, log_every_n_steps=1,
    val_check_interval=2, enable_checkpointing=True, callbacks=[Checkpointing(every_n_steps=1)],
)
trainer.fit(module, Shard())
if trainer.is_global_zero:
    state = {{"weights": [p.detach() for p in module.model.parameters()]}}
    torch.save(state | {{"reported": module.reported}}, {folder!r} + "/found.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent.parent)]
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(paths=paths, folder=str(tmp_path)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = tiny().double()
    before = [p.detach().clone() for p in model.parameters()]
    loss = plain_loss(model, [uneven(i) for i in range(4)])
    loss.backward()
    for start, end, p in zip(before, found["weights"], model.parameters(), strict=True):
        torch.testing.assert_close(start - end, p.grad, rtol=0, atol=1e-10)
    reported = found["reported"]
    assert reported["train/loss"] == (1, pytest.approx(loss.item()))
    assert reported["train/tokens"][1] == sum(uneven(i).n_tokens for i in range(4))
    after = tiny().double()
    for p, w in zip(after.parameters(), found["weights"], strict=True):
        p.data.copy_(w)
    validation = plain_loss(after, [uneven(i) for i in range(2000, 2006)])
    assert reported["val/loss"][1] == pytest.approx(validation.item())
    kept = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["toolmem"]
    assert kept["metrics"]["train_tokens"]["count"] == reported["train/tokens"][1]


def test_lengths_of_the_toy_are_within_the_model():
    assert all(uneven(i).tokens.shape[1] <= SEQ for i in range(30))


class Confessing(type(tiny())):
    """Adds a term to the loss, and counts the steps."""

    steps = 0

    def hidden(self, tokens, *, extras=None, **rest):
        if extras is not None:
            extras.add_loss("toy/size", self.embedding.weight.square().mean())
            extras.metrics["toy/rows"] = torch.tensor(float(len(tokens)))
        return super().hidden(tokens, **rest)

    def after_optimizer_step(self, reduce):
        self.steps += int(reduce(torch.tensor(1)))


def test_terms_of_the_models_own_join_each_tokens_loss(tmp_path):
    torch.manual_seed(0)
    arguments = {"vocab_size": 11, "dim": 8, "n_layers": 2, "n_heads": 2, "max_seq_len": 9}
    model = Confessing(**arguments).double()
    plain = tiny().double()
    plain.load_state_dict(model.state_dict())
    batches = [make_batch(i, mask=0.3 + 0.2 * i) for i in range(3)]
    plain_loss(plain, batches).backward()
    plain.embedding.weight.square().mean().backward()
    found = gradients_of_first_step(tmp_path, lambda i: make_batch(i, mask=0.3 + 0.2 * i), 3, model)
    for mine, other in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(mine, other.grad, rtol=0, atol=1e-10)
    assert model.steps == 1


def test_fused_and_plain_training_agree(tmp_path):
    runs = {}
    for fused in (True, False):
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path, 12)
        module = make_module(fused=fused)
        trainer.fit(module, ToyData())
        runs[fused] = [parameter.detach() for parameter in module.model.parameters()]
    for fast, plain in zip(runs[True], runs[False], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)


def test_fused_and_compiled_training_are_not_both():
    with pytest.raises(ToolmemError, match=r"model\.compile and model\.fused"):
        make_module(compile=True, fused=True)
