"""Tokenizers of the `tokenizers` library: any ``tokenizer.json``, or a BPE trained here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from toolmem.data.tokenizers import ROLE_TOKENS
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

# a byte that is not part of valid UTF-8, as Python's "surrogateescape" shows it
_LONE_BYTE = re.compile("([\udc80-\udcff])")


class HFTokenizer:
    """A tokenizer of the `tokenizers` library, with role tokens.

    Role tokens that its vocabulary lacks get the ids that follow it. Special tokens in text are
    encoded as the plain text they are.

    Args:
        definition: the content of a ``tokenizer.json``.
        role_tokens: role name -> the token that plays it, where it differs from `ROLE_TOKENS`
            (``{"end": "<|endoftext|>"}``).

    Raises:
        ToolmemError: when ``definition`` is no tokenizer.
    """

    def __init__(
        self,
        definition: str,
        role_tokens: Mapping[str, str] | None = None,
        *,
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
        self.role_tokens: dict[str, str] = {**ROLE_TOKENS, **(role_tokens or {})}
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        self.role_ids: dict[str, int] = {}
        for role, token in self.role_tokens.items():
            if token not in vocabulary:
                vocabulary[token] = self.vocab_size
                self.vocab_size += 1
            self.role_ids[role] = vocabulary[token]
        self._role_texts = {self.role_ids[role]: token for role, token in self.role_tokens.items()}
        self._role_pattern = re.compile("|".join(re.escape(t) for t in self._role_texts.values()))

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
        return (HFTokenizer, (self._definition, self.role_tokens))

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
        token = self._backend.token_to_id(_BYTE_TO_CHAR[byte]) if self._byte_level else None
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
        return {"type": "hf", "json": self._definition, "role_tokens": dict(self.role_tokens)}


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


_BYTE_TO_CHAR = _byte_to_char()
_CHAR_TO_BYTE = {char: byte for byte, char in enumerate(_BYTE_TO_CHAR)}
