"""Loss by kind of token: what the assistant writes apart by where it can know it from.

A token that the assistant writes is of one kind:

    name        of a field that the user said: the person's name, in the query and in the sentence
    copied      of a field that the database said: the answer, in a dialogue with a tool
    memorised   of a field that nobody said before: the answer, in a dialogue without a tool
    query       any other of a turn that the database answers, and the token that calls it
    other       any other: the sentence's fixed words, and the end

Fields are places of a template (``Turn.fields``), not words: in *Jordan Smith was born in Jordan* the
first is of the name, the last of the answer. A field was said if an earlier turn of the user or the
database said the same field, or another one of the same text; a birth year was said with its date. A
token that holds a byte of a field is of that field, of the first if it holds bytes of several.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from toolmem.data.text.dialog_tokens import DialogTokenGenerator
from toolmem.data.text.token_table import TokenTable
from toolmem.data.turn_format import ASSISTANT, NO_TOKEN, OVER, START, TurnFormat, turn_format
from toolmem.errors import ToolmemError
from toolmem.evaluation.forcing import forced

if TYPE_CHECKING:
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel

KINDS = ("query", "name", "copied", "memorised", "other")
QUERY, NAME, COPIED, MEMORISED, OTHER = range(len(KINDS))
FOREIGN = -1  # not written by the assistant


@dataclass(frozen=True)
class KindLoss:
    """What tokens of one kind cost.

    Args:
        tokens: how many there are.
        loss: their cross-entropy in nats, a mean.
        accuracy: share of them that are the likeliest.
    """

    tokens: int
    loss: float
    accuracy: float


def token_kinds(dialogue: Dialogue, tokenizer: Tokenizer) -> np.ndarray:
    """(length,) int8, the kind of each token as `encode_dialogue` makes them; -1 of what others write.

    Args:
        dialogue: whose turns say where their fields are.
        tokenizer: any with role tokens.

    Raises:
        ToolmemError: for a tokenizer that changes the text.
    """
    kinds: list[int] = []
    said: dict[str, dict[str, int]] = {"key": {}, "text": {}}  # of fields -> kind of a copy
    form, before = turn_format(tokenizer), START
    following = [turn.role for turn in dialogue.turns[1:]] + [OVER]
    for turn, after in zip(dialogue.turns, following, strict=True):
        own = QUERY if turn.role == "database" else OTHER
        kinds += _of_marks(form, before, turn.role, own)
        mine = turn.role == "assistant"
        base = (QUERY if after == "database" else OTHER) if mine else FOREIGN
        letters = np.full(len(_utf8(turn.text)), base, np.int8)
        for start, stop, key in turn.fields:
            key, text = key.partition("|")[0], turn.text[start:stop]
            if mine:
                kind = _origin(key, text, said)
                letters[len(_utf8(turn.text[:start])) : len(_utf8(turn.text[:stop]))] = kind
            else:
                copy = NAME if turn.role == "user" else COPIED
                said["key"].setdefault(key, copy)
                said["text"].setdefault(text, copy)
        text = turn.text
        if mine and after == "database" and form.call == NO_TOKEN:
            text, letters = _as_call(turn.text, letters, base, form)
        kinds += _by_token(letters, base, text, tokenizer)
        before = turn.role
    kinds += _of_marks(form, before, OVER, OTHER)
    return np.array(kinds, np.int8)


def _of_marks(form: TurnFormat, before: str, after: str, own: int) -> list[int]:
    """The kinds of the tokens between two turns: ``own`` of what the assistant writes."""
    return [own if code == ASSISTANT else FOREIGN for _, code in form.marks(before, after)]


def _as_call(text: str, letters: np.ndarray, base: int, form: TurnFormat) -> tuple[str, np.ndarray]:
    """A query as it is written, and the kind of each of its bytes."""
    prefix, suffix = form.around_call
    kinds, at = [base] * len(_utf8(prefix)), 0
    for letter in text:
        size = len(_utf8(letter))
        written = form.written(letter, True)[len(prefix) :].removesuffix(suffix)
        kinds += [int(letters[at])] * len(_utf8(written))
        at += size
    kinds += [base] * len(_utf8(suffix))
    return form.written(text, True), np.array(kinds, np.int8)


def _origin(key: str, text: str, said: dict[str, dict[str, int]]) -> int:
    whole = key.removesuffix("birth_year") + "birth_date" if key.endswith("birth_year") else key
    for kind in (said["key"].get(key), said["key"].get(whole), said["text"].get(text)):
        if kind is not None:
            return kind
    return MEMORISED


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _by_token(letters: np.ndarray, base: int, text: str, tokenizer: Tokenizer) -> list[int]:
    """The kind of each token of a turn's text, from that of each byte."""
    ids = tokenizer.encode(text)
    pieces = [tokenizer.decode_bytes([token]) for token in ids]
    ends = list(itertools.accumulate(map(len, pieces)))
    if b"".join(pieces) != _utf8(text):  # ids that say something else alone than together
        ends = [len(tokenizer.decode_bytes(ids[: n + 1])) for n in range(len(ids))]
    if tokenizer.decode_bytes(ids) != _utf8(text):
        raise ToolmemError(
            f"token losses: the tokenizer changes {text!r}, so that its tokens cannot be told apart: "
            "use one that gives text back as it was"
        )
    kinds = []
    start = 0
    for end in ends:
        own = letters[start:end]
        of_fields = own[own != base]
        kinds.append(int(of_fields[0]) if len(of_fields) else base)
        start = end
    return kinds


class TokenLossTest:
    """Dialogues whose tokens' losses are measured again and again.

    Args:
        dialogues: as they are expected.
        tokenizer: the model's.
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for a tokenizer that changes text.
    """

    def __init__(
        self, dialogues: Sequence[Dialogue], tokenizer: Tokenizer, batch_size: int = 128
    ) -> None:
        table = TokenTable.from_dialogues(dialogues, tokenizer)
        order = np.argsort(table.lengths, kind="stable")  # rows of a batch are of like length
        self._generators = {
            spans: DialogTokenGenerator(
                table, batch_size, rows=order, layout="rows", shuffle=False, with_spans=spans
            )
            for spans in (False, True)
        }
        self._kinds = np.full((len(dialogues), table.longest), FOREIGN, np.int8)
        for row, dialogue in enumerate(dialogues):
            kinds = token_kinds(dialogue, tokenizer)
            self._kinds[row, : len(kinds)] = kinds

    def measure(self, model: LanguageModel) -> dict[str, KindLoss]:
        """What tokens cost, by kind, of those kinds that there are.

        Args:
            model: of any architecture, in evaluation mode.
        """
        generator = self._generators[model.attention_mask == "prefix"]
        losses, hits, counts = (np.zeros(len(KINDS)) for _ in range(3))
        for index in range(generator.batches_per_epoch):
            batch = generator.batch_at(index)
            # the target of column j is token j + 1
            kinds = self._kinds[generator.dialogues_at(index), 1 : 1 + batch.tokens.shape[1]]
            batch.loss_mask = torch.from_numpy(kinds != FOREIGN)
            batch.loss_positions = None
            found, right = forced(model, batch)
            of_each = kinds[kinds != FOREIGN]
            losses += np.bincount(of_each, found.numpy(), minlength=len(KINDS))
            hits += np.bincount(of_each, right.numpy(), minlength=len(KINDS))
            counts += np.bincount(of_each, minlength=len(KINDS))
        return {
            name: KindLoss(int(n), float(loss / n), float(hit / n))
            for name, n, loss, hit in zip(KINDS, counts, losses, hits, strict=True)
            if n
        }


def measure_token_losses(
    model: LanguageModel,
    tokenizer: Tokenizer,
    dialogues: Iterable[Dialogue],
    *,
    batch_size: int = 128,
) -> dict[str, KindLoss]:
    """What the tokens that an assistant writes cost a model, by kind, by teacher forcing.

    Args:
        model: of any architecture, on any device, in evaluation mode.
        tokenizer: the one that it was trained with.
        dialogues: as they are expected (``FactsDataModule.questions``).
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for a tokenizer that changes text.
    """
    return TokenLossTest(list(dialogues), tokenizer, batch_size).measure(model)
