r"""How many bits a population's facts hold: what a model that knows them all must have stored.

The length is that of an ideal code for the attributes, given what everybody knows: the names, the
values an attribute can take, and alpha. A person's attribute is uniform over V values with
probability alpha, else it is the one value fixed (uniformly, once) for the last name. For the n
people of one last name, of whom c_v have value v, the facts have probability

    p = sum_v 1/V * (alpha/V + 1 - alpha)^c_v * (alpha/V)^(n - c_v)

and cost -log2 p bits. At alpha 1 that is n log2 V: every person counts. At alpha 0 it is log2 V:
every last name counts once. Capacity is bits per parameter (arXiv 2404.05405, section 3).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import lgamma, log, log2

import numpy as np

from toolmem.data.people import (
    FRIEND_WINDOW,
    MAX_PEOPLE,
    RELATION,
    Population,
    schema,
)


@dataclass(frozen=True)
class Information:
    """Bits of a population.

    Args:
        attributes: attribute -> bits of all people's values, given their names.
        names: bits of which names there are: log2 of the number of sets of as many names out of all
            169,556; 0 for a table, whose names come from no known list.
    """

    attributes: dict[str, float]
    names: float

    @property
    def facts(self) -> float:
        """Bits of all facts, given the names."""
        return sum(self.attributes.values())

    @property
    def total(self) -> float:
        """Bits of names and facts."""
        return self.names + self.facts


def information_bits(population: Population) -> Information:
    """The exact code length of a population, given its schema.

    A synthetic population's schema is the word lists, its alpha, and how friends are drawn. A
    table's is what each column shows: its distinct values, taken as equally likely and independent.

    Args:
        population: the people.

    Returns:
        Bits by attribute, and of the names.
    """
    if population.alpha is None:
        return Information(
            {
                key: len(population) * log2(len(set(values)))
                for key, values in population.attributes.items()
            },
            0.0,
        )
    last_names = [name.rpartition(" ")[2] for name in population.names]
    bits = {}
    for key, values in population.attributes.items():
        if key == RELATION:
            bits[key] = friend_bits(len(population))
        else:
            bits[key] = attribute_bits(last_names, values, len(schema()[key]), population.alpha)
    return Information(bits, log2_binomial(MAX_PEOPLE, len(population)))


def attribute_bits(groups: list[str], values: list[str], n_values: int, alpha: float) -> float:
    """Code length of one attribute.

    Args:
        groups: each person's last name.
        values: each person's value.
        n_values: values that there are.
        alpha: probability that a value is the person's own.

    Returns:
        Bits; infinite when the values cannot have come about (alpha 0, and a last name's people
        differ).
    """
    sizes = Counter(groups)
    if alpha == 1.0:
        return len(groups) * log2(n_values)
    seen: dict[str, list[int]] = {}
    for (group, _), count in Counter(zip(groups, values, strict=True)).items():
        seen.setdefault(group, []).append(count)
    log_own = log(alpha / n_values) if alpha else -np.inf
    log_fixed = log(alpha / n_values + 1.0 - alpha)
    nats = 0.0
    for group, size in sizes.items():
        counts = np.array(seen[group])
        # the fixed value is one of those seen, or (equally good, each) one of those not seen
        others = size - counts
        own = np.multiply(others, log_own, out=np.zeros(len(counts)), where=others > 0)
        terms = [counts * log_fixed + own]
        if n_values > len(counts):
            terms.append(np.array([log(n_values - len(counts)) + size * log_own]))
        nats += log(n_values) - np.logaddexp.reduce(np.concatenate(terms))
    return float(nats / log(2))


def friend_bits(n: int) -> float:
    """Code length of the friends of ``n`` people: each is one of the (at most 64) people before."""
    return float(np.log2(np.minimum(np.arange(1, n), FRIEND_WINDOW)).sum()) if n > 1 else 0.0


def log2_binomial(n: int, k: int) -> float:
    """log2 of the number of ways to choose ``k`` of ``n``."""
    return (lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)) / log(2)
