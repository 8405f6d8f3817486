"""Probes: a fact is readable where it was put, not before, and not by chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from toolmem.analysis.circuits import head, probe, probe_answers, tapped, tell
from toolmem.analysis.circuits.probes import folds_of, ridge
from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import make_population
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import Mamba, Transformer


def test_ridge_against_the_equations_written_plainly():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 4)), rng.integers(0, 3, 30)
    weights, intercepts = ridge(torch.tensor(x), torch.tensor(y), 3, 2.5)
    # the intercept as a column of ones that has no penalty
    z = np.hstack([x, np.ones((30, 1))])
    penalty = np.diag([2.5] * 4 + [0])
    expected = np.linalg.solve(z.T @ z + penalty, z.T @ np.eye(3)[y])
    np.testing.assert_allclose(weights.numpy(), expected[:4], atol=1e-10)
    np.testing.assert_allclose(intercepts.numpy(), expected[4], atol=1e-10)


def test_what_is_there_is_read_and_what_is_not_is_not():
    torch.manual_seed(0)
    labels = torch.randint(4, (400,))
    people = [str(i) for i in range(400)]
    noise = torch.randn(400, 12)
    read = probe(noise + 6 * torch.eye(12)[labels], labels.tolist(), people)
    assert read.accuracy > 0.98
    assert read.control < 0.4 and 0.2 < read.guess < 0.35
    assert probe(noise, labels.tolist(), people).accuracy < 0.4
    # a feature that says nothing but what people are: good on those it was fitted on, nothing on others
    numbers = torch.arange(400) // 4
    answers = torch.randint(4, (100,))[numbers].tolist()
    persons = torch.nn.functional.one_hot(numbers).float()
    assert probe(persons, answers, [str(int(i)) for i in numbers]).accuracy < 0.4
    assert (
        probe(persons, answers, people).accuracy > 0.9
    )  # nobody is told apart: it is fitted on them


def test_nobody_is_in_two_folds():
    groups = [str(i % 7) for i in range(30)]
    folds = folds_of(groups, 3, 0)
    assert set(folds.tolist()) == {0, 1, 2}
    for group in set(groups):
        assert len({int(f) for f, g in zip(folds, groups, strict=True) if g == group}) == 1
    assert torch.equal(folds, folds_of(groups, 3, 0)) and not torch.equal(
        folds, folds_of(groups, 3, 1)
    )
    with pytest.raises(ToolmemError, match="as many people; there are 7"):
        folds_of(groups, 8, 0)


@pytest.fixture(scope="module")
def told():
    table = TemplateSet.load("in_weight").questions(make_population(150), attributes=["birth_date"])
    return [tell(table.dialogue(i), ByteTokenizer()) for i in range(len(table))]


def test_a_fact_is_readable_from_where_it_is_put(told):
    """Head 0 of block 1 is made to write the answer's first token at the end of the question."""
    torch.manual_seed(0)
    model = Transformer(260, 16, n_layers=3, n_heads=2, hidden_dim=16, max_seq_len=128).eval()
    digits = torch.randn(260, 16)

    def write(x):
        y = x.clone()
        for row, one in enumerate(told):
            y[row, one.places["end of question"]] = 3 * digits[one.tokens[one.answer[0]]]
        return y

    with tapped(model, {"blocks.1.mixer.output": write}):
        found = probe_answers(model, told)
    places = ("end of name", "end of question", "before answer")
    assert {place for _, place in found} == set(places)
    layers = ["embedding", *(f"blocks.{i}.output" for i in range(3))]
    assert list(dict.fromkeys(point for point, _ in found)) == layers
    for (point, place), read in found.items():
        there = place == "end of question" and point in layers[2:]
        # of dates' first digits 1 and 2 are the most frequent
        assert read.accuracy > 0.95 if there else read.accuracy < read.guess + 0.15, (point, place)
        assert read.control < read.guess + 0.15


def test_any_architecture_and_places_of_choice(told):
    model = Mamba(260, 8, 1, max_seq_len=128).eval()
    found = probe_answers(model, told[:20], ["before answer"], n_folds=2)
    assert set(found) == {("embedding", "before answer"), ("blocks.0.output", "before answer")}
    with pytest.raises(ToolmemError, match="no dialogue"):
        probe_answers(model, [])
    assert head(0, 0).label == "0.0"
