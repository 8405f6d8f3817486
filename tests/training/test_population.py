"""A population's members are the models that training alone would have made."""

from __future__ import annotations

from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from training_toys import make_trainer

import toolmem
from toolmem import checkpoints
from toolmem.data import FactsDataModule, PopulationDataModule
from toolmem.errors import ToolmemError
from toolmem.models import RNN, Mamba, Mamba2, MoETransformer, Transformer
from toolmem.training import (
    EMA,
    WSD,
    AdamW,
    LanguageModelModule,
    Member,
    Muon,
    NormProbe,
    PopulationModule,
    export_member,
)
from toolmem.training.members import changed, first_weights

FACTS = {
    "class_path": "toolmem.data.FactsDataModule",
    "init_args": {
        "people": 12,
        "unseen_people": 4,
        "n_val_questions": 6,
        "batch_size": 6,
        "window": 4,
    },
}
# other facts, other orders, other numbers of rows, other lengths
DATA = [
    {"seed": 3},
    {"seed": 4, "people": 9, "batch_size": 3},
    {"seed": 5, "setting": "in_tool"},
    {"seed": 3, "layout": "rows"},
]
SHAPE = {
    "vocab_size": 260, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_seq_len": 192,
    "feed_forward": "silu", "tie_embeddings": True, "embedding_scale": True, "conv_width": 3,
}  # fmt: skip


def frame(dtype=torch.float64, kind=Transformer, **changes):
    torch.manual_seed(99)
    return kind(**{**SHAPE, **changes}).to(dtype)


def data_of(number, data=DATA):
    return FactsDataModule(**{**FACTS["init_args"], **data[number]})


def weights_alone(folder, number, module, data=DATA, max_steps=200, **trainer):
    """The model after training it by itself."""
    make_trainer(folder, max_steps, limit_val_batches=0, **trainer).fit(
        module, data_of(number, data)
    )
    return dict(module.model.named_parameters())


def alone(number, members, optimizer, schedule, model):
    """The module that trains a member by itself."""
    member = members[number]
    mine = first_weights(model, member.seed)

    return LanguageModelModule(
        mine, changed(optimizer, member.optimizer, ""), changed(schedule, member.schedule, "")
    )


def population(members, optimizer, schedule, model, **options):
    return PopulationModule(model, optimizer, schedule, members=members, **options)


def fit(folder, module, data=DATA, max_steps=200, **trainer):
    trainer = make_trainer(folder, max_steps, limit_val_batches=0, **trainer)
    trainer.fit(module, PopulationDataModule(FACTS, data[: len(module.members)]))
    return trainer


CASES = {
    "adamw": (
        AdamW(lr=3e-3),
        [
            Member(0, {"lr": 1e-2, "weight_decay": 0.3}),
            Member(1, {"betas": [0.8, 0.99], "eps": 1e-6}, {"warmup_steps": 20}),
            Member(2, {"weight_decay": 0.0, "no_decay": ["qkv"]}, {"decay_fraction": 0.9}),
            Member(
                0,
                {"lr": 1e-3, "decay_embeddings": True, "weight_decay": 0.1},
                {"class_path": "toolmem.training.Cosine", "init_args": {"warmup_steps": 3}},
            ),
        ],
    ),
    "muon": (
        Muon(lr=1e-2, ns_dtype="float64"),
        [
            Member(0, {"lr": 2e-2, "weight_decay": 0.3}),
            Member(1, {"momentum": 0.8, "adamw_lr": 1e-3}, {"warmup_steps": 20}),
            Member(2, {"betas": [0.8, 0.99]}, {"decay_fraction": 0.9}),
            Member(0, {"lr": 3e-3, "no_decay": ["up"]}),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 1, 3, 4])
@pytest.mark.parametrize("case", CASES)
def test_each_member_is_the_model_trained_alone(case, at_once, tmp_path):
    optimizer, members = CASES[case]
    schedule = WSD(warmup_steps=5)
    module = population(members, optimizer, schedule, frame(), at_once=at_once)
    fit(tmp_path / "all", module, gradient_clip_val=0.5)
    stacked = module.stack.named()
    for number in range(len(members)):
        single = alone(number, members, optimizer, schedule, frame())
        before = {n: p.detach().clone() for n, p in single.model.named_parameters()}
        wanted = weights_alone(tmp_path / str(number), number, single, gradient_clip_val=0.5)
        for name, weight in wanted.items():
            torch.testing.assert_close(stacked[name][number], weight, rtol=0, atol=1e-9)
            assert (weight - before[name]).abs().max() > 1e-3


GROUPS = [None, 1, 3]


def batches_of(data=DATA):
    made = PopulationDataModule(FACTS, data)
    made.setup()
    return made, next(iter(made.train_dataloader()))


@pytest.mark.parametrize("at_once", GROUPS)
def test_one_steps_gradients_in_float32(at_once, tmp_path):
    """Before clipping, of the mean over each member's own loss-bearing tokens."""
    optimizer, members = CASES["adamw"]
    seen = {}

    class Watched(PopulationModule):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            seen.update({name: p.grad.clone() for name, p in self.stack.named().items()})

    module = Watched(frame(torch.float32), optimizer, WSD(), members=members, at_once=at_once)
    fit(tmp_path, module, max_steps=1)
    _, batch = batches_of()
    for number, one in batch.members.items():
        single = alone(number, members, optimizer, WSD(), frame(torch.float32))
        loss, count = single.loss_sum(one)
        (loss / count).backward()
        largest = max(p.grad.abs().max() for p in single.model.parameters())
        for name, parameter in single.model.named_parameters():
            assert parameter.grad.any()
            error = (seen[name][number] - parameter.grad).abs().max()
            assert error <= 1e-6 * largest, (name, number)
            assert error <= 1e-6


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipping_accumulation_and_z_loss(name, tmp_path):
    optimizer, members = CASES[name]
    options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": 3}
    module = population(members[:3], optimizer, WSD(), frame(), at_once=2, z_loss=0.1)
    fit(tmp_path / "all", module, max_steps=4, **options)
    plain = population(members[:3], optimizer, WSD(), frame(), at_once=2)
    fit(tmp_path / "plain", plain, max_steps=4, **options)
    for number in range(3):
        single = alone(number, members, optimizer, WSD(), frame())
        single.z_loss = 0.1
        wanted = weights_alone(tmp_path / str(number), number, single, max_steps=4, **options)
        for key, weight in wanted.items():
            torch.testing.assert_close(
                module.stack.named()[key][number], weight, rtol=0, atol=1e-12
            )
        assert not torch.allclose(
            plain.stack.named()[key][number], weight, rtol=0, atol=1e-9
        )  # without the z-loss it is another


@pytest.mark.parametrize("at_once", GROUPS)
def test_a_member_that_is_done_stays_bit_for_bit(at_once, tmp_path):
    optimizer, members = CASES["muon"]
    members = [replace(members[0], max_steps=3), members[1], replace(members[2], max_steps=5)]
    after: dict[int, dict[int, list]] = {}

    class Watched(PopulationModule):
        def on_train_batch_end(self, *args):
            (trained,) = self.trainer.optimizers
            after[self.trainer.global_step] = {
                number: [
                    tensor[number].clone()
                    for p in self.stack.parameters()
                    for tensor in (p, *(t for t in trained.state[p].values() if t.ndim))
                ]
                for number in range(3)
            }

    module = Watched(frame(), optimizer, WSD(), members=members, at_once=at_once)
    data = fit(tmp_path / "all", module, max_steps=8).datamodule
    for number, last in ((0, 3), (2, 5)):
        assert all(map(torch.equal, after[last][number], after[8][number]))
        assert not all(map(torch.equal, after[last - 1][number], after[last][number]))
        assert module.done_at[number] == last
        # its stream stands where it took its last batch
        assert data.members[number].state_dict()["stream"]["batch"] == last
        # and it is the model of a run of as many steps, whose schedule ends there
        single = alone(number, members, optimizer, WSD(), frame())
        wanted = weights_alone(tmp_path / str(number), number, single, max_steps=last)
        for key, weight in wanted.items():
            torch.testing.assert_close(
                module.stack.named()[key][number], weight, rtol=0, atol=1e-12
            )
    assert not all(map(torch.equal, after[5][1], after[8][1]))


def test_training_ends_when_all_are_done(tmp_path):
    optimizer, members = CASES["adamw"]
    members = [replace(members[0], max_steps=2), replace(members[1], max_steps=4)]
    trainer = fit(tmp_path, population(members, optimizer, WSD(), frame()), max_steps=9)
    assert trainer.global_step == 4


def test_a_member_that_diverges_harms_no_other(tmp_path):
    optimizer, members = CASES["adamw"]
    schedule = WSD()
    wild = [members[0], Member(1, {"lr": 1e300}), members[2]]
    tame = [members[0], members[1], members[2]]
    found = []
    for number, each in enumerate((wild, tame)):
        module = population(each, optimizer, schedule, frame(), at_once=3)
        fit(tmp_path / str(number), module, max_steps=6, gradient_clip_val=1.0)
        found.append(module.stack.named()["embedding.weight"].detach())
    assert found[0][1].isnan().any() and not found[1].isnan().any()
    torch.testing.assert_close(found[0][[0, 2]], found[1][[0, 2]], rtol=0, atol=1e-12)


class SaveAfter(pl.Callback):
    def __init__(self, batches, path):
        self.batches, self.path = batches, path

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("accumulate", "batches"), [(1, 2), (1, 5), (2, 5), (2, 10)])
def test_going_on_in_the_middle_equals_never_stopping(accumulate, batches, tmp_path):
    """Before and after a member is done, and in the middle of gathering gradients."""
    optimizer, members = CASES["muon"]
    members = [members[0], replace(members[1], max_steps=4), members[2], members[3]]
    options = {"gradient_clip_val": 0.5, "accumulate_grad_batches": accumulate}

    def made():
        return population(members, optimizer, WSD(warmup_steps=2), frame(), at_once=3)

    whole, path = made(), tmp_path / "middle.ckpt"
    fit(tmp_path, whole, max_steps=8, callbacks=[SaveAfter(batches, path)], **options)
    checkpoint = checkpoints.read(path)
    assert not any(name.startswith("model.") for name in checkpoint["state_dict"])
    assert ("pending_gradients" in checkpoint) == (batches % accumulate > 0)
    second = made()
    trainer = make_trainer(tmp_path / "second", 8, limit_val_batches=0, **options)
    trainer.fit(second, PopulationDataModule(FACTS, DATA), ckpt_path=path, weights_only=True)
    assert trainer.global_step == 8 and second.done_at == whole.done_at == {1: 4}
    for mine, wanted in zip(second.stack.parameters(), whole.stack.parameters(), strict=True):
        assert torch.equal(mine, wanted)
    assert torch.equal(second.tokens, whole.tokens)


def test_an_exported_member_is_an_ordinary_checkpoint(tmp_path):
    optimizer, members = CASES["adamw"]
    members = [members[0], replace(members[1], max_steps=2)]
    module = population(members, optimizer, WSD(), frame(torch.float32))
    trainer = fit(tmp_path, module, max_steps=3)
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    for number in (0, 1):
        target = tmp_path / f"{number}.ckpt"
        export_member(tmp_path / "all.ckpt", number, target)
        for path in (target, tmp_path / "members" / str(number)):
            loaded = toolmem.load(path)
            assert loaded.checkpoint.step == (3, 2)[number]
            assert loaded.checkpoint.data["factbase"]["people"] == (12, 9)[number]
            for name, weight in loaded.model.named_parameters():
                assert torch.equal(weight, module.stack.named()[name][number])
            answer = loaded.ask("When was Ann Smith born?", max_new_tokens=2)
            assert answer is not None
        about = checkpoints.read(target)["toolmem"]
        assert about["optimizer"]["init_args"]["lr"] == (1e-2, 3e-3)[number]
    with pytest.raises(ToolmemError, match="population of 2 models"):
        toolmem.load(tmp_path / "all.ckpt")
    with pytest.raises(ToolmemError, match="2 members, none of number 2"):
        export_member(tmp_path / "all.ckpt", 2, tmp_path / "2.ckpt")
    with pytest.raises(ToolmemError, match=r"0\.ckpt is not a population's"):
        export_member(tmp_path / "0.ckpt", 0, tmp_path / "2.ckpt")
    assert not (tmp_path / "2.ckpt").exists()


RNN_SHAPE = {"vocab_size": 260, "dim": 8, "n_layers": 2, "max_seq_len": 256}
TOGETHER = {
    "packed": (Transformer, SHAPE, {"layout": "packed", "seq_len": 100}),
    "learned positions, layer norm, biases": (
        Transformer, {**SHAPE, "position": "learned", "norm": "layer", "bias": True}, {},
    ),
    "prefix": (Transformer, {**SHAPE, "attention_mask": "prefix"}, {"setting": "in_tool"}),
    "groups and windows": (Transformer, {**SHAPE, "n_kv_heads": 1, "window": [5, 0]}, {}),
    "latent attention": (Transformer, {**SHAPE, "attention": "mla"}, {}),
    "options": (
        Transformer,
        {**SHAPE, "qk_norm": True, "value_residual": True, "attention_softcap": 5.0, "residual_conv": 3},
        {},
    ),
    "mingru": (RNN, RNN_SHAPE, {"layout": "packed"}),
    "rglru": (RNN, {**RNN_SHAPE, "cell": "rglru"}, {}),
    "mamba": (Mamba, RNN_SHAPE, {"layout": "packed"}),
    "mamba2": (Mamba2, {**RNN_SHAPE, "head_dim": 8, "state_dim": 4}, {"layout": "packed"}),
}  # fmt: skip
ONE_BY_ONE = {
    "lstm": (RNN, {**RNN_SHAPE, "cell": "lstm"}),
    "experts": (MoETransformer, {**SHAPE, "n_experts": 4, "bias_update_rate": 0.0}),
    "more tokens": (Transformer, {**SHAPE, "multi_token": 1}),
}
LAYOUTS = [{"seed": 3}, {"seed": 4, "people": 9, "batch_size": 3}, {"seed": 5}]


def first_step(folder, kind, shape, data, at_once):
    """A population after a step, and the models that a step alone makes."""
    torch.manual_seed(0)
    model = kind(**shape).double()
    members = [Member(0), Member(1, {"lr": 1e-2}), Member(2)]
    module = population(members, Muon(lr=1e-2), WSD(), model, at_once=at_once)
    fit(folder / "all", module, data, max_steps=2)
    singles = []
    for number in range(len(members)):
        single = alone(number, members, Muon(lr=1e-2), WSD(), model)
        weights_alone(folder / str(number), number, single, data, max_steps=2)
        singles.append(single.model)
    return module, singles


@pytest.mark.parametrize("name", [*TOGETHER, *ONE_BY_ONE])
def test_architectures(name, tmp_path):
    at_once = 3 if name in TOGETHER else None
    kind, shape, *options = (TOGETHER | ONE_BY_ONE)[name]
    data = [{**each, **(options[0] if options else {})} for each in LAYOUTS]
    module, singles = first_step(tmp_path, kind, shape, data, at_once)
    assert module._joint == (name in TOGETHER)
    for number, single in enumerate(singles):
        for key, weight in single.named_parameters():
            torch.testing.assert_close(
                module.stack.named()[key][number], weight, rtol=0, atol=1e-11
            )


@pytest.mark.parametrize("name", ONE_BY_ONE)
def test_what_cannot_run_together_is_refused_where_it_is_asked_for(name, tmp_path):
    kind, shape = ONE_BY_ONE[name]
    members = [Member(0), Member(1)]
    module = population(members, AdamW(), WSD(), kind(**shape), at_once=2)
    with pytest.raises(ToolmemError, match=r"model\.at_once is 2, but members of .* cannot"):
        fit(tmp_path, module, max_steps=1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"dropout": 0.1}, r"model\.model\.init_args\.dropout"),
        ({"kind": MoETransformer, "n_experts": 2}, "Router changes numbers .*bias_update_rate: 0"),
    ],
)
def test_models_whose_members_would_be_others_are_refused(shape, message):
    with pytest.raises(ToolmemError, match=message):
        population([Member()], AdamW(), WSD(), frame(**shape))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], r"model\.members is empty"),
        ([Member(-1)], r"model\.members\[0\]: seed is -1"),
        ([Member(), Member(max_steps=0)], r"model\.members\[1\].* max_steps 0"),
        ([Member(0, {"rate": 1})], r"members\[0\]\.optimizer\.rate: AdamW has no such option.*lr"),
        ([Member(0, {"lr": -1})], "lr is -1: it must be above 0"),
        ([Member(0, {}, {"steps": 1})], r"members\[0\]\.schedule\.steps: WSD has no such option"),
        ([Member(0, {}, {"class_path": "toolmem.training.AdamW"})], r"schedule: .*AdamW is no"),
    ],
)
def test_members_that_cannot_be_are_refused(members, message):
    with pytest.raises(ToolmemError, match=message):
        population(members, AdamW(), WSD(), frame())


def test_settings_that_one_optimizer_cannot_have_at_once_are_refused(tmp_path):
    for changes in ({"nesterov": False}, {"ns_steps": 3}, {"ns_dtype": "float32"}):
        module = population([Member(), Member(1, changes)], Muon(), WSD(), frame())
        with pytest.raises(ToolmemError, match=r"model\.members: .* differs among members"):
            fit(tmp_path, module, max_steps=1)


def test_runs_that_a_population_cannot_be_are_refused(tmp_path):
    def module(n=2):
        return population([Member()] * n, AdamW(), WSD(), frame())

    with pytest.raises(ToolmemError, match=r"PopulationDataModule"):
        make_trainer(tmp_path).fit(module(), data_of(0))
    with pytest.raises(
        ToolmemError, match=r"model\.members has 3 entries, data\.init_args\.members 2"
    ):
        make_trainer(tmp_path).fit(module(3), PopulationDataModule(FACTS, DATA[:2]))
    for callback in (EMA(), NormProbe(every_n_steps=1)):
        with pytest.raises(ToolmemError, match=type(callback).__name__):
            fit(tmp_path, module(), callbacks=[callback])
    with pytest.raises(ToolmemError, match="must know how long the run is"):
        fit(tmp_path, module(), max_steps=-1)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    optimizer, members = CASES["adamw"]

    def saved(module, data, name):
        trainer = make_trainer(tmp_path / name, 1, limit_val_batches=0)
        trainer.fit(module, data)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return str(tmp_path / f"{name}.ckpt")

    def go_on(module, data, path):
        trainer = make_trainer(tmp_path / "on", 2, limit_val_batches=0)
        trainer.fit(module, data, ckpt_path=path, weights_only=True)

    both = PopulationDataModule(FACTS, DATA[:2])
    many = saved(population(members[:2], optimizer, WSD(), frame()), both, "many")
    single = alone(0, members, optimizer, WSD(), frame())
    one = saved(single, data_of(0), "one")
    with pytest.raises(ToolmemError, match="is of one model, not of a population"):
        go_on(population(members[:2], optimizer, WSD(), frame()), both, one)
    with pytest.raises(ToolmemError, match="a population of 2 models"):
        go_on(alone(0, members, optimizer, WSD(), frame()), data_of(0), many)
    with pytest.raises(ToolmemError, match=r"of 2 members, model\.members has 3"):
        go_on(
            population(members[:3], optimizer, WSD(), frame()),
            PopulationDataModule(FACTS, DATA[:3]),
            many,
        )
    others = [members[0], replace(members[1], seed=7)]
    with pytest.raises(ToolmemError, match=r"model\.members\[1\]: .* has seed 1, not 7"):
        go_on(
            population(others, optimizer, WSD(), frame()),
            PopulationDataModule(FACTS, DATA[:2]),
            many,
        )
    other_facts = PopulationDataModule(FACTS, [DATA[0], {"people": 7}])
    with pytest.raises(ToolmemError, match=r"data\.init_args\.people"):
        go_on(population(members[:2], optimizer, WSD(), frame()), other_facts, many)
