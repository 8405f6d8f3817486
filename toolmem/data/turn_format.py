"""How turns stand in a dialogue's tokens: what opens and ends each, and how the assistant asks a tool.

Two forms, behind one protocol:

- `RoleTokens`, of models trained here: one token a turn, ``<|user|>`` question ``<|assistant|>`` answer
  ``<|end|>``. The assistant calls a tool by writing ``<|database|>`` itself.
- `ChatFormat` (``chat_format.py``), of pretrained chat models: marks of several tokens, taken from the
  model's own chat template (``chat_template.py``). The assistant ends every turn by the same token, and a
  turn is a call where its text says so (``<tool_call>…</tool_call>``).

What the assistant does not write (a question, a tool's answer, the marks around them) is never for it to
learn: in both forms a mark belongs to whoever speaks before it, save that the assistant writes no more than
the first token of what follows its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from toolmem.errors import ToolmemError

NONE, USER, ASSISTANT, DATABASE = range(4)
ROLE_CODES = {"user": USER, "assistant": ASSISTANT, "database": DATABASE}
START, OVER = "", "end"  # what is before the first turn, and behind the last
NO_TOKEN = -1  # in place of a token id that there is none of
# who speaks -> who may speak after
ORDER = (
    (START, "user"), ("user", "assistant"), ("assistant", "user"), ("assistant", "database"),
    ("database", "assistant"),
)  # fmt: skip


class Span(NamedTuple):
    """One turn's text: the tokens from ``start`` to ``stop``."""

    role: str
    start: int
    stop: int


class Answered(NamedTuple):
    """What is forced around a tool's answer.

    Args:
        before: tokens between the call's end and the answer.
        trailing: tokens behind the answer before ``guard``.
        guard: the token that no text is encoded as, by which the answer is known to be over.
        after: tokens from there to where the assistant begins.
    """

    before: int
    trailing: int
    guard: int
    after: int


class TurnFormat(Protocol):
    """What every form tells.

    Args:
        end: the token by which the assistant ends its turn.
        call: the token by which it ends a turn that is a call; -1 where it is ``end``, and the turn's text
            says that it is one.
        reopens: a token that begins the assistant's turn anew when the assistant writes it; -1 for none.
        around_call: what is written before and behind a query.
    """

    @property
    def end(self) -> int: ...  # noqa: D102

    @property
    def call(self) -> int: ...  # noqa: D102

    @property
    def reopens(self) -> int: ...  # noqa: D102

    @property
    def around_call(self) -> tuple[str, str]: ...  # noqa: D102

    @property
    def answered(self) -> Answered:
        """What is forced around a tool's answer."""
        ...

    def marks(self, before: str, after: str) -> list[tuple[int, int]]:
        """The (token, role code) pairs between two turns.

        Args:
            before: who spoke; "" at a dialogue's start.
            after: who speaks; ``end`` where the dialogue is over.
        """
        ...

    def written(self, text: str, calls: bool) -> str:
        """A turn's text as it stands in the dialogue.

        Args:
            text: what is said, or the query.
            calls: it is an assistant's call of a tool.
        """
        ...

    def query(self, text: str) -> str | None:
        """What an assistant's turn asks a tool; None where its text says that it asks none."""
        ...

    def codes(self, tokens: Sequence[int]) -> list[int]:
        """Role code of each token."""
        ...

    def spans(self, tokens: Sequence[int]) -> list[Span]:
        """The turns of a dialogue, finished or not."""
        ...

    def turn_start(self, tokens: Sequence[int]) -> int:
        """Where the text of the assistant's last turn begins; 0 when it has none."""
        ...


def turn_format(tokenizer: Any) -> TurnFormat:
    """The form that a tokenizer's dialogues have.

    Raises:
        ToolmemError: where it has none, saying why.
    """
    found: TurnFormat | None = getattr(tokenizer, "turns", None)
    if found is not None:
        return found
    if not tokenizer.role_ids.keys() >= {*ROLE_CODES, OVER}:
        why = getattr(tokenizer, "without_turns", "") or "it has no role tokens"
        raise ToolmemError(f"dialogues cannot be written with this tokenizer: {why}")
    return RoleTokens(tokenizer.role_ids)


class RoleTokens:
    """One token a turn.

    Args:
        role_ids: role name -> id.
    """

    around_call = ("", "")

    def __init__(self, role_ids: Mapping[str, int]) -> None:
        self.role_ids = role_ids
        self.end = role_ids[OVER]
        self.call = role_ids["database"]
        self.reopens = role_ids["assistant"]
        self.answered = Answered(0, 0, self.reopens, 0)
        self._roles = {role_ids[role]: role for role in ROLE_CODES}
        self._speakers = {
            **{i: ROLE_CODES[role] for i, role in self._roles.items()},
            self.end: USER,
        }

    def marks(self, before: str, after: str) -> list[tuple[int, int]]:
        """After the assistant, a user's turn begins anew; else the one token, of who spoke."""
        if before == "assistant" and after == "user":
            return [(self.end, ASSISTANT), (self.role_ids["user"], USER)]
        return [(self.role_ids[after], ROLE_CODES.get(before, USER))]

    def written(self, text: str, calls: bool) -> str:
        """As it is: that it was a call tells the token behind it."""
        return text

    def query(self, text: str) -> str | None:
        """The whole turn."""
        return text

    def codes(self, tokens: Sequence[int]) -> list[int]:
        """A role token belongs to whoever speaks before it."""
        roles, speaker, speakers = [], USER, self._speakers
        for token in tokens:
            roles.append(speaker)
            speaker = speakers.get(token, speaker)
        return roles

    def spans(self, tokens: Sequence[int]) -> list[Span]:
        """A turn begins behind its role token; ``<|end|>`` is no part of any."""
        found: list[Span] = []
        role, start = "", 0
        for at, token in enumerate(tokens):
            if token in self._roles:
                if role:
                    found.append(Span(role, start, at))
                role, start = self._roles[token], at + 1
        if role:
            found.append(Span(role, start, len(tokens)))
        return found

    def turn_start(self, tokens: Sequence[int]) -> int:
        """Behind the last ``<|assistant|>``."""
        start = len(tokens)
        while start > 0 and tokens[start - 1] != self.reopens:
            start -= 1
        return start
