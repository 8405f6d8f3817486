import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models import Mamba, Transformer
from toolmem.models.fused import fits
from toolmem.models.lora import (
    LoRA,
    LoRALinear,
    adapted,
    add_adapters,
    is_adapter,
    merge_adapters,
    merged_weights,
    unmerge_adapters,
)

KINDS = {
    "lora": LoRA(rank=3, alpha=6),
    "rank_stabilized": LoRA(rank=4, alpha=6, rank_stabilized=True),
    "dora": LoRA(rank=3, alpha=6, dora=True),
}


def make(cls=Transformer, **options):
    torch.manual_seed(0)
    shape = {"vocab_size": 17, "dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16}
    return cls(**(shape | options))


def disturb(model):
    generator = torch.Generator().manual_seed(1)
    for layer in adapted(model).values():
        for parameter in (layer.lora_a, layer.lora_b, layer.lora_m):
            if parameter is not None:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def tokens():
    return torch.randint(17, (2, 9), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_first_and_only_adapters_train(kind):
    model = make()
    before = model(tokens())
    names = add_adapters(model, KINDS[kind])
    assert len(names) == 8
    torch.testing.assert_close(model(tokens()), before, atol=1e-6, rtol=1e-5)
    assert all(p.requires_grad == is_adapter(name) for name, p in model.named_parameters())
    model(tokens()).square().sum().backward()
    assert all((p.grad is not None) == is_adapter(name) for name, p in model.named_parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_paper_s_formula_in_float64(kind, bias):
    torch.manual_seed(0)
    holder = nn.ModuleDict({"one": nn.Linear(7, 5, bias=bias)}).double()
    how = KINDS[kind]
    add_adapters(holder, LoRA(**{**how.plain(), "targets": ("one",)}))
    layer = disturb(holder)["one"]
    x = torch.randn(4, 7, dtype=torch.float64)
    scale = {"lora": 2.0, "rank_stabilized": 3.0, "dora": 2.0}[kind]
    weight = layer.weight + scale * (layer.lora_b @ layer.lora_a)
    if kind == "dora":
        weight = layer.lora_m[:, None] * weight / weight.detach().norm(dim=1, keepdim=True)
    expected = F.linear(x, weight, layer.bias)
    found = layer(x)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    trained = [p for p in layer.parameters() if p.requires_grad]
    goal = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad((found * goal).sum(), trained),
        torch.autograd.grad((expected * goal).sum(), trained),
        atol=1e-12, rtol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_taking_out_again(kind):
    model = make()
    add_adapters(model, KINDS[kind])
    disturb(model)
    weights = copy.deepcopy(model.state_dict())
    expected = model(tokens())
    merge_adapters(model)
    merge_adapters(model)  # again is no harm
    torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)
    plain = make()
    plain.load_state_dict(merged_weights(weights, KINDS[kind].plain()))
    torch.testing.assert_close(plain(tokens()), expected, atol=1e-5, rtol=1e-5)
    unmerge_adapters(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, weights[name], atol=1e-5, rtol=0)


def test_another_architecture_s_linear_maps():
    model = Mamba(vocab_size=17, dim=16, n_layers=2, max_seq_len=16)
    names = add_adapters(model, LoRA(rank=2, targets=(r"\.(in_proj|out)$",)))
    assert all(re.search(r"(in_proj|out)$", name) for name in names) and len(names) == 4
    disturb(model)
    expected = model(tokens())
    merge_adapters(model)
    torch.testing.assert_close(model(tokens()), expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_what_a_reads_while_training():
    model = make()
    add_adapters(model, LoRA(rank=2, dropout=0.5))
    disturb(model)
    model.train()
    assert not torch.equal(model(tokens()), model(tokens()))
    model.eval()
    assert torch.equal(model(tokens()), model(tokens()))


def test_fused_kernels_leave_blocks_with_adapters_alone():
    model = make()
    assert all(fits(block) for block in model.blocks)
    add_adapters(model, LoRA(targets=("qkv",)))
    assert not any(fits(block) for block in model.blocks)


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ToolmemError, match=r"targets.*'nothing'.*blocks\.0\.mixer\.qkv"):
        add_adapters(make(), LoRA(targets=("qkv", "nothing")))
    with pytest.raises(ToolmemError, match="head is the embedding"):
        add_adapters(make(tie_embeddings=True), LoRA(targets=("head",)))
    with pytest.raises(ToolmemError, match="no regular expression"):
        LoRA(targets=("(",))
    for name, value in {"rank": 0, "alpha": 0, "dropout": 1.0}.items():
        with pytest.raises(ToolmemError, match=f"model.lora.{name} is"):
            LoRA(**{name: value})
    model = make()
    add_adapters(model, LoRA())
    assert all(type(layer) is LoRALinear for layer in adapted(model).values())
    with pytest.raises(ToolmemError, match="LoRALinear already"):
        add_adapters(model, LoRA())
    weights = model.state_dict()
    del weights["blocks.1.mixer.out.lora_b"]
    with pytest.raises(ToolmemError, match=r"blocks\.1\.mixer\.out does not fit"):
        merged_weights(weights, LoRA().plain())
