"""A dialogue's tokens as turns of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

NONE, USER, ASSISTANT, DATABASE = 0, 1, 2, 3  # role codes


def split_turns(tokens: Sequence[int], tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(role, text) of each turn; a turn begins where its role token stands.

    Args:
        tokens: a dialogue, finished or not.
        tokenizer: has the role tokens.
    """
    speakers = {tokenizer.role_ids[role]: role for role in ("user", "assistant", "database")}
    end = tokenizer.role_ids["end"]
    turns: list[tuple[str, list[int]]] = []
    for token in tokens:
        if token in speakers:
            turns.append((speakers[token], []))
        elif token != end and turns:
            turns[-1][1].append(token)
    return [(role, tokenizer.decode(ids)) for role, ids in turns]
