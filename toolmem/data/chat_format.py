"""Dialogues as a pretrained model's chat template has them: marks of several tokens between turns.

`chat_template.py` makes a `ChatFormat` of a template; a tokenizer keeps it in its spec.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from toolmem.data.turn_format import (
    ASSISTANT,
    NO_TOKEN,
    ORDER,
    OVER,
    ROLE_CODES,
    USER,
    Answered,
    Span,
)
from toolmem.errors import ToolmemError


@dataclass(frozen=True)
class CallForm:
    """How an assistant's turn says that it asks a tool.

    Args:
        prefix: what is written before a query.
        suffix: and behind it.
        opening: what tells a call, wherever it stands in a turn.
        closing: where it ends; "" for the end of the turn.
        escaped: the query is a string of JSON's, within a call that is an object.
    """

    prefix: str = "<tool_call>"
    suffix: str = "</tool_call>"
    opening: str = "<tool_call>"
    closing: str = "</tool_call>"
    escaped: bool = False

    def written(self, query: str) -> str:
        """A query as a call."""
        return f"{self.prefix}{self.escape(query)}{self.suffix}"

    def escape(self, text: str) -> str:
        """A query, or a part of one, as it stands in the call."""
        return json.dumps(text, ensure_ascii=False)[1:-1] if self.escaped else text

    def query(self, text: str) -> str | None:
        """The query of a turn; None where it is no call."""
        _, found, rest = text.partition(self.opening)
        if not found:
            return None
        inner = rest.partition(self.closing)[0] if self.closing else rest
        return _argument(inner) if self.escaped else inner.strip()


def _argument(text: str) -> str:
    """The one text among a JSON call's arguments; the call as it is where there is not one."""
    try:
        call = json.loads(text)
        values = list((call.get("arguments") or call.get("parameters")).values())
    except (ValueError, AttributeError, RecursionError):
        return text.strip()
    return values[0] if len(values) == 1 and isinstance(values[0], str) else text.strip()


class _Way(NamedTuple):
    """Marks between turns: who speaks after them, their tokens, and the place of their guard."""

    after: str
    ids: tuple[int, ...]
    guard: int


@dataclass(frozen=True)
class ChatFormat:
    """Turns with marks of several tokens.

    Args:
        between: for each of `ORDER` as ``"user>assistant"``, the tokens between the turns.
        guards: for each but the first, the place in them of a token that no text is encoded as; 0 after the
            assistant's turns.
        call_form: how a turn says that it asks a tool.
        decode: the tokenizer's; tells a tool's answer from a user's words where both open alike.
    """

    between: Mapping[str, tuple[int, ...]]
    guards: Mapping[str, int]
    call_form: CallForm = CallForm()
    decode: Callable[[Sequence[int]], str] | None = field(default=None, compare=False, repr=False)

    call = reopens = NO_TOKEN

    @classmethod
    def from_spec(
        cls, spec: Mapping[str, Any], decode: Callable[[Sequence[int]], str] | None = None
    ) -> ChatFormat:
        """What `spec` was made of.

        Raises:
            ToolmemError: for anything else.
        """
        try:
            between = {
                key: tuple(int(i) for i in spec["between"][key]) for key in map(">".join, ORDER)
            }
            guards = {key: int(spec["guards"][key]) for key in list(between)[1:]}
            places = (0 <= place < len(between[key]) for key, place in guards.items())
            if not all(between.values()) or not all(places):
                raise ValueError("turns without marks")
            form = CallForm(**spec["call_form"])
            texts = (form.prefix, form.suffix, form.opening, form.closing)
            if not all(isinstance(text, str) for text in texts) or not form.opening:
                raise ValueError("calls without marks")
            return cls(between, guards, form, decode)
        except (KeyError, TypeError, ValueError) as error:
            raise ToolmemError(
                f"a tokenizer's chat format cannot be read ({error!r}): the checkpoint was written by "
                "another version of toolmem"
            ) from error

    def spec(self) -> dict[str, Any]:
        """Plain data from which `from_spec` makes it again."""
        between = {key: list(ids) for key, ids in self.between.items()}
        return {
            "between": between,
            "guards": dict(self.guards),
            "call_form": asdict(self.call_form),
        }

    @cached_property
    def end(self) -> int:
        """The token by which the assistant ends its turn."""
        return self.between["assistant>user"][0]

    @property
    def around_call(self) -> tuple[str, str]:
        """What is written before and behind a query."""
        return self.call_form.prefix, self.call_form.suffix

    @cached_property
    def guarding(self) -> frozenset[int]:
        """Tokens that tell a turn's end: no text may be encoded as one."""
        return frozenset(self.between[key][place] for key, place in self.guards.items())

    @cached_property
    def answered(self) -> Answered:
        """What is forced around a tool's answer."""
        asked, back = self.between["assistant>database"], self.between["database>assistant"]
        place = self.guards["database>assistant"]
        return Answered(len(asked) - 1, place, back[place], len(back) - place - 1)

    @cached_property
    def _user(self) -> tuple[int, ...]:
        """What opens a user's turn, wherever it is."""
        first, later = self.between[">user"], self.between["assistant>user"]
        n = 0
        while n < min(len(first), len(later) - 1) and first[-1 - n] == later[-1 - n]:
            n += 1
        return first[len(first) - n :]

    @cached_property
    def _ways(self) -> dict[str, list[_Way]]:
        """Who speaks -> what may follow, the longest first."""
        ways: dict[str, list[_Way]] = {role: [] for role in ROLE_CODES}
        for before, after in ORDER[1:]:
            key = f"{before}>{after}"
            ways[before].append(_Way(after, self.between[key], self.guards[key]))
        return {role: sorted(each, key=lambda way: -len(way.ids)) for role, each in ways.items()}

    def marks(self, before: str, after: str) -> list[tuple[int, int]]:
        """All of them are of who spoke, but for the assistant: it writes the first alone."""
        if after == OVER:
            way = self._ways[before or "user"][0]
            return [(i, ROLE_CODES.get(before, USER)) for i in way.ids[: way.guard + 1]]
        try:
            ids = self.between[f"{before}>{after}"]
        except KeyError:
            raise ToolmemError(
                f"a dialogue in which {after} speaks after {before or 'nobody'} has no form in this model's "
                "chat template"
            ) from None
        if before == "assistant":
            return [(ids[0], ASSISTANT), *((i, ROLE_CODES[after]) for i in ids[1:])]
        return [(i, ROLE_CODES.get(before, USER)) for i in ids]

    def written(self, text: str, calls: bool) -> str:
        """A call stands between its marks."""
        return self.call_form.written(text) if calls else text

    def query(self, text: str) -> str | None:
        """What a turn asks a tool; None where it asks none."""
        return self.call_form.query(text)

    def codes(self, tokens: Sequence[int]) -> list[int]:
        """Texts are of who says them, marks as in `marks`."""
        found = self.spans(tokens)
        codes = [USER] * len(tokens)
        for at, (role, start, stop) in enumerate(found):
            codes[start:stop] = [ROLE_CODES[role]] * (stop - start)
            after = found[at + 1] if at + 1 < len(found) else None
            until = after.start if after is not None else min(stop + 1, len(tokens))
            marks = [ROLE_CODES[role]] * (until - stop)
            if role == "assistant" and after is not None:
                marks[1:] = [ROLE_CODES[after.role]] * (len(marks) - 1)
            codes[stop:until] = marks
        return codes

    def spans(self, tokens: Sequence[int]) -> list[Span]:
        """A turn ends where a token stands that no text is encoded as."""
        tokens = list(tokens)
        start = self._first(tokens)
        if start is None:
            return []
        found: list[Span] = []
        role, at = "user", start
        guards = {way.ids[way.guard] for way in self._ways[role]}
        while at < len(tokens):
            if tokens[at] not in guards:
                at += 1
                continue
            way = self._way(tokens, role, start, at)
            if way is None:
                return [*found, Span(role, start, at)]
            stop = at - way.guard
            found.append(Span(role, start, stop))
            role, at = way.after, stop + len(way.ids)
            start = at
            guards = {way.ids[way.guard] for way in self._ways[role]}
        return [*found, Span(role, start, len(tokens))]

    def _first(self, tokens: list[int]) -> int | None:
        """Where the first user's text begins: behind the template's opening, or another system's."""
        opening, user = self.between[">user"], self._user
        if tokens[: len(opening)] == list(opening):
            return len(opening)
        for at in range(len(tokens) - len(user) + 1) if user else ():
            if tokens[at] == user[0] and tokens[at : at + len(user)] == list(user):
                return at + len(user)
        return None

    def _way(self, tokens: list[int], role: str, start: int, at: int) -> _Way | None:
        """Which marks stand at a turn's end."""
        ways = []
        for way in self._ways[role]:
            first = at - way.guard
            if first >= start and tokens[first : first + len(way.ids)] == list(way.ids):
                ways.append(way)
        if len(ways) > 1 and ways[0].after == "database" and self.decode is not None:
            # one opens as the other goes on: words of a user's that look like a tool's answer are none
            return ways[self.query(self.decode(tokens[start:at])) is None]
        return ways[0] if ways else None

    def turn_start(self, tokens: Sequence[int]) -> int:
        """Behind the marks that open the assistant's last turn."""
        starts = [span.start for span in self.spans(tokens) if span.role == "assistant"]
        return starts[-1] if starts else 0
