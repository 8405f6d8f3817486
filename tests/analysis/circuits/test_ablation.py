"""Ablation: the two heads of the circuit are what copying hangs on; and generation feels it too."""

from __future__ import annotations

import copy

import pytest
import torch
from circuits_toys import induction, repeats

from toolmem.analysis.circuits import (
    Node,
    ablated,
    branches,
    exactness,
    exactness_without,
    head,
    heads,
    mean_activations,
    neuron,
    neurons,
    recall_without,
    record,
    tell,
)
from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import make_population
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_recall
from toolmem.generation import generate
from toolmem.generation.reference import generate_naive
from toolmem.models import Hybrid, MoETransformer, Transformer

EVERY = [head(layer, index) for layer in (0, 1) for index in (0, 1)]


def copied(model) -> float:
    """The share of tokens of the second telling that are said right."""
    tokens = repeats()
    said = model(tokens).argmax(-1)
    return (said[:, 10:-1] == tokens[:, 11:]).double().mean().item()


def test_without_one_head_of_the_circuit_nothing_is_copied():
    model = induction()
    assert heads(model) == EVERY and copied(model) == 1
    for node in [*branches(model), *neurons(model)]:
        with ablated(model, [node]):
            found = copied(model)
        assert found < 0.3 if node in (head(0, 0), head(1, 0)) else found == 1, node
    with ablated(model, [head(0, 1), head(1, 1), *neurons(model)]):
        assert copied(model) == 1
    assert copied(model) == 1


def test_zero_is_what_weights_of_zero_give():
    model, tokens = induction(), repeats(2)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[1].mixer.out.weight[:, 24:] = 0
        other.blocks[0].feed_forward.down.weight[:, [2, 5]] = 0
    with ablated(model, [head(1, 1), neuron(0, 2), neuron(0, 5)]):
        torch.testing.assert_close(model(tokens), other(tokens), rtol=0, atol=1e-12)
    assert not torch.equal(model(tokens), other(tokens))


def dialogues(setting: str = "in_tool"):
    table = TemplateSet.load(setting).questions(make_population(4))
    return [table.dialogue(i) for i in range(len(table))]


def byte_model(cls=Transformer, **options):
    torch.manual_seed(0)
    options = {"n_heads": 2, "hidden_dim": 16, **options} if cls is not Hybrid else options
    model = cls(260, 16, n_layers=2, max_seq_len=256, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def test_means_are_of_real_tokens():
    model = byte_model().double()
    told = [tell(d, ByteTokenizer()) for d in dialogues()[:3]]
    assert len({len(one.tokens) for one in told}) > 1
    nodes = [head(1, 0), neuron(0, 3), Node("blocks.0.mixer.output")]
    means = mean_activations(model, told, nodes)
    by_hand = {node: [] for node in nodes}
    for one in told:
        found = record(model, one.tokens[None], [node.point for node in nodes])
        by_hand[nodes[0]].append(found["blocks.1.mixer.heads"][0, 0])
        by_hand[nodes[1]].append(found["blocks.0.feed_forward.hidden"][0, :, 3])
        by_hand[nodes[2]].append(found["blocks.0.mixer.output"][0])
    for node in nodes:
        torch.testing.assert_close(
            means[node], torch.cat(by_hand[node]).mean(0), rtol=0, atol=1e-12
        )
    with ablated(model, nodes, means):
        found = record(model, told[0].tokens[None], [node.point for node in nodes])
    assert torch.equal(
        found["blocks.1.mixer.heads"][0, 0], means[nodes[0]].expand(len(told[0].tokens), -1)
    )
    assert (found["blocks.0.feed_forward.hidden"][0, :, 3] == means[nodes[1]]).all()
    assert (found["blocks.0.mixer.output"][0] == means[nodes[2]]).all()


@pytest.mark.parametrize(
    "model",
    [
        byte_model(conv_width=3),
        byte_model(n_kv_heads=1, window=8),
        byte_model(attention="mla"),
        byte_model(attention_mask="prefix"),
        byte_model(MoETransformer, n_experts=4),
        byte_model(
            Hybrid, pattern=["mamba2", "attention"],
            mixers={"attention": {"n_heads": 2}, "mamba2": {"head_dim": 8}},
        ),
    ],
    ids=range(6),
)  # fmt: skip
def test_generation_is_of_the_model_without_it(model):
    """With caches and pages as by whole rows; and otherwise than with it."""
    prompts = [[256, 72, 105, 257], [256, *range(60, 80), 257], [256, 257]]
    tokenizer = ByteTokenizer()

    def say(by, **options):
        return [g.tokens for g in by(model, tokenizer, prompts, max_new_tokens=6, **options)]

    def naive():
        one = [generate_naive(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
        return [generated.tokens for generated in one]

    whole = say(generate)
    nodes = [node for node in branches(model) if node.point.startswith("blocks.1.")]
    with ablated(model, nodes[:1], {nodes[0]: torch.tensor(3.0)}):
        assert say(generate) == naive() != whole
    assert say(generate) == whole


def test_recall_and_exactness_without():
    tokenizer = ByteTokenizer()
    questions = dialogues("in_weight")[:2]
    model = byte_model()
    told = [tell(d, tokenizer) for d in questions]
    nodes = branches(model)
    rates = exactness(model, told)
    assert rates == {"answer": 0.0}  # nobody trained it, and nothing is asked of a tool
    without = exactness_without(model, told, nodes)
    assert list(without) == nodes
    results = recall_without(model, tokenizer, questions, nodes[:2], max_new_tokens=4)
    for node, result in results.items():
        with ablated(model, [node]):
            plain = measure_recall(model, tokenizer, questions, max_new_tokens=4)
        assert result.samples == plain.samples
    assert results[nodes[0]].samples != results[nodes[1]].samples


def test_exactness_counts_whole_parts():
    model = byte_model()
    told = [tell(d, ByteTokenizer()) for d in dialogues()]
    hits = [bool((model(o.tokens[None])[0, :-1].argmax(-1) == o.tokens[1:]).any()) for o in told]
    told = [one for one, hit in zip(told, hits, strict=True) if hit][:5]
    said = [model(one.tokens[None])[0].argmax(-1) for one in told]
    # of each dialogue the positions that are right: all of them, then with a wrong one
    right = [
        tuple(i for i in range(1, len(one.tokens)) if s[i - 1] == one.tokens[i])
        for one, s in zip(told, said, strict=True)
    ]
    wrong = [
        next(i for i in range(1, len(one.tokens)) if s[i - 1] != one.tokens[i])
        for one, s in zip(told, said, strict=True)
    ]
    assert all(right) and len(right) == 5
    mixed = [(*r, w) if row < 2 else r for row, (r, w) in enumerate(zip(right, wrong, strict=True))]
    found = exactness(
        model, told, 2, whole=right, mixed=mixed, rare=[(), right[1], (), (), ()], none=[()] * 5
    )
    assert found == {"whole": 1.0, "mixed": 0.6, "rare": 1.0}


def test_what_is_not_there_is_named():
    model = induction()
    with pytest.raises(ToolmemError, match="no number 5"), ablated(model, [head(0, 5)]):
        pass
    with pytest.raises(ToolmemError, match="hook point"):
        exactness_without(model, [], [head(3, 0)])
