"""The calculator is exact, bounded, and never runs code."""

import asyncio
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.tools import Calculator
from toolmem.tools.calculator import evaluate, format_number


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        ("1987 - 1950", "37"),
        ("1950 - 1987", "-37"),
        ("2 + 3 * 4", "14"),
        ("(2 + 3) * 4", "20"),
        ("-2 ** 2", "-4"),
        ("2 ** 3 ** 2", "512"),
        ("2 ** -2", "0.25"),
        ("(-1) ** 999999999999", "-1"),
        ("1 ** 999999999999", "1"),
        ("0 ** 0", "1"),
        ("7 // 2", "3"),
        ("-7 // 2", "-4"),
        ("-7 % 3", "2"),
        ("7.5 % 2", "1.5"),
        ("0.1 + 0.2", "0.3"),
        ("10 / 4", "2.5"),
        ("1 / 3", "0.3333333333"),
        ("2 / 3", "0.6666666667"),
        ("-2 / 3", "-0.6666666667"),
        ("1 / 3 * 3", "1"),
        ("123456789012345678901234567890 + 1", "123456789012345678901234567891"),
        (".5 + 2.", "2.5"),
        ("+ - + 4", "-4"),
        ("2 ** 1023 // 2 ** 1022", "2"),
    ],
)
def test_values(expression, text):
    answer = Calculator().answer(f"CALCULATE {expression}")
    assert (answer.text, answer.error) == (text, False)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("1 / 0", "division by zero"),
        ("1 % 0", "division by zero"),
        ("1 // (2 - 2)", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("9 ** 9 ** 9", "too large"),
        ("10 ** 400", "too large"),
        ("(1 / 3) ** 2000", "too large"),
        ("9" * 190 + " ** 5", "too large"),
        ("2 ** 0.5", "whole numbers"),
        ("", "empty"),
        ("1 +", "cannot be read"),
        ("(1", "cannot be read"),
        ("1 2", "cannot be read"),
        ("007", "cannot be read"),
        ("()", "only numbers"),
        ("1 * * 2", "cannot be read"),
        ("1.2.3", "cannot be read"),
        ("1e9", "only numbers"),
        ("1j", "only numbers"),
        ("0x10", "only numbers"),
        ("__import__('os').system('true')", "only numbers"),
        ("[1]*9", "only numbers"),
        ("1 if 1 else 2", "only numbers"),
        ("1, 2", "only numbers"),
        ("1 # 2", "only numbers"),
        ("1\n2", "only numbers"),
        ("١ + ٢", "only numbers"),
        ("(" * 95 + "1" + ")" * 95 + "+" * 5, "cannot be read"),
        ("1+" * 300 + "1", "longer than 200"),
    ],
)
def test_errors_are_answers(expression, words):
    start = time.perf_counter()
    answer = Calculator().answer(f"CALCULATE {expression}")
    assert time.perf_counter() - start < 0.5
    assert answer.error
    assert answer.text.startswith("error: ") and words in answer.text


def test_accepts_only_its_own_word():
    calculator = Calculator()
    assert calculator.accepts(" calculate 1")
    assert not calculator.accepts("CALCULATED 1")
    assert not calculator.accepts("FIND CALCULATE FOR Ann")
    assert calculator.answer("1 + 1").error
    assert asyncio.run(calculator.call("CALCULATE 1 + 1")).text == "2"


NUMBERS = st.integers(0, 10**6).map(str)


@st.composite
def expressions(draw):
    text = draw(NUMBERS)
    for operator in draw(st.lists(st.sampled_from(["+", "-", "*", "//", "%"]), max_size=6)):
        text = f"({text}) {operator} {draw(NUMBERS)}"
    return text


@given(expressions())
@settings(max_examples=150, deadline=None)
def test_whole_numbers_as_python_has_them(expression):
    try:
        expected = str(eval(expression))  # the reference here: arithmetic that this test wrote
    except ZeroDivisionError:
        expected = "error: division by zero"
    assert Calculator().answer(f"CALCULATE {expression}").text == expected


@given(st.text(alphabet="0123456789.+-*/%() \t", max_size=60))
@settings(max_examples=150, deadline=None)
def test_any_text_gets_an_answer(text):
    answer = Calculator().answer(f"CALCULATE {text}")
    assert answer.error == answer.text.startswith("error: ")


@given(st.fractions())
def test_a_decimal_is_the_nearest(value):
    assert abs(Fraction(format_number(value)) - value) <= Fraction(1, 2 * 10**10)


def test_evaluate_keeps_fractions():
    assert evaluate("1 / 3 + 1 / 6") == Fraction(1, 2)
