"""Text to token ids and back, behind one protocol, with role tokens that no text can forge.

A role token says whose turn begins (or, ``end``, that the dialogue is over). It is an id that
`encode` never returns: text that reads ``<|database|>`` becomes the tokens of those twelve
characters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from toolmem.errors import ToolmemError

ROLE_TOKENS = {
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "database": "<|database|>",
    "end": "<|end|>",
}


@runtime_checkable
class Tokenizer(Protocol):
    """What every tokenizer offers.

    Args:
        vocab_size: number of ids, role tokens included.
        role_ids: role name (the keys of `ROLE_TOKENS`) -> id.
    """

    vocab_size: int
    role_ids: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; never a role token's."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; role tokens show as ``<|user|>``, broken UTF-8 as U+FFFD."""
        ...

    def encode_bytes(self, data: bytes) -> list[int]:
        """Token ids of any byte string."""
        ...

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``: the inverse of `encode_bytes`."""
        ...

    def spec(self) -> dict[str, Any]:
        """Plain data from which `tokenizer_from_spec` makes the same tokenizer again."""
        ...


class ByteTokenizer:
    """The 256 byte values, then the role tokens: ``vocab_size`` 260, as in arXiv 2508.20755."""

    def __init__(self) -> None:
        self.role_ids: dict[str, int] = {role: 256 + i for i, role in enumerate(ROLE_TOKENS)}
        self.vocab_size: int = 256 + len(ROLE_TOKENS)
        self._bytes = [bytes([i]) for i in range(256)]
        self._bytes += [token.encode() for token in ROLE_TOKENS.values()]

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of ``text`` (a lone surrogate becomes its three bytes)."""
        return list(text.encode("utf-8", "surrogatepass"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; role tokens show as ``<|user|>``, broken UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def encode_bytes(self, data: bytes) -> list[int]:
        """The byte values."""
        return list(data)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ``ids``: the inverse of `encode_bytes`.

        Raises:
            ToolmemError: for an id outside the vocabulary.
        """
        try:
            return b"".join([self._bytes[i] for i in ids])
        except IndexError:
            raise ToolmemError(
                f"a token id is outside the byte tokenizer's {self.vocab_size} ids"
            ) from None

    def spec(self) -> dict[str, Any]:
        """``{"type": "byte"}``."""
        return {"type": "byte"}


class SymbolTokenizer:
    """Numbered symbols without text of their own, for synthetic tasks: ``"12 7"`` is ids 12 and 7.

    Args:
        vocab_size: number of symbols. There are no role tokens.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size: int = vocab_size
        self.role_ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        """The numbers in ``text``.

        Raises:
            ToolmemError: for anything that is not a number of the vocabulary.
        """
        ids = []
        for word in text.split():
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise ToolmemError(
                    f"{word!r} is not a symbol: this task's text is numbers from 0 to "
                    f"{self.vocab_size - 1}, separated by spaces"
                )
            ids.append(int(word))
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The numbers, separated by spaces."""
        return " ".join(str(int(i)) for i in ids)

    def encode_bytes(self, data: bytes) -> list[int]:
        """The numbers in ``data`` read as ASCII."""
        return self.encode(data.decode("ascii", "replace"))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The numbers, separated by spaces, as ASCII."""
        return self.decode(ids).encode("ascii")

    def spec(self) -> dict[str, Any]:
        """``{"type": "symbols", "vocab_size": ...}``."""
        return {"type": "symbols", "vocab_size": self.vocab_size}


# path -> spec of the tokenizer in it: how rooms that data knows nothing of have theirs read (checkpoints)
readers: list[Callable[[str], Mapping[str, Any]]] = []


def make_tokenizer(name: str | None) -> Tokenizer:
    """The tokenizer that a recipe's ``tokenizer`` key names.

    Args:
        name: ``byte`` (so is None), the path of a ``tokenizer.json``, or a run's folder or a checkpoint
            whose tokenizer it is.

    Raises:
        ToolmemError: when the file is missing or is no tokenizer.
    """
    if name is None or name == "byte":
        return ByteTokenizer()
    path = Path(name)
    trained = path.suffix == ".ckpt" or (path.is_dir() and not (path / "tokenizer.json").is_file())
    if trained and readers:
        try:
            return tokenizer_from_spec(readers[0](name))
        except ToolmemError as error:
            raise ToolmemError(f"data.init_args.tokenizer: {error}") from error
    from toolmem.data.hf_tokenizer import HFTokenizer

    return HFTokenizer.from_file(name)


def tokenizer_from_spec(spec: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a checkpoint was trained with.

    Args:
        spec: what `Tokenizer.spec` returned.

    Raises:
        ToolmemError: for a type that this version does not know.
    """
    kind = spec.get("type")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "symbols":
        return SymbolTokenizer(int(spec["vocab_size"]))
    if kind == "hf":
        from toolmem.data.hf_tokenizer import HFTokenizer

        chat = spec.get("chat")
        if chat is not None and not isinstance(chat, Mapping):
            raise ToolmemError(f"a tokenizer's chat is {chat!r:.40}, which is no mapping")
        return HFTokenizer(spec["json"], spec["role_tokens"], chat=chat)
    raise ToolmemError(
        f"unknown tokenizer type {kind!r} (known: byte, symbols, hf): the checkpoint was written "
        "by another version of toolmem"
    )


def with_system(tokenizer: Tokenizer, system: str) -> Tokenizer:
    """A pretrained model's tokenizer whose dialogues open with another system's message.

    Args:
        tokenizer: one with a chat template.
        system: what it says.

    Raises:
        ToolmemError: for another tokenizer, or a template that takes no such message.
    """
    change = getattr(tokenizer, "with_system", None)
    if change is None:
        raise ToolmemError(
            "data.init_args.system: a system's message needs a pretrained model's chat template, and this "
            "tokenizer has none: leave it out"
        )
    changed: Tokenizer = change(system)
    return changed


def same_ids(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two tokenizers' ids mean the same, in whatever form they write dialogues.

    Args:
        one: a tokenizer's spec.
        other: another's.
    """
    return ids_alone(one) == ids_alone(other)


def ids_alone(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's spec without its form of dialogues, in which the same ids may stand otherwise."""
    return {key: value for key, value in spec.items() if key != "chat"}
