"""Places: what is theirs of an activation, and putting it elsewhere."""

from __future__ import annotations

import pytest
import torch

from toolmem.analysis.circuits import Node, branches, head, heads, neuron, neurons
from toolmem.models import Hybrid, Mamba, MoETransformer


def test_what_is_put_and_where():
    x, y = torch.zeros(2, 3, 4, 5), torch.arange(120.0).reshape(2, 3, 4, 5)
    where = torch.tensor([[True, False, False, True], [False] * 4])
    for node, index in ((head(0, 1), (slice(None), 1)), (Node("blocks.0.mixer.heads"), ())):
        put = node.put(x, node.part(y))
        expected = torch.zeros_like(x)
        expected[index] = y[index]
        assert torch.equal(put, expected) and not x.any()
        put = node.put(x, node.part(y), where)
        expected[1] = 0
        expected[0, :, 1:3] = 0
        assert torch.equal(put, expected)
    units, other = torch.zeros(2, 4, 6), torch.arange(48.0).reshape(2, 4, 6)
    put = neuron(0, 5).put(units, neuron(0, 5).part(other), where)
    expected = torch.zeros_like(units)
    expected[0, [0, 3], 5] = other[0, [0, 3], 5]
    assert torch.equal(put, expected)
    put = Node("embedding").put(units, other, where)
    assert torch.equal(put[0, [0, 3]], other[0, [0, 3]]) and put.count_nonzero() == 11
    assert torch.equal(head(0, 2).put(x, torch.arange(5.0))[1, 2, 3], torch.arange(5.0))


def test_places_of_models():
    model = MoETransformer(11, 8, 2, 2, n_experts=4, dense_layers=1, dense_hidden_dim=3)
    assert heads(model) == [head(0, 0), head(0, 1), head(1, 0), head(1, 1)]
    assert neurons(model) == [neuron(0, 0), neuron(0, 1), neuron(0, 2)]
    assert [node.label for node in branches(model)] == [
        "0.0", "0.1", "0 feed-forward", "1.0", "1.1", "1 feed-forward",
    ]  # fmt: skip
    assert [node.label for node in branches(Mamba(11, 8, 2))] == ["0 mixer", "1 mixer"]
    hybrid = Hybrid(11, 8, 2, ["mamba1", "attention"], {"attention": {"n_heads": 1}})
    assert [node.label for node in branches(hybrid)] == [
        "0 mixer",
        "0 feed-forward",
        "1.0",
        "1 feed-forward",
    ]


@pytest.mark.parametrize(
    ("node", "label"),
    [
        (Node("embedding"), "embedding"), (Node("blocks.3.mixer.keys", 1), "3.1 keys"),
        (neuron(2, 7), "2.n7"), (Node("blocks.0.output"), "0 output"),
    ],
)  # fmt: skip
def test_labels(node, label):
    assert node.label == label
