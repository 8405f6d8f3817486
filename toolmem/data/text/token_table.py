"""All dialogues of a question table as one flat array of tokens with their roles.

One dialogue is ``<|user|>`` question ``<|assistant|>`` answer ``<|end|>``, or with a tool
``<|user|>`` question ``<|assistant|>`` query ``<|database|>`` result ``<|assistant|>`` conclusion
``<|end|>``. A role token belongs to whoever speaks before it, for that is who wrote it: the
assistant calls the tool by writing ``<|database|>`` and finishes by writing ``<|end|>``. A pretrained
model's tokenizer has other marks between turns (``toolmem.data.turn_format``).

`encode_dialogue` is the slow and obvious way, one dialogue at a time; `TokenTable.build` assembles
all of a template's dialogues at once, and a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import NamedTuple

import numpy as np

from toolmem.data.dialogues import Block, Dialogue, QuestionTable, TurnSegments
from toolmem.data.tokenizers import ByteTokenizer, Tokenizer
from toolmem.data.turn_format import (
    ASSISTANT,
    DATABASE,
    NO_TOKEN,
    NONE,
    OVER,
    ROLE_CODES,
    START,
    USER,
    turn_format,
)

__all__ = [
    "ASSISTANT",
    "DATABASE",
    "NONE",
    "ROLE_CODES",
    "USER",
    "TokenTable",
    "dialogue_tokens",
    "encode_dialogue",
    "prompt_tokens",
]

_CHUNK_CELLS = 1 << 22  # padded tokens assembled at once: bounds memory, and fits the caches


def encode_dialogue(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and roles of one dialogue.

    Args:
        dialogue: what is said.
        tokenizer: one with role tokens.

    Returns:
        (length,) int64 token ids and (length,) uint8 role codes.
    """
    form = turn_format(tokenizer)
    tokens: list[int] = []
    roles: list[int] = []
    before = START
    following = [turn.role for turn in dialogue.turns[1:]] + [OVER]
    for turn, after in zip(dialogue.turns, following, strict=True):
        calls = turn.role == "assistant" and after == "database"
        text = tokenizer.encode(form.written(turn.text, calls))
        marks = form.marks(before, turn.role)
        tokens += [token for token, _ in marks] + text
        roles += [code for _, code in marks] + [ROLE_CODES[turn.role]] * len(text)
        before = turn.role
    closing = form.marks(before, OVER)
    tokens += [token for token, _ in closing]
    roles += [code for _, code in closing]
    return np.array(tokens, np.int64), np.array(roles, np.uint8)


def prompt_tokens(question: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens up to where the assistant begins to speak: user, question, assistant."""
    return dialogue_tokens([("user", question)], tokenizer)


def dialogue_tokens(turns: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[int]:
    """Turns as the model saw them in training, up to where the assistant begins to speak.

    Args:
        turns: (role, text), the last a user's or the database's; an assistant's before the database's is
            the query, or the call as it was written.
        tokenizer: one with a form for dialogues.
    """
    form = turn_format(tokenizer)
    roles = [role for role, _ in turns] + ["assistant"]
    texts = []
    for (role, text), after in zip(turns, roles[1:], strict=True):
        calls = role == "assistant" and after == "database"
        texts.append(form.written(text, True) if calls and form.query(text) is None else text)
    tokens = [token for token, _ in form.marks(START, roles[0])]
    for ids, before, after in zip(tokenizer.encode_batch(texts), roles, roles[1:], strict=False):
        tokens += ids
        tokens += [token for token, _ in form.marks(before, after)]
    return tokens


class Ragged(NamedTuple):
    """Many token sequences: number i is ``flat[starts[i] : starts[i] + lengths[i]]``."""

    flat: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


# role code, then the same tokens for every question, or sequences and which of them each takes
Piece = tuple[int, "np.ndarray | Ragged", "np.ndarray | None"]


class TokenTable:
    """Many dialogues' tokens and roles, in 2 or 4 bytes a token.

    Args:
        codes: (tokens,) uint16 or uint32, dialogue after dialogue: the token id, with its role in
            the two highest bits.
        offsets: (dialogues + 1,) int64, where each dialogue begins, and the end of the last.
    """

    def __init__(self, codes: np.ndarray, offsets: np.ndarray) -> None:
        self.codes = codes
        self.offsets = offsets
        self.role_shift = _role_shift(codes.dtype)
        self.token_mask = (1 << self.role_shift) - 1

    @classmethod
    def build(cls, questions: QuestionTable, tokenizer: Tokenizer) -> TokenTable:
        """Tokenise every dialogue of a question table.

        Args:
            questions: what a template set asks about a population.
            tokenizer: one with role tokens.
        """
        form = turn_format(tokenizer)
        encoded: dict[str, Ragged] = {}  # a column's texts, by its key
        parts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        for block in questions.blocks:
            pieces: list[Piece] = []
            before = START
            following = [turn.role for turn in block.turns[1:]] + [OVER]
            for turn, after in zip(block.turns, following, strict=True):
                pieces += _mark_pieces(form.marks(before, turn.role))
                written: Callable[[str], str] | None = None
                if turn.role == "assistant" and after == "database" and form.call == NO_TOKEN:
                    written = partial(form.written, calls=True)
                pieces += _turn_pieces(turn, block, tokenizer, encoded, written)
                before = turn.role
            pieces += _mark_pieces(form.marks(before, OVER))
            _assemble(pieces, 0, len(block), _dtype(tokenizer), parts, lengths)
        return cls._join(parts, lengths, _dtype(tokenizer))

    @classmethod
    def from_dialogues(cls, dialogues: Iterable[Dialogue], tokenizer: Tokenizer) -> TokenTable:
        """Tokenise dialogues one by one."""
        dtype = _dtype(tokenizer)
        shift = _role_shift(dtype)
        parts, lengths = [], []
        for dialogue in dialogues:
            tokens, roles = encode_dialogue(dialogue, tokenizer)
            parts.append((tokens | (roles.astype(np.int64) << shift)).astype(dtype))
            lengths.append(np.array([len(tokens)]))
        return cls._join(parts, lengths, dtype)

    @classmethod
    def concatenate(cls, tables: Sequence[TokenTable]) -> TokenTable:
        """One table of the dialogues of several, in order (they share one tokenizer)."""
        if len(tables) == 1:
            return tables[0]
        dtype = tables[0].codes.dtype
        return cls._join([t.codes for t in tables], [t.lengths for t in tables], dtype)

    @classmethod
    def _join(
        cls, parts: list[np.ndarray], lengths: list[np.ndarray], dtype: np.dtype
    ) -> TokenTable:
        offsets = np.zeros(sum(map(len, lengths)) + 1, np.int64)
        if lengths:
            np.cumsum(np.concatenate(lengths), out=offsets[1:])
        codes = np.empty(offsets[-1], dtype)
        at = 0
        for i, part in enumerate(parts):
            codes[at : at + len(part)] = part
            at += len(part)
            parts[i] = part[:0]  # let the pieces go as they are copied: halves the peak
        return cls(codes, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """(dialogues,) tokens of each, in the smallest dtype: a loader sorts by it."""
        lengths = np.diff(self.offsets)
        return lengths.astype(np.uint16 if lengths.max(initial=0) < 1 << 16 else np.int64)

    @property
    def longest(self) -> int:
        """Tokens of the longest dialogue."""
        return int(self.lengths.max(initial=0))

    def tokens(self, index: int) -> np.ndarray:
        """(length,) int64 token ids of dialogue ``index``."""
        return (self._codes_of(index) & self.token_mask).astype(np.int64)

    def roles(self, index: int) -> np.ndarray:
        """(length,) uint8 role codes of dialogue ``index``."""
        return (self._codes_of(index) >> self.role_shift).astype(np.uint8)

    def _codes_of(self, index: int) -> np.ndarray:
        return self.codes[self.offsets[index] : self.offsets[index + 1]]


def _dtype(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 14 else np.uint32)


def _role_shift(dtype: np.dtype) -> int:
    return dtype.itemsize * 8 - 2


def _mark_pieces(marks: list[tuple[int, int]]) -> list[Piece]:
    return [(code, np.array([token]), None) for token, code in marks]


def _turn_pieces(
    turn: TurnSegments,
    block: Block,
    tokenizer: Tokenizer,
    encoded: dict[str, Ragged],
    written: Callable[[str], str] | None,
) -> list[Piece]:
    """A turn's text as pieces: (role code, the same tokens for all, or sequences and which)."""
    code = ROLE_CODES[turn.role]
    columns = block.columns
    if all(isinstance(segment, str) for segment in turn.segments):
        text = "".join(str(segment) for segment in turn.segments)
        text = text if written is None else written(text)
        return [(code, np.array(tokenizer.encode(text), np.int64), None)]
    if isinstance(tokenizer, ByteTokenizer):
        # bytes do not merge: each segment is tokenised alone, each column's values once
        pieces: list[Piece] = []
        for segment in turn.segments:
            if isinstance(segment, str):
                pieces.append((code, np.array(tokenizer.encode(segment), np.int64), None))
            else:
                column = columns[segment.key]
                if column.key not in encoded:
                    encoded[column.key] = _encode_bytes(column.values)
                pieces.append((code, encoded[column.key], column.index))
        return pieces
    # other tokenizers merge across segments: encode the whole turn of every question
    texts: list[list[str]] = []
    for segment in turn.segments:
        if isinstance(segment, str):
            texts.append([segment] * len(block))
        else:
            column = columns[segment.key]
            texts.append([column.values[i] for i in column.index.tolist()])
    joined = list(map("".join, zip(*texts, strict=True)))
    if written is not None:
        joined = list(map(written, joined))
    return [(code, _encode_texts(joined, tokenizer), np.arange(len(joined)))]


def _encode_bytes(values: list[str]) -> Ragged:
    if all(map(str.isascii, values)):
        flat = "".join(values).encode("ascii")
        lengths = np.fromiter(map(len, values), np.int64, len(values))
    else:
        pieces = [value.encode("utf-8", "surrogatepass") for value in values]
        flat = b"".join(pieces)
        lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return Ragged(np.frombuffer(flat, np.uint8), np.cumsum(lengths) - lengths, lengths)


def _encode_texts(texts: list[str], tokenizer: Tokenizer) -> Ragged:
    flat: list[np.ndarray] = []
    lengths: list[int] = []
    for start in range(0, len(texts), 8192):  # the library's own encodings are large
        ids = tokenizer.encode_batch(texts[start : start + 8192])
        sizes = list(map(len, ids))
        flat.append(np.fromiter(chain.from_iterable(ids), np.uint32, sum(sizes)))
        lengths += sizes
    sizes_array = np.array(lengths, np.int64)
    joined = np.concatenate(flat) if flat else np.empty(0, np.uint32)
    return Ragged(joined, np.cumsum(sizes_array) - sizes_array, sizes_array)


def _assemble(
    pieces: list[Piece],
    start: int,
    stop: int,
    dtype: np.dtype,
    parts: list[np.ndarray],
    lengths: list[np.ndarray],
) -> None:
    """Append the codes of questions ``start`` to ``stop`` of a block.

    Pieces stand side by side in a padded matrix; its filled cells, read row by row, are the
    dialogues end to end.
    """
    rows = stop - start
    if rows == 0:
        return
    widths = []
    for _, piece, index in pieces:
        if isinstance(piece, Ragged):
            assert index is not None
            widths.append(int(piece.lengths[index[start:stop]].max(initial=0)))
        else:
            widths.append(len(piece))
    width = sum(widths)
    if rows > 1 and rows * width > _CHUNK_CELLS:
        # about even chunks; each has its own widths, so one huge value does not widen all rows
        step = max(1, min(rows // 2, _CHUNK_CELLS // width))
        for first in range(start, stop, step):
            _assemble(pieces, first, min(first + step, stop), dtype, parts, lengths)
        return
    shift = _role_shift(dtype)
    codes = np.empty((rows, width), dtype)
    filled = np.ones((rows, width), bool)
    at = 0
    for (code, piece, index), size in zip(pieces, widths, strict=True):
        if isinstance(piece, Ragged):
            assert index is not None
            chosen = index[start:stop]
            steps = np.arange(size)
            places = piece.starts[chosen][:, None] + steps
            if size:
                codes[:, at : at + size] = piece.flat.take(places, mode="clip")
            codes[:, at : at + size] |= dtype.type(code << shift)
            np.less(steps, piece.lengths[chosen][:, None], out=filled[:, at : at + size])
        else:
            codes[:, at : at + size] = piece | (code << shift)
        at += size
    parts.append(codes[filled])
    lengths.append(filled.sum(1))
