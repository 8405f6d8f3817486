import re
from collections import Counter

import numpy as np
import pytest

from toolmem.data.hashing import uniform
from toolmem.data.people import (
    ATTRIBUTES,
    MAX_PEOPLE,
    MAX_PEOPLE_WITH_UNSEEN,
    MAX_UNSEEN,
    Population,
    make_population,
    schema,
    unseen_population,
    words,
)
from toolmem.errors import ToolmemError

DATE = re.compile(r"(\d{1,2}) ([A-Z][a-z]+) (\d{4})")


def parts(population: Population) -> tuple[set[str], set[str]]:
    first, last = zip(*(name.split(" ") for name in population.names), strict=True)
    return set(first), set(last)


def test_word_lists_have_the_published_sizes_and_nothing_that_could_trip_a_query():
    sizes = {
        "first_names": 437,
        "last_names": 388,
        "countries": 7,
        "cities": 213,
        "occupations": 100,
    }
    for name, size in sizes.items():
        entries = words(name)
        assert len(entries) == len(set(entries)) == size
        assert all(re.fullmatch(r"[A-Za-z]+( [A-Za-z]+)*", word) for word in entries)
    assert not set(words("first_names")) & set(words("last_names"))
    for name in ("cities", "occupations", "countries"):
        # no value is the tail of another, so an answer never ends with a wrong one
        assert not [(a, b) for a in words(name) for b in words(name) if a.endswith(" " + b)]


def test_birth_dates_are_those_of_the_study():
    dates = schema()["birth_date"]
    assert len(dates) == len(set(dates)) == 28 * 12 * 51
    found = [DATE.fullmatch(date).groups() for date in dates]
    assert {int(day) for day, _, _ in found} == set(range(1, 29))
    assert len({month for _, month, _ in found}) == 12
    assert {int(year) for _, _, year in found} == set(range(1950, 2001))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_smaller_population_is_a_prefix(alpha):
    large = make_population(2000, seed=3, alpha=alpha, relations=True)
    for n in (2, 65, 1999):
        assert make_population(n, seed=3, alpha=alpha, relations=True) == large.head(n)


def test_prefix_holds_where_the_names_set_aside_begin_to_be_used():
    large = make_population(MAX_PEOPLE)
    assert len(set(large.names)) == MAX_PEOPLE == 169_556
    edge = make_population(MAX_PEOPLE_WITH_UNSEEN + 1)
    assert edge.names == large.names[: len(edge)]
    assert edge.attributes["occupation"] == large.attributes["occupation"][: len(edge)]
    assert len(parts(edge.head(MAX_PEOPLE_WITH_UNSEEN))[0]) == 437 - 44


def test_the_first_people_never_change():
    """Frozen: checkpoints and published figures rest on it."""
    population = make_population(4096)
    assert population.names[:3] == ["Adriana Barber", "Luis Sims", "Debra Hale"]
    assert population.fingerprint().startswith("c238c73ed75682e7")
    assert make_population(4096, seed=1).fingerprint() != population.fingerprint()


def test_most_names_of_the_lists_are_in_use_at_4096():
    first, last = parts(make_population(4096))
    assert len(first) > 390 and len(last) > 345


def test_values_are_uniform_at_alpha_one():
    population = make_population(20_000, seed=5)
    for attribute in ATTRIBUTES[1:]:
        values = schema()[attribute]
        counts = Counter(population.attributes[attribute])
        expected = len(population) / len(values)
        chi = sum((counts[value] - expected) ** 2 / expected for value in values)
        degrees = len(values) - 1
        assert abs(chi - degrees) < 5 * (2 * degrees) ** 0.5


def test_attributes_are_independent_of_each_other_at_alpha_one():
    population = make_population(20_000)
    pairs = Counter(
        zip(
            population.attributes["birth_place"],
            population.attributes["occupation"],
            strict=True,
        )
    )
    expected = 20_000 / 700
    chi = sum((count - expected) ** 2 / expected for count in pairs.values())
    assert len(pairs) == 700 and abs(chi - 699) < 5 * (2 * 699) ** 0.5


def test_at_alpha_zero_a_last_name_has_one_value():
    population = make_population(5000, alpha=0.0)
    for values in population.attributes.values():
        pairs = {(n.split()[1], v) for n, v in zip(population.names, values, strict=True)}
        assert len(pairs) == len(parts(population)[1])


def test_alpha_is_the_probability_of_a_value_of_ones_own():
    family, mixed = (make_population(20_000, alpha=alpha) for alpha in (0.0, 0.25))
    for attribute in ATTRIBUTES:
        pairs = zip(family.attributes[attribute], mixed.attributes[attribute], strict=True)
        own = np.mean([a != b for a, b in pairs])
        expected = 0.25 * (1 - 1 / len(schema()[attribute]))
        assert abs(own - expected) < 5 * (0.25 * 0.75 / 20_000) ** 0.5


def test_friends_are_other_people_of_every_prefix():
    population = make_population(500, relations=True)
    friends = [population.index[name] for name in population.attributes["friend"]]
    assert friends[0] == 1
    assert all(0 < row - friend <= 64 for row, friend in enumerate(friends) if row)
    assert len(set(friends)) > 250
    assert "friend" not in make_population(5).attributes


@pytest.mark.parametrize("n", [1, 64, 4096, 131_072, MAX_PEOPLE_WITH_UNSEEN])
def test_unseen_people_share_no_name_with_training(n):
    known = make_population(n, seed=7)
    unseen = unseen_population(MAX_UNSEEN, training=known)
    assert len(set(unseen.names)) == MAX_UNSEEN == 1716
    for mine, theirs in zip(parts(unseen), parts(known), strict=True):
        assert not mine & theirs
    assert unseen.head(100) == unseen_population(100, training=n, seed=7)


def test_unseen_people_take_over_alpha_and_relations():
    unseen = unseen_population(50, training=make_population(100, alpha=0.0, relations=True))
    places = {
        (name.split()[1], place)
        for name, place in zip(unseen.names, unseen.attributes["birth_place"], strict=True)
    }
    assert len(places) == len(parts(unseen)[1])
    assert set(unseen.attributes["friend"]) <= set(unseen.names)


def test_unseen_people_beside_a_table():
    names = ["Aaron Acosta", "ann-marie  adams", "Ärzte Überall", "Abigail Zeta"]
    table = Population(
        names, {"job": ["a", "b", "b", "b"], "boss": [names[1], names[0], names[0], names[0]]}
    )
    unseen = unseen_population(3000, training=table, seed=1)
    first, last = parts(unseen)
    assert not {"Aaron", "Abigail"} & first and not {"Acosta", "Adams"} & last
    assert 0.6 < Counter(unseen.attributes["job"])["b"] / 3000 < 0.9
    assert set(unseen.attributes["boss"]) <= set(unseen.names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_population(0), "people: 0"),
        (lambda: make_population(MAX_PEOPLE + 1), "169,556"),
        (lambda: make_population(5, alpha=1.5), "alpha: 1.5"),
        (lambda: make_population(5, alpha=float("nan")), "alpha"),
        (lambda: make_population(1, relations=True), "friend"),
        (lambda: unseen_population(0, training=5), "unseen_people: 0"),
        (lambda: unseen_population(MAX_UNSEEN + 1, training=5), "1,716"),
        (lambda: unseen_population(1, training=MAX_PEOPLE_WITH_UNSEEN + 1), "137,157"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ToolmemError, match=re.escape(message)):
        make()


def test_fingerprint_is_of_the_contents_alone():
    one = Population(["A B", "C D"], {"x": ["1", "2"]}, source="here")
    assert one.fingerprint() == Population(["A B", "C D"], {"x": ["1", "2"]}, seed=4).fingerprint()
    others = [
        Population(["A B", "C D"], {"x": ["1", "3"]}),
        Population(["C D", "A B"], {"x": ["2", "1"]}),
        Population(["A B", "C D"], {"y": ["1", "2"]}),
        Population(["A B"], {"x": ["1"]}),
    ]
    assert len({one.fingerprint(), *(other.fingerprint() for other in others)}) == 5


def test_hashed_numbers_equal_splitmix64_written_plainly():
    import hashlib

    mask = (1 << 64) - 1
    start = int.from_bytes(hashlib.sha256(b"9/here").digest()[:8], "little")
    for index, value in zip(
        (0, 5, 169_555), uniform(9, "here", np.array([0, 5, 169_555])), strict=True
    ):
        x = (start + (index + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        assert value == ((x ^ (x >> 31)) >> 11) / 2**53
