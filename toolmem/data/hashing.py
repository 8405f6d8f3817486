"""Random numbers by hashing an index: any prefix stays the same, on every machine and version."""

from __future__ import annotations

import hashlib

import numpy as np


def uniform(seed: int, purpose: str, index: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each index: splitmix64 keyed by seed and purpose.

    Args:
        seed: any integer.
        purpose: what the numbers are for; different purposes are independent.
        index: integers of any shape.

    Returns:
        float64, the shape of ``index``.
    """
    key = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    start = np.uint64(int.from_bytes(key[:8], "little"))
    x = start + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def choice(seed: int, purpose: str, index: np.ndarray, n: int) -> np.ndarray:
    """Uniform integers in [0, n), int64, one for each index."""
    return (uniform(seed, purpose, index) * n).astype(np.int64)


def shuffled(seed: int, purpose: str, values: np.ndarray) -> np.ndarray:
    """The integers ``values`` (n,) in random order, each sorted by a hash of itself."""
    return values[np.argsort(uniform(seed, purpose, values), kind="stable")]
