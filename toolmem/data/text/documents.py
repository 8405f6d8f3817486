"""Documents out of files, in an order that can be taken up anywhere.

::

    files -> chunks -> (per epoch) chunks in random order, cut into groups of about `shuffle_bytes`
          -> documents of a group in random order -> this split's -> this shard's

Every step is a function of (seed, epoch, group), so a position is three integers and a restart
reads one group. An epoch shows each document once. Shards take whole chunks where there are
plenty, else every n-th document. What cannot be read is passed over, if it is, before the order is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np

from toolmem.data.text.files import (
    check_unchanged,
    find_files,
    listed_identity,
    names_within,
)
from toolmem.data.text.sources import (
    BadDocuments,
    Chunk,
    OnBadDocument,
    fingerprint,
    is_held_out,
    list_chunks,
    read_chunk,
)
from toolmem.errors import ToolmemError

EMPTY_EPOCHS = (
    20  # in a row; of few chunks that hold a document, an epoch's order may give a reader none
)

Split = Literal["train", "validation", "all"]


class Placed(NamedTuple):
    """A document and where it is: ``place`` makes the source begin with it again."""

    text: str
    place: dict[str, Any]


class DocumentSource(Protocol):
    """What `TokenGenerator` reads: an endless stream of documents, seekable."""

    def shard(self, number: int, of: int) -> DocumentSource:
        """The same source for one of ``of`` readers; together they read every document once."""
        ...

    def iterate(self, place: dict[str, Any] | None = None) -> Iterator[Placed]:
        """Documents without end from ``place`` on (None: from the start)."""
        ...

    def once(self) -> Iterator[str]:
        """Each document once."""
        ...


class Documents:
    """Documents of JSONL, Parquet and text files.

    Args:
        path: a file, a folder, a glob, or a list of them, here or at addresses that fsspec knows. A ``.txt``
            file is one document.
        field: the Parquet column or JSON key with the text.
        split: ``train`` leaves out the documents held out, ``validation`` is those, ``all`` both.
            Which are held out depends on their text alone, so copies of one never part.
        val_fraction: share of the documents held out.
        shuffle: False keeps the files' order.
        shuffle_bytes: text held, and mixed, at once.
        seed: of the order.
        on_bad_document: ``fatal``, or ``skip``: a document that cannot be read is counted, told on stderr,
            and passed over.

    Raises:
        ToolmemError: for what is missing or cannot be read, naming file and line; for a file that has
            changed since it was listed.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        *,
        field: str = "text",
        split: Split = "all",
        val_fraction: float = 0.01,
        shuffle: bool = True,
        shuffle_bytes: int = 32 << 20,
        seed: int = 0,
        on_bad_document: OnBadDocument = "fatal",
    ) -> None:
        if seed < 0:
            raise ToolmemError(f"seed is {seed}: it must be 0 or more")
        if on_bad_document not in get_args(OnBadDocument):
            raise ToolmemError(
                f"on_bad_document is {on_bad_document!r}: choose one of "
                f"{', '.join(get_args(OnBadDocument))}"
            )
        self.files = find_files(path)
        self.identities = {file: listed_identity(file) for file in self.files}
        bad = BadDocuments(on_bad_document)
        self.chunks = list_chunks(self.files, bad)
        self.bad_files = bad.count
        self.on_bad_document = on_bad_document
        self.field = field
        self.split = split
        self.val_fraction = val_fraction
        self.shuffle = shuffle
        self.shuffle_bytes = shuffle_bytes
        self.seed = seed
        self._shard, self._shards = 0, 1

    def _copy(self, **changes: Any) -> Documents:
        copy = object.__new__(Documents)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def select(self, split: Split, shuffle: bool | None = None) -> Documents:
        """The same files' other split."""
        return self._copy(split=split, shuffle=self.shuffle if shuffle is None else shuffle)

    def shard(self, number: int, of: int) -> Documents:
        """The documents for reader ``number`` of ``of``; together they read every document once."""
        return self._copy(_shard=number, _shards=of)

    @property
    def fingerprint(self) -> str:
        """Digest of the files' names and sizes."""
        return fingerprint(self.chunks)

    @property
    def shards(self) -> dict[str, list[Any]]:
        """Path within the corpus -> [bytes, digest] of each file: what a resumed run must find again."""
        named = zip(names_within(self.files), self.files, strict=True)
        known = self.identities
        return {name: [known[file].size, known[file].digest] for name, file in named}

    def iterate(self, place: dict[str, Any] | None = None) -> Iterator[Placed]:
        """Documents without end, epoch after epoch.

        A place also tells how many ``bad`` documents of the corpus its reader had met in the first epoch.

        Args:
            place: where to begin, as a `Placed` has it; None is the start.

        Raises:
            ToolmemError: when a whole epoch has no document for this reader.
        """
        epoch, group, number, bad = (0, 0, 0, self.bad_files if self._shard == 0 else 0)
        if place is not None:
            epoch, group, number = place["epoch"], place["group"], place["document"]
            bad = place.get("bad", 0)
        found = counted = place is not None
        empty = 0 if found else EMPTY_EPOCHS - 1  # not in its first
        while True:
            groups = self._groups(epoch)
            for g in range(group, len(groups)):
                texts, unreadable = self._read_group(epoch, g, groups[g])
                if epoch == 0 and not counted:
                    bad += unreadable
                counted = False
                for i in range(number, len(texts)):
                    found = True
                    yield Placed(texts[i], {"epoch": epoch, "group": g, "document": i, "bad": bad})
                number = 0
            empty = 0 if found else empty + 1
            if empty == EMPTY_EPOCHS:
                raise ToolmemError(
                    f"{self._describe()}: no document for {self.split}"
                    + (f", reader {self._shard + 1} of {self._shards}" if self._shards > 1 else "")
                    + (f" ({bad:,} cannot be read, and were passed over)" if bad else "")
                    + "; use more data, fewer workers or devices, or another val_fraction"
                )
            epoch, group, found, counted = epoch + 1, 0, False, False

    def once(self) -> Iterator[str]:
        """Each document once, in the order of the first epoch."""
        for g, chunks in enumerate(self._groups(0)):
            yield from self._read_group(0, g, chunks)[0]

    def _describe(self) -> str:
        return str(self.files[0]) + (
            f" and {len(self.files) - 1} more" if len(self.files) > 1 else ""
        )

    @property
    def _by_chunk(self) -> bool:
        return len(self.chunks) >= 8 * self._shards

    def _groups(self, epoch: int) -> list[list[Chunk]]:
        chunks = self.chunks
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(chunks))
            chunks = [chunks[i] for i in order]
        if self._by_chunk:
            chunks = chunks[self._shard :: self._shards]
        groups: list[list[Chunk]] = []
        room = 0
        for chunk in chunks:
            if not groups or chunk.size > room:
                groups.append([])
                room = self.shuffle_bytes
            groups[-1].append(chunk)
            room -= chunk.size
        return groups

    def _read_group(self, epoch: int, group: int, chunks: list[Chunk]) -> tuple[list[str], int]:
        """The reader's documents of a group in their order, and its share of those that are bad."""
        bad = BadDocuments(self.on_bad_document)
        for file in dict.fromkeys(chunk.path for chunk in chunks):
            check_unchanged(file, self.identities[file])
        texts = [text for chunk in chunks for text in read_chunk(chunk, self.field, bad) if text]
        if self.split != "all":
            wanted = self.split == "validation"
            texts = [text for text in texts if is_held_out(text, self.val_fraction) == wanted]
        order = np.arange(len(texts))
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch, group, 1]).permutation(len(texts))
        if self._by_chunk:
            return [texts[i] for i in order], bad.count
        share = len(range(self._shard, bad.count, self._shards))
        return [texts[i] for i in order[self._shard :: self._shards]], share


def is_hub_dataset(path: str | Path | Sequence[str | Path]) -> bool:
    """Is this ``hf://OWNER/DATASET``? Files on the hub, ``hf://datasets/…``, are fsspec's."""
    return isinstance(path, str) and path.startswith("hf://") and path[5:14] != "datasets/"


def open_documents(path: str | Path | Sequence[str | Path], **options: Any) -> Any:
    """`HubDocuments` of ``hf://OWNER/DATASET``, else `Documents`; the options are the same."""
    if is_hub_dataset(path):
        from toolmem.data.text.hub import HubDocuments

        options.pop("shuffle_bytes", None)
        return HubDocuments(str(path), **options)
    return Documents(path, **options)
