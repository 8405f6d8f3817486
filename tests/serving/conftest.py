"""Servers of tiny models, and clients of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

pytest.importorskip("starlette", reason="the extra serve is not installed: no server to test")


@pytest.fixture
def engine():
    """Make engines; each is closed at the end."""
    from toolmem.generation.engine import Engine

    made = []

    def make(*args, **options):
        made.append(Engine(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def in_tool(engine):
    """A server of a model that asks the calculator: its address and its service."""
    from serving_toys import IN_TOOL, TOKENIZER, calculator, reciter, serving

    toolbox = calculator()
    with serving(engine(reciter(IN_TOOL), TOKENIZER, toolbox), toolbox=toolbox) as served:
        yield served
    toolbox.close()


@pytest.fixture
def client(in_tool):
    """OpenAI's own client of that server."""
    from openai import OpenAI

    with OpenAI(base_url=f"{in_tool[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
