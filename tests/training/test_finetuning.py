import math

import pytest
import torch
from training_toys import ToyData, make_batch, make_module, make_trainer, tiny

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.models.lora import LoRA, adapted, is_adapter
from toolmem.training import AdamW, Checkpointing, Constant, Muon
from toolmem.training.finetuning import depth


def fit(folder, module, max_steps=6, resume=None, every=3, total=None, **options):
    trainer = make_trainer(
        folder, total or max_steps, enable_checkpointing=True, limit_val_batches=0,
        callbacks=[Checkpointing(every_n_steps=every, monitor=None)], **options,
    )  # fmt: skip
    trainer.fit_loop.epoch_loop.max_steps = max_steps
    trainer.fit(module, ToyData(), ckpt_path=resume)
    return trainer


HOW = LoRA(rank=2, alpha=8, dora=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    fit(folder, make_module())
    return folder


@pytest.mark.parametrize("optimizer", [AdamW(lr=1e-2), Muon(lr=1e-2)])
def test_adapters_alone_are_trained_and_in_the_optimizer(tmp_path, base, optimizer):
    module = make_module(lora=HOW, init_from=str(base), optimizer=optimizer)
    trainer = fit(tmp_path, module)
    given = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    names = {n for n, p in module.model.named_parameters() if id(p) in given}
    assert names == {n for n, _ in module.model.named_parameters() if is_adapter(n)}
    before = checkpoints.weights_of(checkpoints.read(base / "checkpoints" / "last.ckpt"))
    for name, value in module.model.state_dict().items():
        if is_adapter(name):
            assert name.endswith("lora_a") or not torch.equal(value, torch.zeros_like(value))
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("how", [LoRA(rank=2, dropout=0.2), HOW], ids=["lora", "dora"])
def test_a_run_with_adapters_goes_on_exactly(tmp_path, base, how):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def module():
        torch.manual_seed(3)
        return make_module(lora=how, init_from=str(base), neftune_alpha=5.0, schedule=Constant())

    one = module()
    fit(whole, one)
    fit(parts, module(), 3, total=6)
    other = module()
    fit(parts, other, 6, parts / "checkpoints" / "last.ckpt")
    for (name, value), same in zip(
        one.model.state_dict().items(), other.model.state_dict().values(), strict=True
    ):
        assert torch.equal(value, same), name


def test_a_checkpoint_with_adapters_loads_as_a_plain_model(tmp_path, base):
    module = make_module(lora=HOW, init_from=str(base))
    fit(tmp_path, module)
    file = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = checkpoints.read(file)
    about = checkpoints.about_of(checkpoint, file)
    assert about["model"]["lora"] == HOW.plain()
    plain = checkpoints.build_model(about["model"], file)
    plain.load_state_dict(checkpoints.weights_of(checkpoint))
    assert not adapted(plain)
    batch = make_batch(5)
    module.eval(), plain.eval()
    expected = module.model(batch.tokens)
    torch.testing.assert_close(plain(batch.tokens), expected, atol=1e-5, rtol=1e-5)
    # and another run starts from it, with adapters or without
    for lora in (None, LoRA(rank=1)):
        after = make_module(lora=lora, init_from=str(tmp_path))
        trainer = fit(tmp_path / f"after_{lora is None}", after, 1)
        assert trainer.global_step == 1
        if lora is None:
            continue
        torch.testing.assert_close(
            after.model.blocks[0].mixer.out.weight, plain.blocks[0].mixer.out.weight
        )


def test_a_run_goes_on_only_with_the_adapters_that_it_had(tmp_path, base):
    with pytest.raises(ToolmemError, match=r"model\.lora: this run has adapters"):
        fit(tmp_path, make_module(lora=HOW), resume=base / "checkpoints" / "last.ckpt")
    fit(tmp_path, make_module(lora=HOW))
    with pytest.raises(ToolmemError, match="this run has none"):
        fit(tmp_path, make_module(), resume=tmp_path / "checkpoints" / "last.ckpt")
    other = make_module(lora=LoRA(rank=3, alpha=8, dora=True))
    with pytest.raises(ToolmemError, match=r"lora\.rank is 3"):
        fit(tmp_path, other, resume=tmp_path / "checkpoints" / "last.ckpt")


def test_frozen_parameters_stay_as_they_are(tmp_path):
    module = make_module(freeze=("embedding", r"^blocks\.0\."))
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    fit(tmp_path, module)
    for name, value in module.model.state_dict().items():
        frozen = "embedding" in name or name.startswith("blocks.0.")
        assert torch.equal(value, before[name]) == frozen, name


def test_patterns_that_name_nothing_or_all_are_refused():
    with pytest.raises(ToolmemError, match="no parameter has 'lm_head'"):
        make_module(freeze=("lm_head",))
    with pytest.raises(ToolmemError, match="leave nothing to train"):
        make_module(freeze=("",))
    with pytest.raises(ToolmemError, match=r"model\.freeze: '\(' is no regular expression"):
        make_module(freeze=("(",))
    for name, value in {"layer_lr_decay": 0.0, "neftune_alpha": -1.0}.items():
        with pytest.raises(ToolmemError, match=f"model.{name} is"):
            make_module(**{name: value})
    with pytest.raises(ToolmemError, match="it has adapters"):
        make_module(lora=HOW, fused=True)


@pytest.mark.parametrize("optimizer", [AdamW(lr=1.0), Muon(lr=1.0, adamw_lr=0.5)])
def test_learning_rates_fall_towards_the_input(tmp_path, optimizer):
    module = make_module(layer_lr_decay=0.5, optimizer=optimizer)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=0)
    trainer.fit(module, ToyData())
    [built] = trainer.optimizers
    plain = {
        id(p): group
        for group in optimizer.build(module.model).param_groups
        for p in group["params"]
    }
    found = {id(p): group for group in built.param_groups for p in group["params"]}
    layers = {"embedding": 3, "blocks.0": 2, "blocks.1": 1, "norm": 0, "head": 0}
    for name, parameter in module.model.named_parameters():
        [below] = [n for part, n in layers.items() if name.startswith(part + ".")]
        one, other = found[id(parameter)], plain[id(parameter)]
        assert one["initial_lr"] == other["lr"] * 0.5**below, name
        assert one["weight_decay"] == other["weight_decay"]
        assert depth(name, 2) == 3 - below
    assert sum(len(group["params"]) for group in built.param_groups) == len(found)


def test_noise_is_the_paper_s_and_only_in_training():
    model = tiny()
    module = make_module(model, neftune_alpha=10.0)
    batch = make_batch(0)
    module.eval()
    embedded = model.embed(batch.tokens)
    assert torch.equal(embedded, model.embedding.weight[batch.tokens])
    module.train()
    noise = torch.stack([model.embed(batch.tokens) for _ in range(300)]) - embedded
    most = 10 / math.sqrt(batch.tokens.shape[1] * 8)
    assert noise.abs().max() <= most * (1 + 1e-5)
    assert abs(noise.mean().item()) < 0.01 * most
    assert noise.std().item() == pytest.approx(most / math.sqrt(3), rel=0.01)


@pytest.mark.parametrize("mask", [0.5, 1.0])
def test_losses_by_chunks_are_those_of_all_logits(mask):
    batch = make_batch(0, mask=mask)
    plain = make_module(tiny().double(), loss_chunk=0, fused=False)
    chunked = make_module(tiny().double(), loss_chunk=3, fused=False)
    for module in (plain, chunked):
        total, count = module.loss_sum(batch)
        total.backward()
    expected, _ = plain.loss_sum(batch)
    assert count == int(batch.loss_mask.sum())
    torch.testing.assert_close(total, expected, atol=1e-12, rtol=1e-13)
    for (name, one), other in zip(
        chunked.model.named_parameters(), plain.model.parameters(), strict=True
    ):
        torch.testing.assert_close(
            one.grad, other.grad, atol=1e-12, rtol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )
    with torch.no_grad():
        torch.testing.assert_close(
            chunked.token_losses(batch, chunked.model.hidden),
            plain.token_losses(batch, plain.model.hidden),
        )


def test_chunks_are_chosen_where_logits_are_many(monkeypatch):
    module = make_module()
    assert module._chunk(1000) == 0
    monkeypatch.setattr("toolmem.models.chunked_loss.MANY_LOGITS", 11 * 400)
    assert (module._chunk(400), module._chunk(401)) == (0, 100)
    assert make_module(z_loss=0.1)._chunk(1000) == 0
    assert make_module(lora=LoRA(targets=("head",)))._chunk(1000) == 0
    with pytest.raises(ToolmemError, match="loss_chunk is 8: z_loss"):
        make_module(z_loss=0.1, loss_chunk=8)
    with pytest.raises(ToolmemError, match="loss_chunk is -1"):
        make_module(loss_chunk=-1)
