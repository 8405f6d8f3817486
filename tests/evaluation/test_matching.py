"""Answers in words, against the harness's own metric and by hand."""

from __future__ import annotations

import pytest

from toolmem.evaluation.tasks.matching import cut, matches, normalized


@pytest.mark.parametrize(
    ("said", "answers", "exact", "contains", "f1"),
    [
        ("The Sun.", ["sun"], 1, 1, 1.0),
        ("It is the sun", ["Sun"], 0, 1, 0.5),
        ("sunlight", ["sun"], 0, 0, 0.0),
        ("O'Neil", ["o neil", "x"], 1, 1, 1.0),
        ("", ["the"], 1, 0, 1.0),
        ("", ["sun"], 0, 0, 0.0),
        ("New York City", ["york new", "x"], 0, 0, 0.8),
        ("Zo\u00eb", ["zo\u00cb"], 1, 1, 1.0),
    ],
)
def test_matches(said, answers, exact, contains, f1):
    found = matches(said, answers)
    assert found == {"exact_match": exact, "contains": contains, "f1": pytest.approx(f1)}


def test_normalized_as_triviaqas_script_does():
    """Its own order: lower, marks to spaces, articles out, white space."""
    assert normalized("  The  U.S.A. and an Apple-tree, a\tb ") == "u s and apple tree b"


def test_cut():
    assert cut("ab. c\nd", ["\n", "."]) == "ab"
    assert cut("abc", ["x"]) == "abc"
