"""Options of how training runs a model's body."""

import functools

import pytest
import torch
from test_module import uneven
from training_toys import SEQ, VOCAB, Stream, ToyData, make_batch, make_module, make_trainer, tiny

from toolmem.errors import ToolmemError
from toolmem.models import Mamba2, MoETransformer
from toolmem.models.recompute import ActivationCheckpointing
from toolmem.training.body import MOST_GRAPHS, Compilations

BLOCKS = ActivationCheckpointing("blocks")


@pytest.fixture
def eager_compiler(monkeypatch):
    """What is compiled is traced and guarded as ever, and run as it is: no compiler is waited for."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def trained(folder, steps: int = 6, make=uneven, model=None, **options):
    module = make_module(tiny() if model is None else model, **options)
    make_trainer(folder, steps, log_every_n_steps=steps).fit(module, ToyData(make))
    return module


def ragged(index: int):
    """Batches whose rows are as long as facts' are: every time another length, and number."""
    return make_batch(index, rows=2 + index % 5, seq=3 + index % (SEQ - 3))


def test_checkpointed_training_is_training(tmp_path):
    plain = trained(tmp_path / "plain", fused=False)
    for how in (BLOCKS, ActivationCheckpointing("selective", every=2)):
        found = trained(tmp_path / how.mode, activation_checkpointing=how)
        for name, parameter in plain.named_parameters():
            assert torch.equal(found.get_parameter(name), parameter), name


@pytest.mark.parametrize(
    "make",
    [
        tiny,
        lambda: MoETransformer(VOCAB, 8, 4, n_heads=2, n_experts=4, top_k=2, max_seq_len=SEQ),
        lambda: Mamba2(VOCAB, 32, 4, max_seq_len=SEQ),
    ],
    ids=["Transformer", "MoE", "Mamba2"],
)
def test_compiled_blocks_are_few_graphs_whatever_the_lengths(tmp_path, eager_compiler, make):
    torch.manual_seed(0)
    plain = trained(tmp_path / "plain", 12, ragged, make(), fused=False)
    torch.manual_seed(0)
    found = trained(tmp_path / "compiled", 12, ragged, make(), compile="blocks")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), parameter)
    # the first block makes the masks that the others find
    assert 1 <= found.reported["compile/graphs"][1] <= 4


def test_compiled_blocks_can_be_checkpointed(tmp_path, eager_compiler):
    plain = trained(tmp_path / "plain", make=ragged, fused=False)
    both = trained(
        tmp_path / "both", make=ragged, compile="blocks", activation_checkpointing=BLOCKS
    )
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(both.get_parameter(name), parameter)
    assert both.reported["compile/graphs"][1] <= 4


def test_graphs_that_go_on_growing_are_warned_of_once(eager_compiler):
    counted = Compilations()
    torch._dynamo.utils.counters["stats"]["unique_graphs"] += MOST_GRAPHS
    assert counted.metrics() == {"compile/graphs": MOST_GRAPHS}
    torch._dynamo.utils.counters["stats"]["unique_graphs"] += 1
    with pytest.warns(UserWarning, match="17 graphs were compiled"):
        counted.metrics()
    assert counted.metrics() == {
        "compile/graphs": MOST_GRAPHS + 1
    }  # a second one would be an error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "blocks", "fused": True}, r"model\.compile and model\.fused"),
        (
            {"activation_checkpointing": BLOCKS, "fused": True},
            r"model\.fused is true and model\.activation_checkpointing",
        ),
        ({"activation_checkpointing": BLOCKS, "compile": True}, r"use model\.compile: blocks"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ToolmemError, match=message):
        make_module(**options)


def test_the_stream_of_the_toys_is_ragged():
    lengths = {batch.tokens.shape for batch in Stream(0, 12, ragged)}
    assert len(lengths) == 12
