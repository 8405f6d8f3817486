"""Dialogues as rows of tokens, with the positions that matter: names, answers, and where they came from.

Shapes: b batch, s seq.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolmem.data.text.dialog_tokens import foreign_spans
from toolmem.data.text.token_table import ASSISTANT, encode_dialogue
from toolmem.data.turn_format import OVER, START, turn_format

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer


class Copy(NamedTuple):
    """Tokens that the assistant writes and that stand in the dialogue before.

    Args:
        what: ``name in query``, ``name`` (in the last turn) or ``answer``.
        target: positions of the tokens written.
        sources: of each earlier occurrence, the positions of the same tokens.
    """

    what: str
    target: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Told:
    """One expected dialogue as the model reads it.

    Args:
        dialogue: what is said.
        tokens: (s,) int64.
        roles: (s,) uint8, who wrote each (``toolmem.data.text.token_table``).
        copies: what the assistant copies.
        answer: positions of the answer's tokens in the last turn.
        places: positions by name: ``end of name`` (in the question), ``end of question`` (the token after
            which the assistant begins), ``end of result`` (the database's last token, where it speaks),
            ``before answer``.
    """

    dialogue: Dialogue
    tokens: Tensor
    roles: Tensor
    copies: tuple[Copy, ...]
    answer: tuple[int, ...]
    places: dict[str, int]

    @cached_property
    def query(self) -> tuple[int, ...]:
        """Positions of what the assistant writes before the database speaks, its call among them."""
        written = torch.nonzero(self.roles == ASSISTANT).flatten().tolist()
        rest = [i for i in written if i > self.places["end of question"]]
        if "end of result" not in self.places:
            return ()
        return tuple(i for i in rest if i < self.places["end of result"])


class Rows(NamedTuple):
    """Dialogues side by side, padded on the right.

    Args:
        tokens: (b, s) int64.
        spans: (b, s) int64, of what the model did not write (``LanguageModel.hidden``).
        real: (b, s) bool, False at padding.
    """

    tokens: Tensor
    spans: Tensor
    real: Tensor


def tell(dialogue: Dialogue, tokenizer: Tokenizer) -> Told:
    """A dialogue with its positions.

    Args:
        dialogue: what is said.
        tokenizer: the model's, with role tokens.
    """
    tokens, roles = encode_dialogue(dialogue, tokenizer)
    turns = _turns(tokens, dialogue, tokenizer)
    last = len(dialogue.turns) - 1
    copies = []
    for turn in range(1, last + 1):
        if dialogue.turns[turn].role != "assistant":
            continue
        name = "name" if turn == last else "name in query"
        for what, text in ((name, dialogue.person), ("answer", dialogue.answer)):
            target = _find(turns[turn], text, from_end=what == "answer")
            sources = [_find(earlier, text) for earlier in turns[:turn]]
            aligned = [s for s in sources if s and _same(tokens, s, target)]
            if target and aligned:
                copies.append(Copy(what, target, tuple(aligned)))
    answer = _find(turns[last], dialogue.answer, from_end=True)
    places = {"end of question": turns[1].first - 1}
    if asked := _find(turns[0], dialogue.person):
        places = {"end of name": asked[-1], **places}
    results = [t for t, turn in enumerate(dialogue.turns) if turn.role == "database"]
    if results:
        back = turn_format(tokenizer).marks("database", "assistant")
        places["end of result"] = turns[results[-1] + 1].first - len(back) - 1
    if answer:
        places["before answer"] = answer[0] - 1
    return Told(
        dialogue, torch.from_numpy(tokens), torch.from_numpy(roles), tuple(copies), answer, places
    )


class _Turn(NamedTuple):
    """A turn: its text in UTF-8, the position of its first token, and where in the text each ends."""

    text: bytes
    first: int
    ends: list[int]


def _turns(tokens: np.ndarray, dialogue: Dialogue, tokenizer: Tokenizer) -> list[_Turn]:
    form = turn_format(tokenizer)
    found, at, before = [], 0, START
    following = [turn.role for turn in dialogue.turns[1:]] + [OVER]
    for turn, after in zip(dialogue.turns, following, strict=True):
        at += len(form.marks(before, turn.role))
        text = form.written(turn.text, turn.role == "assistant" and after == "database")
        n = len(tokenizer.encode(text))
        sizes = [len(tokenizer.decode_bytes([int(t)])) for t in tokens[at : at + n]]
        found.append(_Turn(text.encode(), at, np.cumsum(sizes).tolist()))
        at, before = at + n, turn.role
    return found


def _find(turn: _Turn, text: str, from_end: bool = False) -> tuple[int, ...]:
    """Positions of the tokens that hold a text; none where the turn does not say it."""
    wanted = text.encode()
    start = turn.text.rfind(wanted) if from_end else turn.text.find(wanted)
    if start < 0 or not wanted or not turn.ends or turn.ends[-1] != len(turn.text):
        return ()
    stop = start + len(wanted)
    spans = pairwise([0, *turn.ends])
    return tuple(turn.first + i for i, (a, b) in enumerate(spans) if a < stop and b > start)


def _same(tokens: np.ndarray, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Are they the same tokens? (A tokenizer may cut a text in two ways.)"""
    return len(a) == len(b) and bool((tokens[list(a)] == tokens[list(b)]).all())


def side_by_side(
    told: Sequence[Told], device: torch.device | str | None = None, tokens: Tensor | None = None
) -> Rows:
    """Dialogues as rows.

    Args:
        told: at least one.
        device: where to put them.
        tokens: (b, s) int64, to take instead of their own; roles stay.
    """
    longest = max(len(one.tokens) for one in told)
    roles = np.full((len(told), longest), ASSISTANT, np.uint8)
    own = torch.zeros(len(told), longest, dtype=torch.int64)
    real = torch.zeros(len(told), longest, dtype=torch.bool)
    for row, one in enumerate(told):
        n = len(one.tokens)
        own[row, :n], real[row, :n] = one.tokens, True
        roles[row, :n] = one.roles.numpy()
    spans = foreign_spans(roles)
    rows = (own if tokens is None else tokens, spans.to(torch.int64), real)
    return Rows(*(x.to(device) for x in rows))


def kinds_of_copies(told: Iterable[Told]) -> list[str]:
    """What is copied in some dialogue, in the order of writing."""
    found = {copy.what for one in told for copy in one.copies}
    return [what for what in ("name in query", "name", "answer") if what in found]
