"""Checkpointed blocks: the same to the last bit, for less memory and more FLOPs."""

import copy

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models import RNN, Hybrid, LinearAttention, Mamba, Mamba2, MoETransformer, Transformer
from toolmem.models.activation_memory import body_activations, kept_for_backward
from toolmem.models.context import Extras
from toolmem.models.flops import FlopCounter
from toolmem.models.model_flops import ModelFlops
from toolmem.models.recompute import (
    ActivationCheckpointing,
    checkpoint_blocks,
    release_blocks,
)

BLOCKS = ActivationCheckpointing("blocks")
SELECTIVE = ActivationCheckpointing("selective")
WAYS = {
    "blocks": BLOCKS,
    "every second": ActivationCheckpointing("blocks", every=2),
    "selective": SELECTIVE,
    "matmuls alone": ActivationCheckpointing("selective", keep=("matmul",)),
    "offload": ActivationCheckpointing(offload=True),
    "blocks, offload": ActivationCheckpointing("blocks", offload=True),
}
COMMON = {"vocab_size": 50, "dim": 32, "n_layers": 3, "max_seq_len": 64}
HEADS = {"n_heads": 4, "hidden_dim": 64}
MODELS = {
    "Transformer, dropout": lambda: Transformer(**COMMON, **HEADS, dropout=0.1),
    "Transformer, shared values": lambda: Transformer(
        **COMMON, **HEADS, value_residual=True, residual_conv=3
    ),
    "MoE, balanced": lambda: MoETransformer(
        **COMMON, **HEADS, n_experts=4, top_k=2, score="sigmoid", bias_update_rate=0.01,
        balance_loss=0.01, z_loss=0.01,
    ),
    "Mamba": lambda: Mamba(**COMMON),
    "Mamba2": lambda: Mamba2(**COMMON),
    "RNN": lambda: RNN(**COMMON),
    "LinearAttention": lambda: LinearAttention(**COMMON, n_heads=4),
    "Hybrid": lambda: Hybrid(
        **COMMON, pattern=["mamba2", "attention"], mixers={"attention": {"n_heads": 4}}
    ),
}  # fmt: skip


def make(kind: str, how: ActivationCheckpointing | None = None):
    torch.manual_seed(0)
    model = MODELS[kind]().train()
    if how is not None:
        checkpoint_blocks(model, how)
    return model


def tokens(rows: int = 3, seq: int = 24) -> torch.Tensor:
    return torch.randint(50, (rows, seq), generator=torch.Generator().manual_seed(1))


def passed(model, twice: bool = False):
    """Everything that a step of training leaves behind."""
    torch.manual_seed(2)
    extras = Extras()
    documents = torch.arange(24).expand(3, 24) // 12
    states = model.hidden(tokens(), documents=documents, extras=extras)
    loss = states.square().mean() + sum(extras.losses.values())
    if twice:
        loss.backward(retain_graph=True)
        model.zero_grad()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= dict(model.named_buffers()) | extras.losses | extras.metrics | {"states": states}
    found["next random number"] = torch.rand(())
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_same_to_the_last_bit(kind, way):
    assert_same(passed(make(kind, WAYS[way])), passed(make(kind)))


def test_a_backward_pass_can_be_made_twice():
    kind = "MoE, balanced"
    assert_same(passed(make(kind, BLOCKS), twice=True), passed(make(kind)))


def test_a_copy_runs_its_own_weights():
    model = make("Transformer, dropout", BLOCKS).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert other.hidden(tokens()).abs().max() == 0
    assert model.hidden(tokens()).abs().max() > 0


def test_blocks_can_be_released_again():
    model = make("MoE, balanced", BLOCKS)
    release_blocks(model)
    assert all("forward" not in vars(block) for block in model.blocks)
    assert_same(passed(model), passed(make("MoE, balanced")))


def test_names_stay():
    assert make("Mamba2", BLOCKS).state_dict().keys() == make("Mamba2").state_dict().keys()


def test_decoding_with_a_cache_and_passes_without_gradients_are_left_alone(monkeypatch):
    model = make("Transformer, dropout", BLOCKS).eval()
    monkeypatch.setattr("toolmem.models.recompute.checkpoint", None)
    with torch.no_grad():
        whole = model(tokens())
        cache = model.new_cache(3, 24)
        parts = [model(tokens()[:, i : i + 8], cache=cache) for i in range(0, 24, 8)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("kind", MODELS)
def test_less_is_kept_and_that_is_known_without_running(kind):
    kept = {}
    for way in (None, *WAYS):
        model = make(kind, None if way is None else WAYS[way])
        inputs = tokens(4, 32)
        with kept_for_backward(*model.parameters(), *model.buffers(), inputs) as found:
            found.note(model.hidden(inputs))
        kept[way] = found.n_bytes
        assert body_activations(model, 4, 32).total == kept[way], way
    stream = 4 * 32 * 32 * 4  # bytes
    # what three blocks are given, and what the last norm keeps, dropout of embedded tokens perhaps
    assert 5 * stream <= kept["blocks"] <= 7.1 * stream
    assert kept["blocks"] < kept["selective"] < kept[None]
    assert kept["blocks"] < kept["every second"] < kept[None]
    assert kept["blocks, offload"] <= kept["offload"] < kept["blocks"]  # the last norm's


@pytest.mark.parametrize("kind", ["Transformer, shared values", "Mamba2", "RNN", "MoE, balanced"])
def test_flops_of_the_second_run_are_executed_and_not_asked_for(kind):
    plain, again = (ModelFlops(make(kind, how)).body(3, 24) for how in (None, BLOCKS))
    assert again.same_mathematics(plain)
    assert again.exact(72, lambda window, seq: 100) == plain.exact(72, lambda window, seq: 100)
    more = again.executed() - plain.executed()
    done_forward = plain.forward + sum(pair.executed_forward for pair in plain.pairs)
    # what comes last in a block is not wanted again
    assert 0.6 * done_forward < more <= done_forward
    twice = ModelFlops(make(kind, BLOCKS))
    twice.body(
        3, 24
    )  # the other shapes are reckoned from this one, or measured where they do not fit
    fresh = ModelFlops(make(kind, BLOCKS)).body(5, 40)
    assert twice.body(5, 40).executed() == fresh.executed()


def test_flops_are_those_of_code_that_really_runs():
    model = make("Transformer, dropout", BLOCKS)
    found = ModelFlops(model).body(3, 24)
    with FlopCounter() as counter:
        model.hidden(tokens()).sum().backward()
    tally = counter.tally
    assert tally.forward + tally.backward + tally.recomputed == found.executed()
    assert tally.recomputed > found.recomputed > 0  # there attention is apart


def test_what_cannot_be_is_refused():
    for changes, message in (
        ({"mode": "all"}, "choose none, blocks or selective"),
        ({"mode": "blocks", "every": 0}, "1 .all blocks. or more"),
        ({"mode": "selective", "keep": ("matmul", "norm")}, "unknown 'norm'"),
    ):
        with pytest.raises(ToolmemError, match=message):
            ActivationCheckpointing(**changes)
