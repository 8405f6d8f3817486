"""Documents of a dataset on the Hugging Face hub, streamed (extra ``hub``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

from toolmem.data.text.documents import Placed, Split
from toolmem.data.text.sources import BadDocuments, OnBadDocument, is_held_out
from toolmem.errors import ToolmemError


class HubDocuments:
    """Documents of ``hf://OWNER/DATASET``, streamed: nothing is kept on disk.

    The order is the library's shuffle by (seed + epoch), so a position is a number of rows; a
    resumed run passes over the rows before it, which takes time but reads no tokens twice.

    Args:
        path: ``hf://OWNER/DATASET``, with ``?config=NAME`` for a configuration, ``?split=NAME`` for
            a split other than ``train``, joined by ``&``.
        field: the column with the text.
        split: as for `Documents`.
        val_fraction: share of the documents held out.
        shuffle: False keeps the dataset's order.
        seed: of the order.
        buffer: rows among which the library shuffles.
        on_bad_document: as for `Documents`; of a row without text. What the library cannot read ends all.

    Raises:
        ToolmemError: when the extra is missing, or the dataset cannot be reached.
    """

    def __init__(
        self,
        path: str,
        *,
        field: str = "text",
        split: Split = "all",
        val_fraction: float = 0.01,
        shuffle: bool = True,
        seed: int = 0,
        buffer: int = 10_000,
        on_bad_document: OnBadDocument = "fatal",
    ) -> None:
        parts = urlsplit(path)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        unknown = sorted(set(query) - {"config", "split"})
        self.name = f"{parts.netloc}{parts.path}".strip("/")
        if parts.scheme != "hf" or not self.name or unknown:
            raise ToolmemError(
                f"{path} is no dataset's address: write hf://OWNER/DATASET, or "
                "hf://OWNER/DATASET?config=NAME&split=NAME"
            )
        self.path = path
        self.config = query.get("config")
        self.hub_split = query.get("split", "train")
        self.field = field
        self.split = split
        self.val_fraction = val_fraction
        self.shuffle = shuffle
        self.seed = seed
        self.buffer = buffer
        self.on_bad_document = on_bad_document
        self._shard, self._shards = 0, 1
        _library()

    def _copy(self, **changes: Any) -> HubDocuments:
        copy = object.__new__(HubDocuments)
        copy.__dict__.update(self.__dict__, **changes)
        return copy

    def select(self, split: Split, shuffle: bool | None = None) -> HubDocuments:
        """The same dataset's other split."""
        return self._copy(split=split, shuffle=self.shuffle if shuffle is None else shuffle)

    def shard(self, number: int, of: int) -> HubDocuments:
        """The documents for reader ``number`` of ``of``."""
        return self._copy(_shard=number, _shards=of)

    @property
    def fingerprint(self) -> str:
        """The address: what is behind it cannot be seen without reading it."""
        return self.path

    @property
    def shards(self) -> dict[str, list[Any]]:
        """Nothing: the library lists them, and fetches what its dataset is today."""
        return {}

    def iterate(self, place: dict[str, Any] | None = None) -> Iterator[Placed]:
        """Documents without end, epoch after epoch, from ``place`` on."""
        epoch, first = (0, 0) if place is None else (place["epoch"], place["row"])
        bad = BadDocuments(self.on_bad_document)
        bad.count = 0 if place is None else place.get("bad", 0)
        found = place is not None
        while True:
            for row, text in self._rows(epoch, first, bad if epoch == 0 else None):
                found = True
                yield Placed(text, {"epoch": epoch, "row": row, "bad": bad.count})
            if not found:
                raise ToolmemError(f"{self.path}: no document for {self.split}")
            epoch, first, found = epoch + 1, 0, False

    def once(self) -> Iterator[str]:
        """Each document once."""
        for _, text in self._rows(0, 0, None):
            yield text

    def _rows(self, epoch: int, first: int, bad: BadDocuments | None) -> Iterator[tuple[int, str]]:
        bad = bad or BadDocuments(self.on_bad_document)
        try:
            dataset = _library().load_dataset(
                self.name, self.config, split=self.hub_split, streaming=True
            )
        except Exception as error:  # the library's errors have no common kind
            raise ToolmemError(
                f"{self.path} cannot be opened ({error}); check the name and the network, or fetch "
                "its Parquet files and name their folder"
            ) from error
        if self.shuffle:
            dataset = dataset.shuffle(seed=self.seed + epoch, buffer_size=self.buffer)
        for row, record in enumerate(dataset.skip(first) if first else dataset, start=first):
            if row % self._shards != self._shard:
                continue
            text = record.get(self.field)
            if not isinstance(text, str):
                bad.met(
                    lambda row=row: f"{self.path}, row {row + 1}",  # type: ignore[misc]
                    f"no text in the field {self.field!r} (it has {', '.join(record)})",
                    "set --data.text_field",
                )
            elif text and self._wanted(text):
                yield row, text

    def _wanted(self, text: str) -> bool:
        if self.split == "all":
            return True
        return is_held_out(text, self.val_fraction) == (self.split == "validation")


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ToolmemError(
            "hf:// datasets need the extra `hub`: pip install 'toolmem[hub]'"
        ) from error
    return datasets
