"""Dialogues by an engine that is made for them and closed behind them."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError
from toolmem.generation.engine import Engine
from toolmem.generation.reference import Generated
from toolmem.generation.requests import Event, Request
from toolmem.generation.sampling import Greedy, Sampler

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.base import Toolbox


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    toolbox: Toolbox | None = None,
    max_new_tokens: int = 128,
    max_tool_calls: int = 4,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 128,
    invariant: bool = False,
) -> list[Generated]:
    """Continue many dialogues by an engine of their own.

    Args:
        model: on any device; its mode is put back.
        tokenizer: has the role tokens.
        prompts: token ids of each, of any lengths, ending where the assistant begins to speak.
        toolbox: answers tool calls.
        max_new_tokens: tokens that the model may write in each dialogue.
        max_tool_calls: calls that it may make in each.
        sampler: ``Greedy()`` when None.
        seed: dialogue i samples by seed + i; or one seed a dialogue.
        batch_size: dialogues in a step.
        invariant: results do not hang on the batch, bit for bit.

    Returns:
        one dialogue a prompt, in order.

    Raises:
        ToolmemError: for a prompt that the model cannot take.
    """
    if batch_size < 1:
        raise ToolmemError(f"batch_size is {batch_size}: it must be at least 1")
    lanes = min(batch_size, max(1, len(prompts)))
    with Engine(model, tokenizer, toolbox, max_lanes=lanes, invariant=invariant) as engine:
        return engine.generate(
            prompts,
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_tool_calls=max_tool_calls,
            sampler=sampler or Greedy(),
        )


def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    toolbox: Toolbox | None = None,
    max_new_tokens: int = 128,
    max_tool_calls: int = 4,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> Generator[Event, None, Generated]:
    """Continue one dialogue and yield its new tokens as they come, a tool's answer all at once.

    Arguments as ``generate``; the generator's return value is the finished dialogue.
    """
    request = Request(
        prompt,
        max_new_tokens=max_new_tokens,
        max_tool_calls=max_tool_calls,
        sampler=sampler or Greedy(),
        seed=seed,
    )
    with Engine(model, tokenizer, toolbox, max_lanes=1) as engine:
        handle = engine.submit(request)
        yield from handle
        return handle.result()
