from collections import Counter
from itertools import product
from math import comb, inf, isclose, log2

import numpy as np
import pytest

from toolmem.data.information import (
    attribute_bits,
    friend_bits,
    information_bits,
    log2_binomial,
)
from toolmem.data.people import Population, make_population, schema

SIZES = {"birth_date": 17_136, "birth_place": 7, "current_address": 213, "occupation": 100}


def brute_force(groups: str, values: str, alphabet: str, alpha: float) -> float:
    """-log2 of the probability, summed over every way the values can have come about."""
    total = 0.0
    names = sorted(set(groups))
    for fixed in product(alphabet, repeat=len(names)):  # the value of each last name
        chance = len(alphabet) ** -len(names)
        for group, value in zip(groups, values, strict=True):
            own = alpha / len(alphabet)
            chance *= own + (1 - alpha) * (value == fixed[names.index(group)])
        total += chance
    return -log2(total) if total else inf


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    ("groups", "values"), [("aaabb", "xxyzz"), ("aaabb", "xxxyy"), ("abc", "xyz"), ("aaaa", "xyzx")]
)
def test_code_length_equals_brute_force(alpha, groups, values):
    bits = attribute_bits(list(groups), list(values), 3, alpha)
    assert isclose(bits, brute_force(groups, values, "xyz", alpha), rel_tol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_probabilities_of_all_outcomes_sum_to_one(alpha):
    total = sum(
        2.0 ** -attribute_bits(list("aaab"), list(values), 3, alpha)
        for values in product("xyz", repeat=4)
    )
    assert isclose(total, 1.0)


def test_on_paper_at_alpha_one_every_person_counts():
    information = information_bits(make_population(1000))
    for attribute, size in SIZES.items():
        assert isclose(information.attributes[attribute], 1000 * log2(size))
    assert isclose(information.facts, 1000 * log2(17_136 * 7 * 213 * 100))
    # 14.065 + 2.807 + 7.735 + 6.644 bits a person
    assert abs(information.facts / 1000 - 31.2504) < 1e-3
    assert isclose(information.names, log2(comb(169_556, 1000)), rel_tol=1e-9)
    assert information.total == information.names + information.facts


def test_on_paper_at_alpha_zero_every_last_name_counts():
    population = make_population(1000, alpha=0.0)
    last_names = {name.split()[1] for name in population.names}
    information = information_bits(population)
    for attribute, size in SIZES.items():
        assert isclose(information.attributes[attribute], len(last_names) * log2(size))


def test_between_bits_grow_with_alpha_and_lie_near_the_expected_entropy():
    bits = [
        information_bits(make_population(4000, alpha=alpha)).attributes["current_address"]
        for alpha in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert bits == sorted(bits)
    # Large families: the fixed value is plain, and each person costs the entropy of own-or-fixed.
    population = make_population(100_000, alpha=0.5)
    size = SIZES["birth_place"]
    fixed = 0.5 / size + 0.5
    entropy = -fixed * log2(fixed) - (size - 1) * (0.5 / size) * log2(0.5 / size)
    found = information_bits(population).attributes["birth_place"]
    assert abs(found / len(population) - entropy) < 0.02


def test_impossible_values_cost_infinity():
    assert attribute_bits(["a", "a"], ["x", "y"], 3, 0.0) == inf


def test_a_table_is_coded_by_what_its_columns_show():
    table = Population(["A", "B", "C", "D"], {"x": ["1", "2", "1", "2"], "y": ["k"] * 4})
    information = information_bits(table)
    assert information.attributes == {"x": 4.0, "y": 0.0}
    assert information.names == 0.0


def test_friends_on_paper():
    assert friend_bits(1) == friend_bits(2) == 0.0
    assert isclose(friend_bits(4), log2(2) + log2(3))
    assert isclose(friend_bits(1000) - friend_bits(999), 6.0)
    population = make_population(300, relations=True)
    assert isclose(information_bits(population).attributes["friend"], friend_bits(300))


def test_binomial():
    assert isclose(log2_binomial(10, 3), log2(120))
    assert log2_binomial(10, 10) == 0.0


def test_schema_sizes_are_those_of_the_study():
    assert {key: len(values) for key, values in schema().items()} == SIZES
    counts = Counter(len(set(values)) for values in schema().values())
    assert np.array_equal(sorted(counts), sorted(SIZES.values()))
