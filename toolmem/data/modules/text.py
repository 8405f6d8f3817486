"""Text for language modelling: one file, a corpus, or a dataset on the hub."""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from toolmem.console import stderr
from toolmem.data.hf_tokenizer import save_tokenizer, train_tokenizer
from toolmem.data.modules.base import HeldOut, StatefulDataModule
from toolmem.data.stream import make_loader
from toolmem.data.text.documents import DocumentSource, is_hub_dataset, open_documents
from toolmem.data.text.files import WHERE_FROM, check_unchanged, find_files
from toolmem.data.text.sources import OnBadDocument, read_chunk, whole_file
from toolmem.data.text.tokens import TokenGenerator, held_out_batches
from toolmem.data.text.windows import WindowGenerator
from toolmem.data.tokenizers import ByteTokenizer, Tokenizer, make_tokenizer
from toolmem.errors import ToolmemError
from toolmem.files import cache_folder

DEFAULT_VAL_BATCHES = 50
TOKENIZER_TRAINING_CHARS = 50_000_000
_ENCODED_AT_ONCE = 1 << 20


class TextDataModule(StatefulDataModule):
    """Text for language modelling, packed in full rows; every token bears loss.

    One ``.txt`` file is one long text, cut in windows at random offsets, its last part held out.
    Anything else is documents, which stand end to end with an end token between them; some of the
    documents are held out.

    Args:
        path: a .txt, .jsonl or .parquet file, a folder, a glob, a list of them, addresses of such (s3://,
            https://, hf://datasets/…: extra remote), or hf://OWNER/DATASET (extra hub). None takes the
            environment variable TOOLMEM_DATA.
        text_field: the Parquet column or JSON key that holds the text.
        tokenizer: byte, or the path of a tokenizer.json.
        train_tokenizer: train a byte-level BPE with this many ids on the training text instead,
            once; it is kept in the cache folder (TOOLMEM_CACHE, or ~/.cache/toolmem).
        seq_len: tokens in a row.
        batch_size: rows in a batch, over all devices.
        block_documents: attention stays within a document.
        val_fraction: share held out; None is 0.1 of one text file, 0.01 of the documents.
        val_path: validate on this data instead, and hold nothing out.
        val_batches: batches in validation at most; None is all of one text file, else 50.
        shuffle: False gives documents or windows in the files' order.
        seed: of the order.
        num_workers: processes that make batches.
        on_bad_document: fatal, or skip: a document that cannot be read is counted, told on stderr with file
            and line, and passed over.

    Raises:
        ToolmemError: for data that is missing or cannot be read, naming file and line; for files that have
            changed while the run trained, or since the checkpoint that it goes on from.
    """

    def __init__(
        self,
        path: str | list[str] | None = None,
        text_field: str = "text",
        tokenizer: str = "byte",
        train_tokenizer: int | None = None,
        seq_len: int = 256,
        batch_size: int = 32,
        block_documents: bool = False,
        val_fraction: float | None = None,
        val_path: str | list[str] | None = None,
        val_batches: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        on_bad_document: OnBadDocument = "fatal",
    ) -> None:
        super().__init__()
        path = path or os.environ.get("TOOLMEM_DATA")
        if not path:
            raise ToolmemError(
                f"data.init_args.path is not set: set --data.path, or the variable TOOLMEM_DATA; {WHERE_FROM}"
            )
        if train_tokenizer is not None and tokenizer != "byte":
            raise ToolmemError(
                f"data.init_args.tokenizer is {tokenizer} and data.init_args.train_tokenizer "
                f"{train_tokenizer}: set one"
            )
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ToolmemError(
                f"data.init_args.val_fraction is {val_fraction}: it must lie between 0 and 1"
            )
        if seq_len < 1 or batch_size < 1 or (val_batches is not None and val_batches < 1):
            raise ToolmemError(
                "data.init_args.seq_len, batch_size and val_batches must be at least 1"
            )
        self.path = path
        self.text_field = text_field
        self.train_tokenizer = train_tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.block_documents = block_documents
        self.val_path = val_path
        self.val_batches = val_batches
        self.shuffle = shuffle
        self.seed = seed
        self.num_workers = num_workers
        self.on_bad_document = on_bad_document
        self.one_text = _one_text_file(path)
        self.val_fraction = val_fraction or (0.1 if self.one_text else 0.01)
        self._chosen = None if train_tokenizer is not None else make_tokenizer(tokenizer)
        if self._chosen is not None and "end" not in self._chosen.role_ids:
            raise ToolmemError("data.init_args.tokenizer has no `end` token, which parts documents")
        if val_path is not None and not is_hub_dataset(val_path):
            find_files(val_path)  # missing data is better told before training than after
        self._documents  # noqa: B018

    # -- what there is

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, trained on the first use if it is to be trained."""
        return self._chosen or self._trained_tokenizer()

    @property
    def vocab_size(self) -> int:
        """Token ids there are."""
        return self.tokenizer.vocab_size

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {"tokenizer": self.tokenizer.spec(), "factbase": None, "setting": None}

    @cached_property
    def _documents(self) -> Any:
        """The documents, both splits (of one text file: only for its name and size)."""
        return open_documents(
            self.path,
            field=self.text_field,
            split="all",
            val_fraction=self.val_fraction,
            shuffle=self.shuffle,
            seed=self.seed,
            on_bad_document=self.on_bad_document,
        )

    @property
    def bad_documents(self) -> int:
        """Documents that cannot be read and were passed over, as far as this process has trained."""
        readers = (self._stream_state or {}).get("readers", {}).values()
        return sum(reader["document"].get("bad", 0) for reader in readers if reader)

    @property
    def _train_documents(self) -> DocumentSource:
        source: DocumentSource = self._documents.select("all" if self.val_path else "train")
        return source

    def _trained_tokenizer(self) -> Tokenizer:
        assert self.train_tokenizer is not None
        about = f"{self._documents.fingerprint} {self.text_field} {self.train_tokenizer} "
        about += f"{self.val_fraction} {self.val_path is None} {self.one_text} 1"
        name = f"bpe-{self.train_tokenizer}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
        path = cache_folder() / "tokenizers" / name
        if path.is_file():
            return make_tokenizer(str(path))
        stderr().print(f"training a tokenizer of {self.train_tokenizer:,} ids, once: {path}")
        tokenizer = train_tokenizer(self._tokenizer_texts(), self.train_tokenizer)
        save_tokenizer(tokenizer, path)
        return tokenizer

    def _tokenizer_texts(self) -> Any:
        if self.one_text:
            yield from _blocks(self._parts[0])
            return
        left = TOKENIZER_TRAINING_CHARS
        for text in self._train_documents.once():
            yield text
            left -= len(text)
            if left < 0:
                return

    # -- one text file

    @cached_property
    def _parts(self) -> tuple[str, str]:
        """The training and the held-out text of one text file, cut at the end of a line."""
        text = read_chunk(whole_file(Path(str(self._only_path))), self.text_field)[0]
        if self.val_path is not None:
            return text, ""
        cut = text.rfind("\n", 0, int(len(text) * (1 - self.val_fraction))) + 1
        cut = cut or int(len(text) * (1 - self.val_fraction))
        return text[:cut], text[cut:]

    @property
    def _only_path(self) -> str:
        return self.path if isinstance(self.path, str) else self.path[0]

    @cached_property
    def _sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of one text file: those to train on, and those held out."""
        if isinstance(self.tokenizer, ByteTokenizer):
            path = Path(self._only_path)
            if not path.stat().st_size:
                raise ToolmemError(f"{path} is empty: {WHERE_FROM}")
            # bytes are token ids already: nothing is read before it is used
            flat = np.asarray(np.memmap(path, np.uint8, mode="r"))
            cut = int(len(flat) * (1 - self.val_fraction)) if self.val_path is None else len(flat)
            return flat[:cut], flat[cut:]
        train, held_out = self._parts
        return self._encode(train), self._encode(held_out)

    def _encode(self, text: str) -> np.ndarray:
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        parts = [np.array(self.tokenizer.encode(block), dtype) for block in _blocks(text)]
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    # -- batches

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise one text file; documents are read as they are needed."""
        if self.one_text:
            _ = self._sequences

    def signature(self) -> dict[str, Any]:
        """What decides which batch is the n-th."""
        spec = repr(sorted(self.tokenizer.spec().items()))
        signature = {
            "path": self._documents.fingerprint,
            "text_field": self.text_field,
            "tokenizer": hashlib.sha256(spec.encode()).hexdigest()[:16],
            "seq_len": self.seq_len,
            "batch_size": self.batch_size,
            "val_fraction": self.val_fraction if self.val_path is None else None,
            "shuffle": self.shuffle,
            "seed": self.seed,
        }
        if self.on_bad_document != "fatal":  # with which the n-th batch is another
            signature["on_bad_document"] = self.on_bad_document
        if not self.one_text:
            signature["num_workers"] = max(1, self.num_workers)
        return signature

    def resume_state(self, same_world: bool = False) -> dict[str, Any] | None:
        """As of every DataModule; and the files must be those that the checkpoint's run read.

        Raises:
            ToolmemError: when they are not, naming one.
        """
        before = (self._loaded or {}).get("shards")
        if before:
            self._check_shards(before)
        return super().resume_state(same_world)

    def _check_shards(self, before: dict[str, list[Any]]) -> None:
        now = self._documents.shards
        for what, names in (
            ("is gone", [name for name in before if name not in now]),
            ("is new", [name for name in now if name not in before]),
            (
                "has changed",
                [name for name in before if name in now and list(now[name]) != list(before[name])],
            ),
        ):
            if names:
                more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
                raise ToolmemError(
                    f"cannot resume from {self._came_from}: data.init_args.path: {names[0]}{more} {what} "
                    f"since its run read it ({len(before):,} files then, {len(now):,} now): the batches that "
                    "follow would be others; put the files back as they were, or start a new run"
                )

    def _stream(self) -> TokenGenerator:
        rank, world = self.rank_and_world
        if self.batch_size % world:
            raise ToolmemError(
                f"data.init_args.batch_size {self.batch_size} is over all devices, and cannot be shared "
                f"equally by {world}: choose a multiple"
            )
        return TokenGenerator(
            self._train_documents,
            self.tokenizer,
            self.seq_len,
            self.batch_size // world,
            block_documents=self.block_documents,
            rank=rank,
            world_size=world,
            num_workers=self.num_workers,
        )

    def _windows(
        self, tokens: np.ndarray, numbers: np.ndarray | None, shuffle: bool, source: str
    ) -> WindowGenerator:
        rank, world = self.rank_and_world
        return WindowGenerator(
            tokens,
            self.seq_len,
            self.batch_size,
            numbers=numbers,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world,
            source=source,
        )

    def train_dataloader(self) -> Any:
        """The endless training stream, from where a loaded state says."""
        _ = self.model_looks_both_ways  # refuses a model that does
        if self.one_text:
            windows = self._windows(self._sequences[0], None, self.shuffle, str(self.path))
            state = self.resume_state()
            if state is not None:
                windows.load_state_dict(state)
            return make_loader(windows, self.num_workers)
        stream = self._stream()
        state = self.resume_state(same_world=True)
        if state is not None:
            stream.load_state_dict(state["ranks"][stream.rank] if "ranks" in state else state)
        self._text_stream = stream
        self._stream_state = stream.state_dict()
        return make_loader(stream, self.num_workers)

    def consumed(self, state: dict[str, Any]) -> None:
        """Training is done with the batch that carried ``state``."""
        if not self.one_text:
            state = self._text_stream.merge_state(self._stream_state or {}, state)
        self._stream_state = state

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which training goes on; of documents, every rank's place in its own."""
        state = super().state_dict() | {"shards": self._documents.shards}
        import torch.distributed as dist

        if self.one_text:  # documents are looked at whenever some are read
            for file, before in self._documents.identities.items():
                check_unchanged(file, before)
        if not self.one_text and dist.is_available() and dist.is_initialized():
            places: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(places, (self.rank_and_world[0], state["stream"]))
            state["stream"] = {"ranks": [place for _, place in sorted(dict(places).items())]}
        return state

    def val_dataloader(self) -> Any:
        """The held-out text or documents, each token once."""
        limit = self.val_batches
        if self.one_text and self.val_path is None:
            tokens, numbers, source = self._sequences[1], None, f"the held-out part of {self.path}"
        else:
            limit = limit or DEFAULT_VAL_BATCHES
            documents = self._documents.select("validation", shuffle=False)
            source = f"{self.val_fraction:.2%} of the documents of {self.path}, held out"
            if self.val_path is not None:
                documents = open_documents(
                    self.val_path,
                    field=self.text_field,
                    shuffle=False,
                    on_bad_document=self.on_bad_document,
                )
                source = str(self.val_path)
            tokens, numbers = held_out_batches(
                documents, self.tokenizer, self.seq_len, self.batch_size, max_batches=limit
            )
        blocked = numbers if self.block_documents else None
        windows = self._windows(tokens, blocked, False, source)
        return HeldOut(windows, min(windows.batches_per_epoch, limit or windows.batches_per_epoch))


def _one_text_file(path: str | list[str]) -> bool:
    if is_hub_dataset(path):
        return False
    only = path if isinstance(path, str) else path[0] if len(path) == 1 else ""
    return only.endswith(".txt") and Path(only).is_file()


def _blocks(text: str) -> Any:
    """A long text in pieces that end with a line, to be encoded one by one."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + _ENCODED_AT_ONCE) + 1 or len(text)
        yield text[start:stop]
        start = stop
