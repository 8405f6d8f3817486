"""What the tests of models share."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _compiles_as_if_alone():
    """Each test compiles as in a process of its own.

    torch counts how often the same code was compiled, over all models of a process, and gives up at 8.
    """
    yield
    if (dynamo := sys.modules.get("torch._dynamo")) is not None:
        dynamo.reset()
