"""A dialogue's tokens as turns of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolmem.data.turn_format import ASSISTANT, DATABASE, NONE, USER, turn_format

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

__all__ = ["ASSISTANT", "DATABASE", "NONE", "USER", "split_turns"]


def split_turns(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(role, text) of each turn.

    Args:
        tokens: a dialogue, finished or not.
        tokenizer: has a form for dialogues.
    """
    form = turn_format(tokenizer)
    spans, end = form.spans(tokens), form.end
    turns = [(span.role, tokens[span.start : span.stop]) for span in spans]
    return [(role, tokenizer.decode([i for i in ids if i != end])) for role, ids in turns]
