"""Tokenizers of the `tokenizers` library: any ``tokenizer.json``, or a BPE trained here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolmem.data.chat_format import ChatFormat
from toolmem.data.chat_template import ChatTemplate, chat_format
from toolmem.data.tokenizers import ROLE_TOKENS, tokenizer_from_spec
from toolmem.data.turn_format import TurnFormat
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

# a byte that is not part of valid UTF-8, as Python's "surrogateescape" shows it
_LONE_BYTE = re.compile("([\udc80-\udcff])")


class HFTokenizer:
    """A tokenizer of the `tokenizers` library, with role tokens.

    Role tokens that its vocabulary lacks get the ids that follow it. Special tokens in text are
    encoded as the plain text they are. A pretrained model's tokenizer (``chat``) keeps its vocabulary as it
    is: its dialogues have the form of the model's chat template.

    Args:
        definition: the content of a ``tokenizer.json``.
        role_tokens: role name -> the token that plays it, where it differs from `ROLE_TOKENS`
            (``{"end": "<|endoftext|>"}``); of a pretrained model ``end`` alone, which parts documents.
        chat: what `pretrained` makes of a chat template.

    Raises:
        ToolmemError: when ``definition`` is no tokenizer.
    """

    turns: TurnFormat | None = None
    without_turns = ""  # why there are none

    def __init__(
        self,
        definition: str,
        role_tokens: Mapping[str, str] | None = None,
        *,
        chat: Mapping[str, Any] | None = None,
        source: str = "the given tokenizer",
    ) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self._backend = Backend.from_str(definition)
            described = json.loads(definition)
        except Exception as error:  # the library raises bare Exception for whatever is wrong
            raise ToolmemError(
                f"{source} is not a tokenizer.json of the `tokenizers` library ({error}); make one "
                "with `toolmem tokenizer train`, or take a pretrained model's"
            ) from error
        unknown = sorted(set(role_tokens or {}) - set(ROLE_TOKENS))
        if unknown:
            raise ToolmemError(
                f"unknown role {unknown[0]!r} in role_tokens (known: {', '.join(ROLE_TOKENS)})"
            )
        self._definition = definition
        self._backend.no_padding()
        self._backend.no_truncation()
        self._backend.encode_special_tokens = True
        self._byte_level = _has_byte_level(described.get("decoder"))
        self.chat = None if chat is None else dict(chat)
        self.role_tokens: dict[str, str] = dict(ROLE_TOKENS if chat is None else {})
        self.role_tokens |= role_tokens or {}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.role_ids: dict[str, int] = {}
        for role, token in self.role_tokens.items():
            if token not in vocabulary:
                vocabulary[token] = self.vocab_size
                self.vocab_size += 1
            self.role_ids[role] = vocabulary[token]
        self._role_texts = {self.role_ids[role]: token for role, token in self.role_tokens.items()}
        if self.chat is not None:
            self._take_chat(self.chat)
        texts = map(re.escape, self._role_texts.values())
        self._role_pattern = re.compile("|".join(texts) or "(?!)")

    def _take_chat(self, chat: Mapping[str, Any]) -> None:
        """Have the turns of a chat template, if it gave any."""
        self.without_turns = str(chat.get("refused") or "")
        more = chat.get("vocab_size") or 0
        if not isinstance(more, int):
            raise ToolmemError(f"a tokenizer's chat.vocab_size is {more!r:.40}, which is no number")
        self.vocab_size = max(self.vocab_size, more)
        if chat.get("format") is not None:
            turns = ChatFormat.from_spec(chat["format"], self.decode)
            for token in {i for marks in turns.between.values() for i in marks}:
                text = self._backend.id_to_token(token) if 0 <= token < 1 << 31 else None
                if text is None:
                    raise ToolmemError(
                        f"a tokenizer's chat format names token {token}, which it lacks"
                    )
                if token in turns.guarding:
                    self._role_texts[token] = text
            self.turns = turns

    @classmethod
    def pretrained(
        cls,
        definition: str,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        *,
        system: str | None = None,
        vocab_size: int | None = None,
        source: str = "the given tokenizer",
    ) -> HFTokenizer:
        """A pretrained model's tokenizer: its vocabulary as it is, dialogues as its chat template has them.

        Args:
            definition: the content of a ``tokenizer.json``.
            chat_template: the model's, in Jinja; None for a model that has none.
            special_tokens: ``bos_token``, ``eos_token`` and the like, as text.
            system: what the system says first; None for what the template says by itself.
            vocab_size: ids that the model has, where it has more than the tokenizer names.
            source: for messages.

        Raises:
            ToolmemError: when ``definition`` is no tokenizer, or for a system's message that the template
                does not take. A template without a form here is kept, and refused where a dialogue is
                to be written.
        """
        chat: dict[str, Any] = {
            "template": chat_template,
            "special_tokens": dict(special_tokens),
            "system": system,
            "vocab_size": vocab_size,
            "format": None,
            "refused": "the model has no chat template" if chat_template is None else "",
        }
        plain = cls(definition, chat=chat, source=source)
        known = plain._backend.get_vocab(with_added_tokens=True)
        ends = ("<|endoftext|>", special_tokens.get("eos_token"), special_tokens.get("bos_token"))
        end = next((token for token in ends if token in known), None)
        if chat_template is not None:
            try:
                template = ChatTemplate(chat_template, special_tokens, system)
                chat["format"] = plain._format_of(template).spec()
            except ToolmemError as error:
                if system is not None:
                    raise
                chat["refused"] = str(error)
        return cls(definition, {} if end is None else {"end": end}, chat=chat, source=source)

    def _format_of(self, template: ChatTemplate) -> ChatFormat:
        def encode_marks(text: str) -> list[int]:
            self._backend.encode_special_tokens = False
            try:
                return list(self._backend.encode(text, add_special_tokens=False).ids)
            finally:
                self._backend.encode_special_tokens = True

        added = self._backend.get_added_tokens_decoder()
        special = {i for i, token in added.items() if token.special}
        return chat_format(template, self.encode, encode_marks, special, self.decode)

    def with_system(self, system: str | None) -> HFTokenizer:
        """The same tokenizer whose dialogues open with another system's message.

        Args:
            system: what it says; None for what the chat template says by itself.

        Raises:
            ToolmemError: where there is no chat template, or it takes none.
        """
        if self.chat is None or not isinstance(self.chat.get("template"), str):
            raise ToolmemError(
                "a system's message needs a pretrained model's chat template, and this tokenizer has none: "
                "leave it out"
            )
        if system == self.chat.get("system"):
            return self
        return self.pretrained(
            self._definition,
            self.chat["template"],
            self.chat.get("special_tokens") or {},
            system=system,
            vocab_size=self.chat.get("vocab_size"),
        )

    def special_id(self, name: str) -> int | None:
        """The id of a pretrained model's ``bos_token``, ``eos_token`` or the like; None where it has none."""
        text = None if self.chat is None else self.chat["special_tokens"].get(name)
        found: int | None = None if text is None else self._backend.token_to_id(text)
        return found

    @cached_property
    def prefix_ids(self) -> list[int]:
        """What a text by itself begins with (``<s>``, say), as its model was trained; mostly nothing."""
        return list(self._backend.encode("", add_special_tokens=True).ids)

    @classmethod
    def from_file(
        cls, path: str | Path, role_tokens: Mapping[str, str] | None = None
    ) -> HFTokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            ToolmemError: when the file is missing or is no tokenizer.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            definition = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise ToolmemError(
                f"no tokenizer at {path}: `tokenizer` is `byte` or the path of a tokenizer.json; "
                "make one with `toolmem tokenizer train`"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise ToolmemError(f"cannot read the tokenizer {path}: {error}") from error
        return cls(definition, role_tokens, source=str(path))

    def __reduce__(self) -> tuple[Any, ...]:
        return tokenizer_from_spec, (self.spec(),)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; never a role token's."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # a lone surrogate becomes "?"
            texts = [t.encode("utf-8", "replace").decode() for t in texts]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        for i, text in enumerate(texts):
            # a vocabulary may hold a role token as an ordinary word, and a normaliser make one of others
            if not self._role_texts.keys().isdisjoint(ids[i]):
                ids[i] = self._encode_split(text)
        return ids

    def _encode_split(self, text: str) -> list[int]:
        """Encode text with a cut inside everything that reads like a role token."""
        cuts = [0, *(match.start() + 1 for match in self._role_pattern.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        return [
            i
            for encoding in self._backend.encode_batch_fast(pieces, add_special_tokens=False)
            for i in encoding.ids
            if i not in self._role_texts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; role tokens show as ``<|user|>``, broken UTF-8 as U+FFFD."""
        if self._byte_level:
            return self.decode_bytes(ids).decode("utf-8", "replace")
        text: list[str] = []
        run: list[int] = []
        for i in ids:
            if i in self._role_texts:
                text += [self._backend.decode(run, skip_special_tokens=False), self._role_texts[i]]
                run = []
            else:
                run.append(int(i))
        return "".join([*text, self._backend.decode(run, skip_special_tokens=False)])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any byte string; bytes that are not UTF-8 get their own byte's token.

        Raises:
            ToolmemError: when ``data`` is not UTF-8 and the tokenizer is not byte-level.
        """
        ids: list[int] = []
        for piece in _LONE_BYTE.split(data.decode("utf-8", "surrogateescape")):
            if _LONE_BYTE.match(piece):
                ids.append(self._byte_id(ord(piece) - 0xDC00))
            elif piece:
                ids += self.encode(piece)
        return ids

    def _byte_id(self, byte: int) -> int:
        token = self._backend.token_to_id(BYTE_TO_CHAR[byte]) if self._byte_level else None
        if token is None:
            raise ToolmemError(
                f"byte {byte:#04x} is not valid UTF-8 here, and this tokenizer has no token for "
                "it: use a byte-level tokenizer (`toolmem tokenizer train` makes one)"
            )
        return int(token)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``: the inverse of `encode_bytes` for byte-level tokenizers.

        Raises:
            ToolmemError: for an id outside the vocabulary.
        """
        if not self._byte_level:
            return self.decode(ids).encode("utf-8")
        try:
            return b"".join([self._bytes[i] for i in ids])
        except IndexError:
            raise ToolmemError(
                f"a token id is outside the tokenizer's {self.vocab_size} ids"
            ) from None

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of every id, for byte-level tokenizers."""
        result = [b""] * self.vocab_size
        added = self._backend.get_added_tokens_decoder()
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in added and all(char in _CHAR_TO_BYTE for char in token):
                result[i] = bytes(_CHAR_TO_BYTE[char] for char in token)
            else:
                result[i] = token.encode("utf-8", "replace")
        for i, token in self._role_texts.items():
            result[i] = token.encode()
        return result

    def spec(self) -> dict[str, Any]:
        """The whole definition, so that a checkpoint needs no file beside it."""
        spec = {"type": "hf", "json": self._definition, "role_tokens": dict(self.role_tokens)}
        return spec if self.chat is None else {**spec, "chat": self.chat}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, show_progress: bool = False
) -> HFTokenizer:
    """Train a byte-level BPE on texts. The same texts give the same tokenizer.

    Digits stand alone, as in SmolLM's and Llama's tokenizers; every byte has a token, so that every
    byte string survives the round trip.

    Args:
        texts: what to train on; read once.
        vocab_size: ids wanted, role tokens included; few texts may give fewer.
        show_progress: the library's own progress bars, on stderr.

    Raises:
        ToolmemError: when ``vocab_size`` leaves no room for the 256 bytes and the role tokens.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = 256 + len(ROLE_TOKENS)
    if vocab_size < least:
        raise ToolmemError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {len(ROLE_TOKENS)} role tokens "
            f"need {least} already"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ROLE_TOKENS),
        initial_alphabet=sorted(_CHAR_TO_BYTE),
        show_progress=show_progress,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_special_tokens(list(ROLE_TOKENS.values()))
    return HFTokenizer(backend.to_str())


def save_tokenizer(tokenizer: HFTokenizer, path: str | Path) -> None:
    """Write a ``tokenizer.json`` in one step (role tokens of other names are not in it)."""
    with atomic_path(path) as temporary:
        temporary.write_text(tokenizer.spec()["json"], encoding="utf-8")


def _has_byte_level(decoder: Any) -> bool:
    if isinstance(decoder, dict):
        inner = decoder.get("decoders", [])
        return decoder.get("type") == "ByteLevel" or any(_has_byte_level(d) for d in inner)
    return False


def _byte_to_char() -> list[str]:
    """GPT-2's printable stand-in for each byte, as byte-level vocabularies spell their tokens."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    chars, spare = [], 0x100
    for byte in range(256):
        if byte in printable:
            chars.append(chr(byte))
        else:
            chars.append(chr(spare))
            spare += 1
    return chars


BYTE_TO_CHAR = _byte_to_char()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
