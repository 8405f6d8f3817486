import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from training_toys import tiny

from toolmem.errors import ToolmemError
from toolmem.training import AdamW, Muon, OptimizerConfig


def names_by_group(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return [
        (g.get("kind"), g["weight_decay"], {names[id(p)] for p in g["params"]})
        for g in optimizer.param_groups
    ]


def suffixes(names):
    return {name.split(".")[-2] for name in names}


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny(conv_width=4, qk_norm=True, bias=True, position="learned")
    muon, decaying, still = names_by_group(model, Muon(lr=0.1, weight_decay=0.3).build(model))
    assert muon[:2] == ("muon", 0.3)
    assert suffixes(muon[2]) == {"qkv", "out", "up", "down"}
    assert all(name.endswith("weight") for name in muon[2])
    assert decaying == ("adamw", 0.3, {"head.weight"})
    assert still[:2] == ("adamw", 0.0)
    assert {"embedding.weight", "position_embedding.weight", "norm.weight"} < still[2]
    assert len(muon[2] | decaying[2] | still[2]) == len(list(model.parameters()))


def test_a_tied_table_is_an_embedding_and_in_one_group_only():
    model = tiny(tie_embeddings=True)
    for config in (Muon(lr=0.1), AdamW(lr=0.1)):
        groups = names_by_group(model, config.build(model))
        holding = [g for g in groups if "embedding.weight" in g[2]]
        assert [g[1] for g in holding] == [0.0]
        model_again = tiny(tie_embeddings=True)
        changed = type(config)(lr=0.1, weight_decay=0.2, decay_embeddings=True)
        groups = names_by_group(model_again, changed.build(model_again))
        assert [g[1] for g in groups if "embedding.weight" in g[2]] == [0.2]


def test_adamw_decays_matrices_only():
    model = tiny(bias=True)
    decaying, still = names_by_group(model, AdamW(lr=0.1, weight_decay=0.3).build(model))
    assert suffixes(decaying[2]) == {"qkv", "out", "up", "down", "head"}
    assert all(".weight" in name for name in decaying[2])
    assert decaying[1] == 0.3 and still[1] == 0.0


class Mixture(nn.Module):
    """Experts as a stack of matrices, filters as another."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        block = nn.Module()
        block.experts = nn.Parameter(torch.randn(3, 4, 8))
        block.conv = nn.Conv1d(4, 4, 3, groups=4)
        block.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.blocks = nn.ModuleList([block])


def test_stacks_of_experts_are_muons_and_filters_are_not():
    model = Mixture()
    groups = names_by_group(model, Muon(lr=0.1).build(model))
    assert groups[0] == ("muon", 0.01, {"blocks.0.experts"})
    assert "blocks.0.frozen" not in set().union(*(g[2] for g in groups))


def test_adamw_is_fused_and_leaves_unscaling_to_the_trainer():
    optimizer = AdamW(lr=0.1).build(tiny())
    assert optimizer.param_groups[0]["fused"]
    assert not optimizer._step_supports_amp_scaling


def test_adamw_may_have_its_own_rate():
    optimizer = Muon(lr=0.1, adamw_lr=0.01).build(tiny())
    assert {g["kind"]: g["lr"] for g in optimizer.param_groups} == {"muon": 0.1, "adamw": 0.01}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Muon(lr=0.0),
        lambda: AdamW(lr=float("nan")),
        lambda: Muon(weight_decay=-1.0),
        lambda: AdamW(betas=(0.9, 1.0)),
        lambda: Muon(momentum=1.0),
    ],
)
def test_impossible_values_are_refused(make):
    with pytest.raises(ToolmemError, match=r"model\.optimizer"):
        make()


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ToolmemError, match="no trainable parameter"):
        AdamW().build(tiny().requires_grad_(False))


def test_a_recipe_names_one_by_class_path():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OptimizerConfig, "optimizer")
    values = {"class_path": "toolmem.training.Muon", "init_args": {"lr": 0.5, "betas": [0.8, 0.9]}}
    made = parser.instantiate(parser.parse_object({"optimizer": values})).optimizer
    assert made == Muon(lr=0.5, betas=(0.8, 0.9))
