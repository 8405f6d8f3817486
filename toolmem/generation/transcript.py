"""A dialogue's tokens as text, while they come: whole characters, by turns, cut where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from toolmem.data.turn_format import NO_TOKEN, turn_format
from toolmem.generation.turns import DATABASE

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"


class Piece(NamedTuple):
    """Some new text.

    Args:
        role: assistant or database.
        text: of it; "" where a turn ended without more text.
        ends: the turn is over.
        calls: it was a tool call.
    """

    role: str
    text: str
    ends: bool = False
    calls: bool = False


@dataclass
class Turn:
    """One turn that followed the prompt.

    Args:
        role: assistant or database.
        text: whole characters so far, without a stop text.
        tokens: its ids, without role tokens.
        log_probs: of each; None where a tool spoke.
        shown: how many of the tokens the text is made of; those of a stop text are not.
        calls: it ended in a tool call.
    """

    role: str
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float | None] = field(default_factory=list)
    shown: int = 0
    calls: bool = False


class Transcript:
    """Turns token by token.

    Text is handed out as soon as it cannot change: a character's bytes may come one by one, and what
    could be the beginning of a stop text waits.

    Args:
        tokenizer: of the model.
        stop: texts at which an assistant's turn is cut.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.turns: list[Turn] = []
        self.sampled = 0
        self._form = turn_format(tokenizer)
        self._around = self._form.answered
        self._marks = 0  # forced tokens to come that are no text
        self._begin("assistant")

    def _begin(self, role: str) -> None:
        self.turns.append(Turn(role))
        self._start = self._read = (
            0  # tokens whose text is known, and the last that were handed out
        )
        self._held = ""
        self._cut = False

    def add(self, token: int, role: int, log_prob: float | None) -> list[Piece]:
        """Take one token.

        Args:
            token: its id.
            role: its role code.
            log_prob: the model's; None for a token that was forced.

        Returns:
            what can be shown now.
        """
        turn = self.turns[-1]
        if role != DATABASE:
            self.sampled += 1
            if token == self._form.call or (token == self._form.end and self._asks(turn)):
                turn.calls = True
                self._marks = self._around.before
                return [self._end(turn)]
            if token == self._form.end:
                return []
        elif self._marks:
            self._marks -= 1
            return []
        elif turn.role == "assistant":
            self._begin("database")
            turn = self.turns[-1]
        waits = role == DATABASE and self._around.trailing
        if role == DATABASE and token == self._around.guard:
            if waits:
                del turn.tokens[-waits:], turn.log_probs[-waits:]
            piece = self._end(turn)
            self._begin("assistant")
            self._marks = self._around.after
            return [piece]
        turn.tokens.append(token)
        turn.log_probs.append(log_prob if role != DATABASE else None)
        text = "" if waits else self._show(turn, self._grown(turn))
        return [Piece(turn.role, text)] if text else []

    def _asks(self, turn: Turn) -> bool:
        """Whether a turn that is over is a call by its text."""
        if self._form.call != NO_TOKEN:
            return False
        return self._form.query(self.tokenizer.decode(turn.tokens)) is not None

    def finish(self) -> Piece:
        """The dialogue is over: what had to wait, of the last turn."""
        turn = self.turns[-1]
        if turn.calls:  # handed out already, with its end
            return Piece(turn.role, "", ends=True, calls=True)
        return self._end(turn)

    def _grown(self, turn: Turn) -> str:
        """The text that the last tokens added, "" while a character is not whole.

        Decoded beside the tokens before it, since a token's text may depend on them.
        """
        before = self.tokenizer.decode(turn.tokens[self._start : self._read])
        text = self.tokenizer.decode(turn.tokens[self._start :])
        if len(text) <= len(before) or text.endswith(BROKEN):
            return ""
        self._start, self._read = self._read, len(turn.tokens)
        return text[len(before) :]

    def _show(self, turn: Turn, new: str) -> str:
        """Add text to the turn, but for what might begin a stop text."""
        if self._cut:
            return ""
        text = self._held + new
        self._held = ""
        if turn.role == "assistant" and self.stop:
            found = [at for at in map(text.find, self.stop) if at >= 0]
            if found:
                self._cut = True
                text = text[: min(found)]
            else:
                keep = max(_overlap(text, stop) for stop in self.stop)
                text, self._held = text[: len(text) - keep], text[len(text) - keep :]
        if text:
            turn.text += text
            turn.shown = len(turn.tokens)
        return text

    def _end(self, turn: Turn) -> Piece:
        """Hand out the rest of a turn."""
        before = self.tokenizer.decode(turn.tokens[self._start : self._read])
        text = self.tokenizer.decode(turn.tokens[self._start :])
        shown = self._show(turn, text[len(before) :])
        if not self._cut and self._held:
            turn.text += self._held
            turn.shown = len(turn.tokens)
            shown += self._held
        return Piece(turn.role, shown, ends=True, calls=turn.calls)


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of ``text`` may begin ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
