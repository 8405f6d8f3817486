"""A run's checkpoints measured one after the other, on the same dialogues."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from toolmem.analysis.circuits import (
    Node,
    branches,
    head,
    induction_scores,
    lens_readings,
    mean_activations,
    patch_effects,
    record,
    repeated_tokens,
)
from toolmem.analysis.circuits import evolution as evolving
from toolmem.analysis.circuits.evolution import (
    evolution,
    leading,
    material,
    one_attribute,
    removed,
    snapshot,
)
from toolmem.checkpoints import LoadedCheckpoint
from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import make_population
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_recall
from toolmem.models import LinearAttention, Transformer


def dialogues(setting="in_tool", people=8):
    table = TemplateSet.load(setting).questions(make_population(people))
    return [table.dialogue(i) for i in range(len(table))]


def byte_model(**options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(260, 16, n_layers=2, n_heads=2, hidden_dim=8, max_seq_len=192, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def checkpoint(model, step) -> LoadedCheckpoint:
    return LoadedCheckpoint(Path(f"step_{step}.ckpt"), model, ByteTokenizer(), {}, step)


@pytest.fixture(scope="module")
def given():
    return material(dialogues()[:12], ByteTokenizer(), one_attribute(dialogues(people=30)))


def test_the_material(given):
    lengths = [len(one.tokens) for one in given.told]
    assert lengths == sorted(lengths) and len(lengths) == 12
    assert given.copies == ["name in query", "name", "answer"] == list(given.contrasts)
    assert len(given.probed) == 30
    assert {d.dialogue.attribute for d in given.probed} == {"birth_date"}
    assert given.vocabulary.max() < 256  # no role tokens
    assert material(dialogues()[:2], ByteTokenizer(), dialogues()[:2]).probed == []
    with pytest.raises(ToolmemError, match="no dialogue"):
        material([], ByteTokenizer())


def test_a_snapshot_is_of_the_functions_that_it_calls(given):
    model = byte_model()
    found = snapshot(model, given, 7)
    assert found.step == 7
    assert list(found.scores) == [
        "previous token", "induction", "copies the name into the query", "copies the name into the last turn",
        "copies the answer", "OV eigenvalues",
    ]  # fmt: skip
    tokens = repeated_tokens(model, vocabulary=given.vocabulary)
    assert found.scores["induction"] == induction_scores(model, tokens)
    row = given.told[0].tokens[None]
    weights = record(model, row, ["blocks.1.mixer.weights"])["blocks.1.mixer.weights"][0, 0]
    assert (found.weights[head(1, 0)] / 255 - weights).abs().max() <= 0.5 / 255 + 1e-6
    readings = lens_readings(model, row)
    torch.testing.assert_close(
        found.lens["blocks.0.output"], readings["blocks.0.output"].log_probs[0].exp()
    )
    nodes = branches(model)
    assert list(found.without) == nodes and len(mean_activations(model, given.told, nodes)) == len(
        nodes
    )
    assert found.patched["answer"] == patch_effects(model, given.contrasts["answer"], nodes)
    assert {place for _, place in found.probed} == set(given.told[0].places)


def test_what_a_model_tells_alike_is_left_out_of_patching(given):
    model = byte_model()
    with torch.no_grad():
        model.head.weight.zero_()
    found = snapshot(model, given, 0)
    assert found.patched == {} and found.exact == {"query": 0.0, "answer": 0.0}


def test_steps_in_order_and_each_once(given):
    first, last = byte_model(), byte_model(qk_norm=True)
    steps = [checkpoint(first, 5), checkpoint(last, 10), checkpoint(copy.deepcopy(last), 10)]
    asked = [one.dialogue for one in given.told]
    _, found = evolution(iter(steps[::-1]), asked)
    assert [one.step for one in found] == [5, 10]
    assert found[0].scores["induction"] == snapshot(first, given, 5).scores["induction"]
    assert found[0].probed == {}
    with pytest.raises(ToolmemError, match="no checkpoint"):
        evolution([], asked)
    with pytest.raises(ToolmemError, match="LinearAttention has no attention"):
        evolution([checkpoint(LinearAttention(260, 8, 1, n_heads=2, max_seq_len=192), 1)], asked)


def test_recall_without_the_parts(given, monkeypatch):
    model = byte_model()
    some = material(dialogues("in_weight")[:2], ByteTokenizer())
    monkeypatch.setattr("toolmem.evaluation.recall.MARGIN", -40)  # few tokens: it never ends
    found = removed(model, ByteTokenizer(), some)
    assert list(found.recall) == branches(model) and len(found.neurons) == 16
    whole = measure_recall(model, ByteTokenizer(), [one.dialogue for one in some.told])
    assert found.whole.samples == whole.samples
    monkeypatch.setattr(evolving, "MOST_NEURONS", 15)
    monkeypatch.setattr(evolving, "recall_without", lambda *_, **__: {})
    assert removed(model, ByteTokenizer(), some).neurons == {}


def test_the_heads_that_lead():
    a, b, c = head(0, 0), head(0, 1), head(1, 0)
    early = {"induction": {a: 0.1, b: 0.2, c: 0.9}, "OV eigenvalues": {a: 1.0, b: 1.0, c: 0.0}}
    late = {
        "induction": {a: 0.1, b: float("nan"), c: 0.0},
        "previous token": {a: 0.0, b: 0.5, c: 0.0},
    }
    assert leading([early, late], 2) == [b, c]
    assert leading([early, late], 9) == [a, b, c]
    assert (
        leading([], 3) == [] and one_attribute([]) == [] and Node("embedding").label == "embedding"
    )
