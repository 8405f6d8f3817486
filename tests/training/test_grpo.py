"""GRPO: who is answerable for which token, what it earned, and the gradient that follows."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from training_toys import ToyData, make_trainer

from toolmem import checkpoints
from toolmem.data import FactsDataModule
from toolmem.data.dialogues import Dialogue, Turn
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Generated, Sampling, generate
from toolmem.generation.turns import ASSISTANT, DATABASE, USER
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
from toolmem.tools.base import Answer
from toolmem.training import GRPO, AdamW, Checkpointing, Constant, CSVLogger, LanguageModelModule
from toolmem.training.rollouts import (
    gather,
    group_advantages,
    kl_estimates,
    policy_losses,
    turn_advantages,
)

TOKENIZER = ByteTokenizer()
IDS = TOKENIZER.role_ids
NAN = float("nan")


class Plain(AdamW):
    def build(self, model):
        return torch.optim.SGD(model.parameters(), lr=self.lr)


def small(cls=Transformer, **options):
    torch.manual_seed(0)
    if cls is Transformer:
        options = {"n_heads": 2} | options
    return cls(TOKENIZER.vocab_size, **({"dim": 16, "n_layers": 2, "max_seq_len": 256} | options))


def make(model=None, kind=GRPO, **options):
    arguments = {"optimizer": AdamW(lr=1e-2), "schedule": Constant(), "samples": 4}
    return kind(model or small(), **(arguments | options))


# ---- who wrote what


def written(dialogue):
    """The tokens that the model answers for, read from the dialogue one by one."""
    found = []
    for i, (role, log_prob) in enumerate(zip(dialogue.roles, dialogue.log_probs, strict=True)):
        if i >= dialogue.prompt_length and role == ASSISTANT:
            assert not math.isnan(log_prob)
            found.append((i, dialogue.tokens[i], log_prob))
    return found


def test_loss_is_borne_by_what_the_model_sampled_and_by_nothing_else():
    # a prompt in which the assistant has spoken before; a query, its forced answer, a conclusion
    first = Generated(
        tokens=[256, 65, 257, 66, 259, 256, 67, 257, 70, 71, 258, 80, 81, 257, 90, 259],
        roles=[USER] * 3 + [ASSISTANT] * 2 + [USER] * 3
        + [ASSISTANT] * 3 + [DATABASE] * 3 + [ASSISTANT] * 2,
        log_probs=[NAN] * 8 + [-0.1, -0.2, -0.3] + [NAN] * 3 + [-0.4, -0.5],
        finish_reason="end",
        prompt_length=8,
    )  # fmt: skip
    second = Generated(
        tokens=[256, 65, 257, 66, 67],
        roles=[USER] * 3 + [ASSISTANT] * 2,
        log_probs=[NAN] * 3 + [-1.0, -2.0],
        finish_reason="length",
        prompt_length=3,
    )
    batch = gather([first, second], torch.tensor([[1.0, 3.0], [-1.0, 5.0]]), with_spans=True)
    assert batch.tokens.shape == (2, 15)
    assert batch.loss_mask[0].nonzero().flatten().tolist() == [7, 8, 9, 13, 14]
    assert batch.loss_mask[1].nonzero().flatten().tolist() == [2, 3]
    assert batch.targets[batch.loss_mask].tolist() == [70, 71, 258, 90, 259, 66, 67]
    expected = [-0.1, -0.2, -0.3, -0.4, -0.5, -1.0, -2.0]
    assert batch.log_probs[batch.loss_mask].tolist() == pytest.approx(expected)
    assert not batch.log_probs[~batch.loss_mask].any()
    # the second advantage is of what follows the tool's answer
    assert batch.advantages[batch.loss_mask].tolist() == [1, 1, 1, 3, 3, -1, -1]
    assert not batch.advantages[~batch.loss_mask].any()
    assert batch.counts.tolist() == [5, 2] and batch.lengths.tolist() == [15, 4]
    assert batch.n_tokens == 19
    assert batch.spans[0].tolist() == [0] * 3 + [-1] * 2 + [2] * 3 + [-1] * 3 + [4] * 3 + [-1]
    shorter = batch.take(torch.tensor([1]))
    assert shorter.tokens.tolist() == [[256, 65, 257, 66]]
    assert shorter.targets.tolist() == [[65, 257, 66, 67]]
    assert shorter.positions().tolist() == [2, 3] and shorter.n_tokens == 4


ARCHITECTURES = {
    "transformer": (Transformer, {"conv_width": 4}),
    "prefix": (Transformer, {"attention_mask": "prefix"}),
    "window": (Transformer, {"window": 5}),
    "moe": (MoETransformer, {"n_heads": 2, "n_experts": 4, "top_k": 2, "hidden_dim": 16}),
    "mamba": (Mamba, {"state_dim": 4}),
    "mamba2": (Mamba2, {"state_dim": 8, "head_dim": 8}),
    **{cell: (RNN, {"cell": cell}) for cell in ("lstm", "gru", "mingru", "minlstm", "rglru")},
    **{rule: (LinearAttention, {"n_heads": 2, "rule": rule}) for rule in ("gated", "gated_delta")},
    "hybrid": (
        Hybrid,
        {
            "pattern": ["mamba2", "attention"],
            "mixers": {"mamba2": {"state_dim": 8, "head_dim": 8}, "attention": {"n_heads": 2}},
            "feed_forward": ["none", "swiglu"],
        },
    ),
}


class Echo:
    """A tool that answers at a length that depends on the query."""

    def call_many(self, texts):
        return [Answer("x" * (1 + len(text) % 5), False, 0.0) for text in texts]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generations_log_probabilities_are_those_of_training(name):
    cls, options = ARCHITECTURES[name]
    model = small(cls, **options)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    # What is sampled matters not; with the bias, tools are called and dialogues end.
    often = Sampling(logit_bias={IDS["database"]: 3.0, IDS["end"]: 1.5})
    prompts = [[256, *range(65, 66 + n), 257] for n in range(12)]
    dialogues = generate(
        model, TOKENIZER, prompts, toolbox=Echo(), max_new_tokens=40, sampler=often, seed=7,
        batch_size=5,
    )  # fmt: skip
    assert sum(len(dialogue.tool_calls) for dialogue in dialogues) > 4
    batch = gather(dialogues, torch.ones(12, 1), with_spans=model.attention_mask == "prefix")
    module = make(model.train())
    logits, targets = module.logits_and_targets(batch, model.hidden)
    found = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = [part for dialogue in dialogues for part in written(dialogue)]
    assert targets.tolist() == [token for _, token, _ in expected]
    reported = torch.tensor([log_prob for _, _, log_prob in expected])
    torch.testing.assert_close(found, reported, rtol=0, atol=1e-4)


# ---- formulas


@pytest.mark.parametrize("scale", [True, False])
def test_advantages_in_plain_float64(scale):
    rewards = torch.rand((6, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[3] = 0.7  # a group of which nothing can be learned
    found = group_advantages(rewards, scale)
    for group, mine in zip(rewards.tolist(), found.tolist(), strict=True):
        mean = math.fsum(group) / len(group)
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / len(group)) + 1e-6
        expected = [(r - mean) / (deviation if scale else 1.0) for r in group]
        assert mine == pytest.approx(expected, rel=1e-12, abs=1e-9)
    assert found[3].abs().max() < 1e-9


def test_equal_rewards_give_exactly_no_advantage():
    for n in range(2, 20):
        for reward in (0.0, 1.0):
            assert not group_advantages(torch.full((3, n), reward, dtype=torch.float64)).any()


def test_turns_are_compared_where_their_dialogues_stood_alike():
    rewards = torch.tensor([[1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]], dtype=torch.float64)
    said = [
        [["a"], ["a"], ["error"], ["a"], ["error"], []],
        [["a", "b"], ["a", "b"], ["a", "c"], ["a", "c"], ["a"], ["d"]],
    ]
    found = turn_advantages(rewards, said)
    assert found.shape == (2, 6, 3)
    assert torch.equal(found[:, :, 0], group_advantages(rewards))

    def alike(earned):
        mean = sum(earned) / len(earned)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in earned) / len(earned)) + 1e-6
        return [(r - mean) / deviation for r in earned]

    a, b, c = alike([1, 0, 1])
    assert found[0, :, 1].tolist() == pytest.approx([a, b, 0, c, 0, 0])
    assert found[1, :5, 1].tolist() == pytest.approx(alike([1, 1, 1, 0, 0]))
    # after the same first answer: b twice right; c once right, once wrong
    assert found[1, :, 2].tolist() == pytest.approx([0, 0, *alike([1, 0]), 0, 0])


def plain_token_loss(log_prob, sampled, advantage, low, high):
    ratio = math.exp(log_prob - sampled)
    bounded = min(max(ratio, 1 - low), 1 + high)
    return -min(ratio * advantage, bounded * advantage)


def test_the_clipped_surrogate_and_where_it_has_a_gradient():
    sampled = torch.full((6,), -1.0, dtype=torch.float64)
    moved = torch.tensor([0.0, 0.5, -0.5, 0.5, -0.5, 0.1], dtype=torch.float64)
    log_probs = (sampled + moved).requires_grad_()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0, 2.0], dtype=torch.float64)
    losses, clipped = policy_losses(log_probs, sampled, advantages, 0.2, 0.3)
    expected = [
        plain_token_loss(*numbers, 0.2, 0.3)
        for numbers in zip(log_probs.tolist(), sampled.tolist(), advantages.tolist(), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, rel=1e-12)
    # only what has moved far in the wanted direction is left alone
    assert clipped.tolist() == [False, True, False, False, True, False]
    losses.sum().backward()
    assert (log_probs.grad == 0).tolist() == clipped.tolist()
    ratio = moved.exp()
    assert log_probs.grad[2].item() == pytest.approx(-2 * ratio[2].item())


def test_the_kl_estimate_is_unbiased_and_never_negative():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0) for _ in "pq")
    each = kl_estimates(p, q)
    assert (each >= 0).all()
    exact = sum(math.exp(a) * (a - b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
    assert (p.exp() * each).sum().item() == pytest.approx(exact, rel=1e-12)


# ---- the loss


def invented(n=6, seed=0):
    """Dialogues of random tokens, all of different lengths, half of them with a tool's answer."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(256, (count,), generator=generator).tolist()

    dialogues = []
    for i in range(n):
        parts = [(USER, 3 + i), (ASSISTANT, 2 + 2 * i)]
        parts += [(DATABASE, 4), (ASSISTANT, 3)] if i % 2 else []
        roles = [role for role, count in parts for _ in range(count)]
        numbers = -5.5 - torch.rand(len(roles), generator=generator)
        log_probs = [
            float(number) if role == ASSISTANT else NAN
            for role, number in zip(roles, numbers, strict=True)
        ]
        dialogues.append(Generated(tokens(len(roles)), roles, log_probs, "end", [], 3 + i))
    return dialogues


ADVANTAGES = [1.5, -0.5, 0.0, -1.0, 0.0, 2.0]


def plain_loss(model, reference, dialogues, advantages, *, clip, high, kl, average):
    """GRPO's loss, dialogue after dialogue and token after token."""
    per_dialogue = []
    for dialogue, advantage in zip(dialogues, advantages, strict=True):
        inputs = torch.tensor([dialogue.tokens])
        mine, other = (m(inputs)[0].log_softmax(-1) for m in (model, reference))
        losses = []
        for i, token, sampled in written(dialogue):
            log_prob = mine[i - 1, token]
            ratio = (log_prob - float(torch.tensor(sampled))).exp()
            bounded = ratio.clamp(1 - clip, 1 + high)
            loss = -torch.minimum(ratio * advantage, bounded * advantage)
            away = other[i - 1, token].detach() - log_prob
            losses.append(loss + kl * (away.exp() - away - 1))
        per_dialogue.append(losses)
    if average == "dialogues":
        return sum(sum(losses) / len(losses) for losses in per_dialogue) / len(per_dialogue)
    flat = [loss for losses in per_dialogue for loss in losses]
    return sum(flat) / len(flat)


@pytest.mark.parametrize("average", ["tokens", "dialogues"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_loss_and_gradient_equal_a_plain_implementation(kl, average):
    model, reference = small().double(), small().double()
    for parameter in reference.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    module = make(model, kl=kl, average=average, clip=0.2, clip_high=0.4)
    batch = gather(invented(), torch.tensor(ADVANTAGES, dtype=torch.float64)[:, None])
    if kl:
        module.reference = reference.requires_grad_(False)
        batch.reference = module._reference_log_probs(batch)
    total, count = module.loss_sum(batch)
    expected = plain_loss(
        model, reference, invented(), ADVANTAGES, clip=0.2, high=0.4, kl=kl, average=average
    )
    assert count == (sum(len(written(d)) for d in invented()) if average == "tokens" else 6)
    # float32: what was sampled is kept so, and the reference's
    assert total.item() / count == pytest.approx(expected.item(), rel=1e-6)
    mine = torch.autograd.grad(total / count, list(model.parameters()))
    plain = torch.autograd.grad(expected, list(model.parameters()))
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert 0 < module.grpo_means.take()["grpo/clipped"] < 1


def test_dialogues_that_earned_what_their_group_did_are_not_run(monkeypatch):
    module = make(small().double())
    rows = []
    hidden = module.model.hidden
    monkeypatch.setattr(
        module.model, "hidden", lambda t, **k: rows.append(len(t)) or hidden(t, **k)
    )
    batch = gather(invented(), torch.tensor(ADVANTAGES)[:, None])
    module.loss_sum(batch)
    nothing, count = module.loss_sum(gather(invented(), torch.zeros(6, 1)))
    assert rows == [4, 1]
    assert nothing.item() == 0 and count == sum(len(written(d)) for d in invented())
    nothing.backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.model.parameters())


# ---- the judge


def test_the_reward_is_an_exact_answer_in_a_finished_dialogue():
    question = Dialogue(
        (Turn("user", "Where?"), Turn("assistant", "Ann was born in York.")), "York", "place", "Ann"
    )

    def earned(text, reason="end"):
        prompt = [IDS["user"], *TOKENIZER.encode("Where?"), IDS["assistant"]]
        said = [*TOKENIZER.encode(text), IDS["end"]]
        module = make()
        module._trainer = type("Trainer", (), {"datamodule": FactsDataModule(4)})()
        return module.reward(
            question, Generated(prompt + said, [], [], reason, [], prompt_length=len(prompt))
        )

    assert earned("Ann was born in York.") == 1
    assert earned("Ann was born in York.", "length") == 0
    assert earned("Ann was born in New York.") == 0


# ---- whole runs


VOWELS = set(b"aeiou")


class Vowels(GRPO):
    """A reward that a random model earns parts of: the share of vowels in what it writes."""

    def reward(self, question, dialogue):
        new = [token for _, token, _ in written(dialogue)]
        return sum(token in VOWELS for token in new) / max(len(new), 1)


def facts(**options):
    arguments = {"people": 12, "unseen_people": 4, "setting": "in_tool", "batch_size": 4}
    return FactsDataModule(**(arguments | options))


def vowels(model=None, **options):
    return make(model, Vowels, **({"max_new_tokens": 8, "samples": 4} | options))


class Killed(Exception):
    pass


class KillAfter(pl.Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step >= self.step:
            raise Killed


def fit(folder, module, steps=6, resume=None, kill=None, data=None, **options):
    callbacks = [Checkpointing(every_n_steps=2, monitor=None)]
    callbacks += [KillAfter(kill)] if kill else []
    arguments = {"log_every_n_steps": 1, "val_check_interval": 10**6, "gradient_clip_val": 1.0}
    trainer = make_trainer(
        folder, steps, logger=CSVLogger(folder), enable_checkpointing=True, callbacks=callbacks,
        **(arguments | options),
    )  # fmt: skip
    with contextlib.suppress(Killed):
        trainer.fit(module, data or facts(), ckpt_path=resume)
    return trainer


def rows(folder):
    with open(folder / "metrics.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in table]


MANY = {"epochs": 2, "minibatches": 3, "kl": 0.1, "invariant": True, "credit": "turn"}


@pytest.mark.parametrize("options", [{}, MANY], ids=["plain", "many updates"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, options):
    whole = vowels(**options)
    fit(tmp_path / "whole", whole)
    fit(tmp_path / "part", vowels(**options), kill=5)
    last = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert checkpoints.read(last)["global_step"] == 4
    resumed = vowels(**options)
    fit(tmp_path / "part", resumed, resume=last)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows(tmp_path / "part") == rows(tmp_path / "whole")
    table = rows(tmp_path / "whole")
    assert [row["step"] for row in table] == list("123456")
    assert all(float(row["grpo/log_prob_gap"]) < 1e-5 for row in table)
    if options:
        assert float(table[0]["grpo/kl"]) > 0
        assert any(not torch.equal(a, b) for a, b in zip(
            whole.model.parameters(), whole.reference.parameters(), strict=True
        ))  # fmt: skip
        for a, b in zip(small().parameters(), resumed.reference.parameters(), strict=True):
            assert torch.equal(a, b)


def test_what_is_rewarded_becomes_more(tmp_path):
    module = vowels(samples=16, optimizer=AdamW(lr=2e-2))
    fit(tmp_path, module, steps=20)
    earned = [float(row["grpo/reward"]) for row in rows(tmp_path)]
    assert sum(earned[-3:]) > 3 * sum(earned[:3])
    with open(tmp_path / "metrics.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    for name in ("time/generation_s", "time/training_s"):
        so_far = [float(row[name]) for row in table]
        assert so_far[0] > 0 and so_far == sorted(so_far)


def test_training_that_fails_closes_engine_and_tools(tmp_path):
    opened = []

    class Failing(Vowels):
        def reward(self, question, dialogue):
            opened.append((self._engine, self._toolbox))
            raise RuntimeError("no reward")

    module = make(kind=Failing, max_new_tokens=8, samples=4)
    with pytest.raises(RuntimeError, match="no reward"):
        fit(tmp_path, module, steps=2)
    [(engine, _)] = opened
    assert module._engine is None and module._toolbox is None
    with pytest.raises(ToolmemError, match="closed"):
        engine.generate([[1, 2]])


def test_a_step_is_one_round_of_sampling_with_all_of_its_updates(tmp_path):
    seen, updates = [], []

    class Watched(Vowels):
        def loss_sum(self, batch, *args):
            seen.append((self.trainer.global_step, len(batch), batch.tokens[:, :].clone()))
            return super().loss_sum(batch, *args)

        def on_before_optimizer_step(self, optimizer):
            updates.append(self.trainer.global_step)
            super().on_before_optimizer_step(optimizer)

    module = make(kind=Watched, max_new_tokens=8, samples=4, epochs=2, minibatches=3)
    trainer = fit(tmp_path, module, steps=2)
    assert trainer.global_step == 2
    assert updates == [0] * 6 + [1] * 6
    assert [n for step, n, _ in seen if step == 0] == [6, 5, 5] * 2

    def texts(parts):
        return sorted(bytes(t % 256 for t in row if t) for part in parts for row in part.tolist())

    tokens = [part for step, _, part in seen if step == 0]
    assert texts(tokens[:3]) == texts(tokens[3:])
    assert len(set(texts(tokens[:3]))) > 12


def test_one_step_of_plain_sgd_is_the_plain_losss_gradient(tmp_path):
    """Through Lightning, accumulation over two batches, and the mean over tokens."""
    taken = []

    class Kept(Vowels):
        def sample(self, questions, seeds):
            found = super().sample(questions, seeds)
            rewards = torch.tensor([self.reward(None, d) for d in found]).double().view(-1, 4)
            taken.append((found, group_advantages(rewards).flatten().tolist()))
            return found

    model = small().double()
    module = make(model, Kept, optimizer=Plain(lr=1.0), samples=4, max_new_tokens=8)
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": None}
    fit(tmp_path, module, steps=1, precision="64-true", **trainer)
    assert len(taken) == 2
    expected = small().double()
    dialogues = [dialogue for found, _ in taken for dialogue in found]
    advantages = [advantage for _, found in taken for advantage in found]
    loss = plain_loss(
        expected, expected, dialogues, advantages, clip=0.2, high=0.2, kl=0.0, average="tokens"
    )
    loss.backward()
    for before, after in zip(expected.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(before - after, before.grad, rtol=1e-4, atol=1e-8)


# ---- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, r"model\.samples is 1"),
        ({"epochs": 0}, r"model\.epochs is 0"),
        ({"clip": 0.0}, r"model\.clip is 0\.0"),
        ({"kl": -1.0}, r"model\.kl is -1\.0"),
        ({"model": small(dropout=0.1)}, r"model\.model\.init_args\.dropout"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ToolmemError, match=message):
        make(**options)


def test_runs_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ToolmemError, match=r"questions: use data\.class_path"):
        fit(tmp_path, make(), data=ToyData())
    with pytest.raises(ToolmemError, match=r"accumulate_grad_batches is 2.*model\.epochs"):
        fit(tmp_path, vowels(epochs=2), accumulate_grad_batches=2)
    with pytest.raises(ToolmemError, match=r"model\.minibatches is 17.*only 16"):
        fit(tmp_path, vowels(minibatches=17))


def test_checkpoints_of_other_trainings_are_refused(tmp_path):
    fit(tmp_path / "plain", LanguageModelModule(small(), AdamW(lr=1e-2), Constant()), steps=2)
    plain = tmp_path / "plain" / "checkpoints" / "last.ckpt"
    with pytest.raises(ToolmemError, match=r"not trained by GRPO.*model\.init_from"):
        fit(tmp_path / "other", vowels(), resume=plain)
    fit(tmp_path / "kl", vowels(kl=0.1), steps=2)
    with pytest.raises(ToolmemError, match=r"trained with a KL term: set model\.kl"):
        fit(tmp_path / "other", vowels(), resume=tmp_path / "kl" / "checkpoints" / "last.ckpt")


def test_the_reference_is_what_the_run_starts_from(tmp_path):
    fit(tmp_path / "first", vowels(), steps=2)
    first = checkpoints.load(tmp_path / "first").model
    second = vowels(kl=0.1, init_from=str(tmp_path / "first"), optimizer=AdamW(lr=1e-3))
    fit(tmp_path / "second", second, steps=1)
    for a, b in zip(first.parameters(), second.reference.parameters(), strict=True):
        assert torch.equal(a, b)
    assert float(rows(tmp_path / "second")[0]["grpo/kl"]) < 1e-9
    assert any(not torch.equal(a, b) for a, b in zip(
        second.model.parameters(), second.reference.parameters(), strict=True
    ))  # fmt: skip


# ---- two processes

TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from test_grpo import Plain, facts, fit, small, vowels
module = vowels(small().double(), optimizer=Plain(lr=1.0))
options = dict(devices=2, strategy="ddp", precision="64-true", gradient_clip_val=None)
trainer = fit({folder!r}, module, steps=2, data=facts(batch_size=5), **options)
if trainer.is_global_zero:
    torch.save([p.detach() for p in module.model.parameters()], {folder!r} + "/found.pt")
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Five questions: three for one process, two for the other, so token counts differ."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent.parent)]
    script, folder = tmp_path / "two.py", tmp_path / "two"
    script.write_text(TWO_PROCESSES.format(paths=paths, folder=str(folder)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    from test_grpo import facts, fit

    module = vowels(small().double(), optimizer=Plain(lr=1.0))
    options = {"precision": "64-true", "gradient_clip_val": None}
    fit(tmp_path / "one", module, steps=2, data=facts(batch_size=5), **options)
    found = torch.load(folder / "found.pt", weights_only=True)
    for mine, other in zip(module.model.parameters(), found, strict=True):
        torch.testing.assert_close(mine.detach(), other, rtol=1e-6, atol=1e-9)
    for mine, other in zip(rows(tmp_path / "one"), rows(folder), strict=True):
        for key in ("grpo/reward", "grpo/mixed", "grpo/tokens", "train/tokens", "train/loss"):
            assert float(mine[key]) == pytest.approx(float(other[key]), rel=1e-4, abs=1e-6), key
