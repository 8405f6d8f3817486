"""Grammars that a turn must follow: a regular expression, a JSON schema, or a Lark grammar.

llguidance (the extra ``constrain``) says which tokens may come next; what is here knows of turns, role
tokens and lanes.
"""

from __future__ import annotations

import functools
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolmem.data.turn_format import NO_TOKEN, turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.sampling import History

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer

KEPT_STATES = 1024  # states of the grammar kept at a time; what is forgotten is read again
SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$/#&~-]")  # means something in a regular expression


class GrammarConstraint:
    """What the assistant writes in a turn follows a grammar, and then the turn ends.

    Which tokens are allowed depends on the history alone. States of the grammar are kept by what the
    turn holds, so that a step costs one token's reading, and lanes that fork share what they share.
    Where only one text can come next, llguidance allows its usual tokens only.

    Args:
        tokenizer: one whose tokens spell their text one by one: bytes, or a byte-level BPE.
        regex: a regular expression (Rust's syntax) that the whole turn matches; or
        json_schema: a JSON schema that it obeys; or
        lark: a context-free grammar in llguidance's variant of Lark's syntax.
        stop: roles whose token may end the turn once the grammar is satisfied; a pretrained model's chat
            format has ``end`` alone.
        turns: constrain only the first so many turns that the assistant writes; None for all.

    Raises:
        ToolmemError: llguidance is not installed, not one grammar is given, it cannot be read, or the
            tokenizer does not serve.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        regex: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        lark: str | None = None,
        stop: Sequence[str] = ("end",),
        turns: int | None = None,
    ) -> None:
        self._rebuild: Callable[..., GrammarConstraint] = functools.partial(
            GrammarConstraint,
            regex=regex,
            json_schema=json_schema,
            lark=lark,
            stop=stop,
            turns=turns,
        )
        given = {"regex": regex, "json_schema": json_schema, "lark": lark}
        [*named] = [key for key, value in given.items() if value is not None]
        if len(named) != 1:
            raise ToolmemError(
                f"give one of regex, json_schema and lark, not {' and '.join(named) or 'none'}"
            )
        if turns is not None and turns < 1:
            raise ToolmemError(f"turns is {turns}: it must be at least 1, or left out")
        self.tokenizer = tokenizer
        self.turns = turns
        matcher = _library().LLMatcher
        if regex is not None:
            grammar = matcher.grammar_from_regex(regex)
        elif json_schema is not None:
            grammar = matcher.grammar_from_json_schema(json.dumps(json_schema))
        else:
            grammar = matcher.grammar_from_lark(lark)
        start = matcher(_vocabulary(tokenizer, stop), grammar, log_level=0)
        if start.is_error():
            reason = " ".join(start.get_error().split())
            raise ToolmemError(f"{named[0]} cannot be read: {reason}")
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()
        self._start = start

    def __reduce__(self) -> tuple[Any, ...]:
        return self._rebuild, (self.tokenizer,)

    def allowed(self, history: History) -> Tensor | None:
        """Which tokens may come next: (vocab,) bool on the host; None in a turn that is free.

        Raises:
            ToolmemError: what stands in the turn already breaks the grammar, or no token of the
                vocabulary can go on with it.
        """
        number, tokens = history.turn()
        if self.turns is not None and number >= self.turns:
            return None
        mask = self._state(tuple(tokens)).compute_logit_bias()
        allowed = torch.frombuffer(bytearray(mask), dtype=torch.uint8) > 0
        if not allowed.any():
            raise ToolmemError(
                "the constraint leaves no token to go on with after "
                f"{self.tokenizer.decode(tokens)!r}: the vocabulary cannot spell what it asks for"
            )
        return allowed

    def _state(self, tokens: tuple[int, ...]) -> Any:
        """The grammar after these tokens of a turn; not to be changed."""
        known = len(tokens)
        while known and tokens[:known] not in self._states:
            known -= 1
        state = self._states[tokens[:known]] if known else self._start
        if known < len(tokens):
            state = state.deep_copy()
            if not state.consume_tokens(list(tokens[known:])):
                raise ToolmemError(
                    f"{self.tokenizer.decode(tokens)!r} breaks the constraint: give each dialogue "
                    "its constraint from the beginning of a turn"
                )
            self._states[tokens] = state
            if len(self._states) > KEPT_STATES:
                self._states.popitem(last=False)
        elif known:
            self._states.move_to_end(tokens)
        return state


def query_constraint(
    tokenizer: Tokenizer,
    attributes: Iterable[str],
    names: Iterable[str] | None = None,
    *,
    turns: int | None = 1,
) -> GrammarConstraint:
    """The assistant's first turn is a query of the database tool: ``FIND attribute FOR name``.

    Args:
        tokenizer: as for ``GrammarConstraint``; ``<|database|>`` ends the query, or in a pretrained
            model's chat format the end of a turn that is a call.
        attributes: that may be asked for (``SqlTool.attributes``).
        names: that may be asked about; None for any line of text.
        turns: constrain the first so many turns; 1 leaves what follows the first answer free.

    Raises:
        ToolmemError: there are no attributes, or no names.
    """
    parts = []
    for key, texts in (("attributes", attributes), ("names", names)):
        if texts is None:
            parts.append(r"[^\x00-\x20\x7f][^\x00-\x1f\x7f]{0,127}")
            continue
        choices = [SPECIAL.sub(r"\\\g<0>", text) for text in texts]
        if not choices:
            raise ToolmemError(f"{key} is empty: a query needs at least one")
        parts.append(f"({'|'.join(choices)})")
    form = turn_format(tokenizer)
    if form.call != NO_TOKEN:
        regex = f"FIND {parts[0]} FOR {parts[1]}"
        return GrammarConstraint(tokenizer, regex=regex, stop=("database",), turns=turns)
    before, after = (SPECIAL.sub(r"\\\g<0>", text) for text in form.around_call)
    regex = f"{before}FIND {parts[0]} FOR {parts[1]}{after}"
    return GrammarConstraint(tokenizer, regex=regex, turns=turns)


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ToolmemError(
            "constraints need llguidance: install it with `pip install 'toolmem[constrain]'`"
        ) from None
    return llguidance


class _Words:
    """A tokenizer as llguidance wants to see one."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, stop: int) -> None:
        self.eos_token_id = stop
        self.tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted({stop, *tokenizer.role_ids.values()})
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        data = text.encode() if isinstance(text, str) else text
        return self._tokenizer.encode_bytes(data)


def _vocabulary(tokenizer: Tokenizer, stop: Sequence[str]) -> Any:
    """Llguidance's view of a tokenizer in which these roles' tokens end a text."""
    if not stop:
        raise ToolmemError("stop is empty: a constrained turn needs a role token to end with")
    turns = getattr(tokenizer, "turns", None)
    ids = dict(tokenizer.role_ids) if turns is None else {"end": turns.end}
    unknown = [role for role in stop if role not in ids]
    if unknown:
        known = ", ".join(ids) or "none"
        raise ToolmemError(f"stop names the role {unknown[0]!r} (this tokenizer has: {known})")
    sample = 'FIND city FOR Zoë  {"a": 1}'
    pieces = [tokenizer.decode_bytes([i]) for i in tokenizer.encode(sample)]
    if b"".join(pieces) != sample.encode():
        raise ToolmemError(
            "constraints need a tokenizer whose tokens spell their text one by one: use `byte`, or a "
            "byte-level BPE (`toolmem tokenizer train` makes one)"
        )
    library = _library()
    ends = [ids[role] for role in stop]
    words = library.TokenizerWrapper(_Words(tokenizer, ends[0]))
    return library.LLTokenizer(words, eos_token=ends)
