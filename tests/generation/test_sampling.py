"""Samplers against their definitions, written plainly."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.errors import ToolmemError
from toolmem.generation import Greedy, Sampling
from toolmem.generation.processors import keep_top_k, keep_top_p
from toolmem.generation.sampling import draw, uniform_numbers

LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8, unique=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.integers(1, 10))
def test_top_k(logits, k):
    kept = keep_top_k(torch.tensor([logits]), k)[0]
    best = sorted(logits, reverse=True)[:k]
    assert [x for x in kept.tolist() if x > -math.inf] == [x for x in logits if x in best]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    total = sum(math.exp(x) for x in logits)
    nucleus, mass = set(), 0.0
    for index in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if mass >= p:
            break
        nucleus.add(index)
        mass += math.exp(logits[index]) / total
    if abs(mass - p) < 1e-5 or any(
        abs(sum(math.exp(x) / total for x in logits if x > y) - p) < 1e-5 for y in logits
    ):
        return  # too close to the border for float32
    kept = keep_top_p(torch.tensor([logits]), p)[0]
    assert {i for i, x in enumerate(kept.tolist()) if x > -math.inf} == nucleus


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution(logits, uniform):
    total = sum(math.exp(x) for x in logits)
    edges, mass = [], 0.0
    for x in logits:
        mass += math.exp(x) / total
        edges.append(mass)
    if min(abs(edge - uniform) for edge in edges) < 1e-6:
        return
    expected = sum(edge <= uniform for edge in edges)
    assert int(draw(torch.tensor([logits]), torch.tensor([uniform]))) == expected


def test_what_is_cut_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for uniform in (0.0, 0.2, 0.5, 1 - 2**-53):
        drawn = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
        assert drawn == (1 if uniform < 1 / (1 + math.e) else 3)


def test_frequencies_follow_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=2.0)(logits, uniform)
    expected = (logits[0] / 2).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn) / 20_000, expected, atol=0.015, rtol=0)


def test_narrowest_sampling_is_greedy():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1))
    for sampler in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)):
        assert torch.equal(sampler(logits, uniform), Greedy()(logits))


def test_uniform_numbers_depend_on_their_own_generator_only():
    def numbers(seeds):
        return uniform_numbers([torch.Generator().manual_seed(seed) for seed in seeds]).tolist()

    assert numbers([3, 4])[1] == numbers([4, 9, 3])[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_refusals(options, key):
    with pytest.raises(ToolmemError, match=key):
        Sampling(**options)
