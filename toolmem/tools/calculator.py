"""The calculator: ``CALCULATE 1987 - 1950``, exact, and never Python's ``eval``."""

from __future__ import annotations

import ast
import math
import re
import time
import warnings
from fractions import Fraction

from toolmem.tools.base import Answer, error_answer

QUERY = re.compile(r"\s*CALCULATE\b(.*)", re.DOTALL | re.IGNORECASE)
# Digits, points, operators, parentheses, blanks: no letters, so no names, no 1e999, no 0x, no 1_0.
ALLOWED = re.compile(r"[0-9.+\-*/%() \t]+")
MAX_BITS = 1024  # of any number on the way
DECIMALS = 10


class CalculationError(ValueError):
    """What is wrong with an expression, in words that a model can read."""


class Calculator:
    """Exact arithmetic: + - * / // % ** and parentheses over integers and decimals.

    Fractions are kept exact; a result that is not whole is rounded half to even at 10 decimals and
    written without trailing zeros.

    Args:
        max_chars: longest expression.
    """

    name = "calculator"

    def __init__(self, max_chars: int = 200) -> None:
        self.max_chars = max_chars

    def accepts(self, query: str) -> bool:
        """Whether the query's first word is CALCULATE."""
        return QUERY.match(query) is not None

    def answer(self, query: str) -> Answer:
        """Answer one query; an expression that cannot be computed is an error answer."""
        start = time.perf_counter()
        match = QUERY.match(query)
        try:
            if match is None:
                raise CalculationError("write CALCULATE and an expression, as in CALCULATE 2 + 2")
            value = evaluate(match.group(1), max_chars=self.max_chars)
            return Answer(format_number(value), False, time.perf_counter() - start)
        except CalculationError as error:
            return error_answer(str(error), time.perf_counter() - start)

    def answer_now(self, queries: list[str]) -> list[Answer | None]:
        """Every answer takes microseconds."""
        return [self.answer(query) for query in queries]

    async def call(self, query: str) -> Answer:
        """Answer one query."""
        return self.answer(query)

    def close(self) -> None:
        """Nothing is held."""


def evaluate(expression: str, *, max_chars: int = 200) -> Fraction:
    """The exact value of an arithmetic expression.

    Raises:
        CalculationError: for anything that is not plain arithmetic of bounded size.
    """
    expression = expression.strip()
    if not expression:
        raise CalculationError("the expression is empty")
    if len(expression) > max_chars:
        raise CalculationError(f"the expression is longer than {max_chars} characters")
    if not ALLOWED.fullmatch(expression):
        raise CalculationError("only numbers, + - * / // % ** and parentheses can be calculated")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(expression, mode="eval")
        return _value(tree.body, expression)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        if isinstance(error, CalculationError):
            raise
        raise CalculationError("the expression cannot be read") from error


def format_number(value: Fraction) -> str:
    """``value`` as an integer, or as a decimal of at most 10 places without trailing zeros."""
    if value.denominator == 1:
        return str(value.numerator)
    scaled = round(value * 10**DECIMALS)  # half to even
    whole, rest = divmod(abs(scaled), 10**DECIMALS)
    digits = f"{rest:0{DECIMALS}d}".rstrip("0")
    return ("-" if scaled < 0 else "") + str(whole) + (f".{digits}" if digits else "")


def _value(node: ast.expr, source: str) -> Fraction:
    if isinstance(node, ast.Constant):
        # From the source's own digits: as a float, 0.1 would no longer be a tenth.
        return _bounded(Fraction(ast.get_source_segment(source, node) or ""))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, source)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, source), _value(node.right, source)
        return _bounded(_apply(node.op, left, right))
    raise CalculationError("only numbers, + - * / // % ** and parentheses can be calculated")


def _apply(operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    if isinstance(operator, (ast.Div, ast.FloorDiv, ast.Mod)) and right == 0:
        raise CalculationError("division by zero")
    match operator:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
        case ast.FloorDiv():
            return Fraction(math.floor(left / right))
        case ast.Mod():
            return left % right
        case ast.Pow():
            return _power(left, right)
    raise CalculationError("only + - * / // % ** can be calculated")


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise CalculationError("exponents must be whole numbers")
    if base == 0 and exponent < 0:
        raise CalculationError("division by zero")
    if abs(base) not in (0, 1) and abs(exponent) * _bits(base) > MAX_BITS:
        raise CalculationError("the number is too large")
    if abs(base) in (0, 1):  # the exponent's size does not matter, only whether it is odd or zero
        exponent = Fraction(0) if exponent == 0 else Fraction(2 - exponent.numerator % 2)
    return base**exponent.numerator


def _bits(value: Fraction) -> int:
    return max(value.numerator.bit_length(), value.denominator.bit_length()) - 1 or 1


def _bounded(value: Fraction) -> Fraction:
    if _bits(value) > MAX_BITS:
        raise CalculationError("the number is too large")
    return value
