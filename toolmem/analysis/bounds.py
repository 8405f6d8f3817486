"""What can be said on paper of the parameters that in-weight and in-tool recall need.

In weight, the weights must hold the facts: at b bits of knowledge a parameter (2 were reached after 1,000
exposures by arXiv 2404.05405), bits / b parameters at least. In tool they hold none: what a query needs is
written in the question, and is copied. Copying looks up where the last symbols written stand in the
question, and goes on from there, so it must guess where they stand twice with different symbols after
them; and its states must tell the symbols apart, for which narrow ones must be long. ``docs/theory.md``
has the derivations.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from toolmem.data.information import information_bits
from toolmem.data.people import make_population
from toolmem.errors import ToolmemError


def facts_bits(people: int, alpha: float = 1.0, seed: int = 0) -> float:
    """Bits of the facts of a synthetic population, given its names.

    Args:
        people: how many.
        alpha: independence of their attributes.
        seed: of the population; matters below alpha 1.
    """
    return information_bits(make_population(people, seed=seed, alpha=alpha)).facts


def parameters_in_weight(bits: float, bits_per_parameter: float = 2.0) -> float:
    """The least number of parameters that hold so many bits.

    Args:
        bits: to be held.
        bits_per_parameter: that a parameter holds; no stored number holds more than its own width.

    Raises:
        ToolmemError: for a number of bits that is not positive.
    """
    if bits_per_parameter <= 0:
        raise ToolmemError(
            f"bits_per_parameter is {bits_per_parameter}: a parameter must hold more than 0 bits"
        )
    return bits / bits_per_parameter


def people_held(
    parameters: float, bits_per_parameter: float = 2.0, bits_per_person: float | None = None
) -> float:
    """How many people's facts so many parameters hold at most.

    Args:
        parameters: of the model.
        bits_per_parameter: that each holds.
        bits_per_person: of one person's facts; those of independent attributes when None.
    """
    each = facts_bits(1) if bits_per_person is None else bits_per_person
    return parameters * bits_per_parameter / each


def cap_share(angle: float, dim: int) -> float:
    """The share of a sphere in ``dim`` dimensions that is within an angle of one of its points.

    Args:
        angle: in radians, 0 to pi.
        dim: of the space around the sphere, 2 or more.

    Raises:
        ToolmemError: for fewer than two dimensions.
    """
    if dim < 2:
        raise ToolmemError(f"dim is {dim}: a sphere has an area from 2 dimensions on")
    whole = np.linspace(0.0, math.pi, 4097)
    part = np.linspace(0.0, angle, 4097)
    area, total = (np.trapezoid(np.sin(grid) ** (dim - 2), grid) for grid in (part, whole))
    return float(area / total)


def widest_angle(symbols: int, dim: int) -> float:
    """No more than this angle, in radians, can lie between every two of so many directions.

    Caps of half the angle around each would not overlap, so together they are no larger than the
    sphere. In two dimensions that is exact: 2 pi / symbols.

    Args:
        symbols: directions, 2 or more.
        dim: of the space, 2 or more.
    """
    if symbols < 2:
        raise ToolmemError(f"symbols is {symbols}: an angle lies between two of them")
    low, high = 0.0, math.pi
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if symbols * cap_share(middle / 2, dim) <= 1 else (low, middle)
    return low


def least_state_norm(symbols: int, dim: int, probability: float = 0.95) -> float:
    """How long states must be, at the least, to give every symbol this probability where it is right.

    Logits are the products of a state of norm s with unit vectors, one a symbol. Between some two of these
    lies no more than `widest_angle`, so their logits differ by no more than s times their distance,
    2 sin(angle / 2), and must differ by log(p / (1 - p)).

    Args:
        symbols: to be told apart.
        dim: width of the state.
        probability: of the right symbol, above one half.

    Raises:
        ToolmemError: for another probability.
    """
    if not 0.5 < probability < 1:
        raise ToolmemError(f"probability is {probability}: it must be above 0.5 and below 1")
    gap = math.log(probability / (1 - probability))
    return gap / (2 * math.sin(widest_angle(symbols, dim) / 2))


def must_guess(text: str, target: str, width: int) -> bool:
    """Whether copying ``target`` out of ``text`` by its last ``width`` symbols must guess somewhere.

    A head that copies looks for where the last symbols it wrote stand in the text, and says what follows them
    there. It must guess where they stand at two places or more that go on differently.

    Args:
        text: that holds the target, and all that may be looked at.
        target: what is to be copied; its first ``width`` symbols are given.
        width: symbols that are looked for: 1 by a previous-token head and one that copies; w - 1 by a
            short convolution of w taps under it.

    Raises:
        ToolmemError: for a target that the text does not hold.
    """
    if target not in text:
        raise ToolmemError(f"{text!r} does not hold {target!r}")
    if width < 1:
        raise ToolmemError(f"width is {width}: it must be 1 or more")
    for place in range(width, len(target)):
        context = target[place - width : place]
        follows = {
            text[end]
            for end in range(width, len(text))
            if text[end - width : end] == context
        }  # fmt: skip
        if len(follows) > 1:
            return True
    return False


def share_that_must_guess(pairs: Iterable[tuple[str, str]], width: int) -> float:
    """The share of (text, target) pairs whose target cannot be copied without a guess.

    Args:
        pairs: as of `must_guess`.
        width: symbols that are looked for.
    """
    found = [must_guess(text, target, width) for text, target in pairs]
    return sum(found) / len(found) if found else math.nan


def list_bits(words: Sequence[str], alphabet: int = 27) -> float:
    """Bits that surely suffice to hold a list of words: each letter and an end, none of them foreseen.

    Args:
        words: of the list; the order of a set of them is free, which is taken off.
        alphabet: letters that there are, with the end.
    """
    n = len(set(words))
    letters = sum(len(word) + 1 for word in set(words))
    return max(0.0, letters * math.log2(alphabet) - math.lgamma(n + 1) / math.log(2))


def distinct_expected(drawn: int, words: int) -> float:
    """How many different words so many draws with replacement give, on the mean.

    Args:
        drawn: draws, each word equally likely.
        words: there are.
    """
    return words * -math.expm1(drawn * math.log1p(-1 / words)) if words > 1 else float(drawn > 0)
