"""Amounts as people write them."""

from __future__ import annotations

import re

from toolmem.errors import ToolmemError

UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_of(text: str, key: str) -> float:
    """``32GB`` as a number of bytes.

    Args:
        text: a number and a unit.
        key: what it was given for, for messages.

    Raises:
        ToolmemError: for what is no amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise ToolmemError(f"{key} is {text!r}: say it as 32GB or 80GiB")
    return float(match[1]) * UNITS[match[2].upper()]
