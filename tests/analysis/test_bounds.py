"""Bounds on paper, against numbers worked out by hand and by brute force."""

import math

import numpy as np
import pytest

from toolmem.analysis import bounds
from toolmem.errors import ToolmemError


def test_bits_of_people_and_the_parameters_that_hold_them():
    dates, countries, cities, jobs = 28 * 12 * 51, 7, 213, 100
    each = math.log2(dates * countries * cities * jobs)
    assert bounds.facts_bits(1) == pytest.approx(each)
    assert bounds.facts_bits(640) == pytest.approx(640 * each)
    assert bounds.facts_bits(640, alpha=0.0) < 640 * each / 2
    assert bounds.parameters_in_weight(640 * each) == pytest.approx(320 * each)
    assert bounds.people_held(320 * each) == pytest.approx(640)
    assert bounds.people_held(100, bits_per_parameter=8, bits_per_person=4) == 200
    with pytest.raises(ToolmemError, match="bits_per_parameter is 0"):
        bounds.parameters_in_weight(1.0, 0)


def test_the_share_of_a_sphere():
    """Half the circle's angle, Archimedes on the sphere, and draws in six dimensions."""
    assert bounds.cap_share(0.3, 2) == pytest.approx(0.3 / math.pi)
    assert bounds.cap_share(0.3, 3) == pytest.approx((1 - math.cos(0.3)) / 2, rel=1e-5)
    points = np.random.default_rng(0).normal(size=(200_000, 6))
    cosines = points[:, 0] / np.linalg.norm(points, axis=1)
    assert bounds.cap_share(1.2, 6) == pytest.approx((cosines > math.cos(1.2)).mean(), rel=0.02)
    with pytest.raises(ToolmemError, match="dim is 1"):
        bounds.cap_share(0.3, 1)


@pytest.mark.parametrize(("symbols", "dim"), [(6, 3), (8, 4), (40, 8), (5, 2)])
def test_no_directions_lie_wider_apart(symbols, dim):
    """Of many random sets and of the best ones known: an octahedron, a cross-polytope, a pentagon."""
    bound = bounds.widest_angle(symbols, dim)
    sets = np.random.default_rng(1).normal(size=(300, symbols, dim))
    if symbols == 2 * dim:
        sets[0] = np.concatenate([np.eye(dim), -np.eye(dim)])
    if dim == 2:
        turns = 2 * math.pi * np.arange(symbols) / symbols
        sets[0] = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    sets /= np.linalg.norm(sets, axis=2, keepdims=True)
    cosines = sets @ sets.transpose(0, 2, 1) - 2 * np.eye(symbols)
    widest = np.arccos(cosines.max(axis=(1, 2)).clip(-1, 1)).max()
    assert widest <= bound + 1e-9
    if dim == 2:
        assert bound == pytest.approx(widest)


def test_states_shorter_than_the_bound_cannot_tell_symbols_apart():
    """The best possible states for vectors on a circle: each symbol's own direction."""
    symbols, wanted = 12, 0.9
    norm = bounds.least_state_norm(symbols, 2, wanted)
    turns = 2 * math.pi * np.arange(symbols) / symbols
    vectors = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    directions = np.linspace(0, 2 * math.pi, 3601)
    states = norm * np.stack([np.cos(directions), np.sin(directions)], axis=1)
    logits = states @ vectors.T
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert chances.max(axis=0).min() < wanted
    assert bounds.least_state_norm(96, 8) < bounds.least_state_norm(96, 4) / 1.5
    with pytest.raises(ToolmemError, match="probability is 0"):
        bounds.least_state_norm(4, 2, 0.5)


@pytest.mark.parametrize(
    ("text", "target", "guesses"),
    [
        ("who is Anna Bo?", "Anna Bo", (True, False, False)),  # n is followed by n and by a
        ("where is Al Smith?", "Al Smith", (True, True, False)),  # " is", " Al"; "th" of "Smith"
        ("x y z", "y", (False, False, False)),
    ],
)
def test_where_copying_must_guess(text, target, guesses):
    assert bounds.must_guess(text, target, 1) is guesses[0]
    assert bounds.must_guess(text, target, 3) is guesses[2]


def test_copying_with_a_lookup_table_goes_wrong_just_where_it_is_said_to():
    """A copier that takes the first place it finds, brute force, fails only where it must guess."""
    from toolmem.data.people import make_population

    names = make_population(300).names
    pairs = [(f"Where was {name} born?", name) for name in names]
    for width in (1, 2, 3):
        for text, target in pairs:
            said = target[:width]
            while len(said) < len(target):
                said += text[text.find(said[-width:]) + width]
            if said != target:
                assert bounds.must_guess(text, target, width)
    shares = [bounds.share_that_must_guess(pairs, width) for width in (1, 2, 3)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9 and shares[2] < 0.2


def test_what_cannot_be_copied_is_refused():
    with pytest.raises(ToolmemError, match="does not hold 'Bo'"):
        bounds.must_guess("who is Anna?", "Bo", 1)
    with pytest.raises(ToolmemError, match="width is 0"):
        bounds.must_guess("who is Bo?", "Bo", 0)
    assert math.isnan(bounds.share_that_must_guess([], 1))


def test_word_lists():
    assert bounds.list_bits(["ab", "c", "c"], alphabet=4) == pytest.approx(5 * 2 - 1)
    draws = np.random.default_rng(2).integers(0, 30, size=(4000, 20))
    assert bounds.distinct_expected(20, 30) == pytest.approx(
        np.mean([len(set(row)) for row in draws]), rel=0.01
    )
    assert bounds.distinct_expected(3, 1) == 1.0
