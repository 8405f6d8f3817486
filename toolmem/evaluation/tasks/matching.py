"""Whether what a model said is an answer, both normalised as TriviaQA's script does (arXiv 1705.03551)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
MARKS = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(MARKS)).split())


def matches(said: str, answers: Sequence[str]) -> dict[str, float]:
    """How well a text gives one of several answers.

    Args:
        said: by the model.
        answers: any of which is right.

    Returns:
        ``exact_match`` (it is one), ``contains`` (it has one in it, as whole words), both 0 or 1, and
        ``f1`` (of words, of the nearest answer).
    """
    said = normalized(said)
    wanted = [normalized(answer) for answer in answers]
    return {
        "exact_match": float(said in wanted),
        "contains": float(any(f" {answer} " in f" {said} " for answer in wanted if answer)),
        "f1": max((_f1(said.split(), answer.split()) for answer in wanted), default=0.0),
    }


def _f1(said: list[str], answer: list[str]) -> float:
    if not said or not answer:
        return float(said == answer)
    shared = sum((Counter(said) & Counter(answer)).values())
    return 2 * shared / (len(said) + len(answer))


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of some texts that end it."""
    places = [place for place in map(text.find, stop) if place >= 0]
    return text[: min(places)] if places else text
