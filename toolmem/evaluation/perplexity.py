"""Perplexity of running text by a sliding window, and bits per byte, by which tokenizers compare.

Each token is predicted once, from as many tokens before it as the window holds: the first window predicts
all of its tokens, and each further one, ``stride`` tokens on, its last ``stride``. With a stride as long as
the window these are the windows of lm-eval's ``loglikelihood_rolling``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolmem.data.text.documents import open_documents
from toolmem.errors import ToolmemError
from toolmem.evaluation.answers import digest_of
from toolmem.evaluation.measures import Row, ratio
from toolmem.evaluation.scoring import first_token, running, token_log_probs
from toolmem.generation.invariance import check_invariant

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel

BATCH_TOKENS = 2048  # read in one pass, at most, but for a window longer than that


class Window(NamedTuple):
    """A stretch of a text that is read by itself.

    Args:
        inputs: what is read.
        targets: what its last positions are to predict.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def rolling_windows(
    tokens: Sequence[int], longest: int, stride: int, first: int
) -> Iterator[Window]:
    """Windows that predict each token once.

    Args:
        tokens: of a text.
        longest: tokens that are read at once, at most.
        stride: tokens that a window predicts beyond the one before it.
        first: the token before the text.
    """
    whole = [first, *tokens]
    done = 0
    while done < len(tokens):
        new = min(stride if done else longest, len(tokens) - done)
        stop = done + new
        yield Window(tuple(whole[max(0, stop - longest) : stop]), tuple(whole[done + 1 : stop + 1]))
        done = stop


@dataclass(frozen=True)
class Text:
    """Documents as windows.

    Args:
        windows: all of them.
        documents: of each window, the number of its document from 0.
        starts: of each window, the place of its first target in the document, in tokens.
        bytes: of each window, its share of the document's UTF-8 bytes, by tokens.
    """

    windows: tuple[Window, ...]
    documents: tuple[int, ...]
    starts: tuple[int, ...]
    bytes: tuple[float, ...]

    def digest(self) -> str:
        """Of the tokens, and how they are cut."""
        return digest_of(" ".join(map(str, (*w.inputs, "|", *w.targets))) for w in self.windows)

    def about(self, number: int) -> dict[str, Any]:
        """What a window's row begins with."""
        return {
            "document": self.documents[number],
            "start": self.starts[number],
            "tokens": len(self.windows[number].targets),
            "bytes": self.bytes[number],
        }


def cut_text(
    texts: Iterable[str],
    tokenizer: Tokenizer,
    *,
    longest: int,
    stride: int | None = None,
    limit: int | None = None,
) -> Text:
    """Documents cut into windows.

    Args:
        texts: of the documents.
        tokenizer: the model's.
        longest: tokens of a window.
        stride: by how many it moves; ``longest`` when None.
        limit: the first so many windows alone; all when None.

    Raises:
        ToolmemError: for a stride that makes no sense, or no text.
    """
    stride = longest if stride is None else stride
    if longest < 1 or not 1 <= stride <= longest:
        raise ToolmemError(f"stride is {stride}: it must be from 1 to the window, {longest} tokens")
    first = first_token(tokenizer)
    windows, documents, starts, sizes = [], [], [], []
    for number, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        of_text = tokens if first is not None else tokens[1:]
        per_token = len(text.encode("utf-8", "surrogatepass")) / max(1, len(of_text))
        place = 0
        begin = tokens[0] if first is None and tokens else first
        for window in rolling_windows(of_text, longest, stride, begin or 0):
            windows.append(window)
            documents.append(number)
            starts.append(place)
            sizes.append(per_token * len(window.targets))
            place += len(window.targets)
            if limit is not None and len(windows) >= limit:
                break
        if limit is not None and len(windows) >= limit:
            break
    if not windows:
        raise ToolmemError("there is no text to measure")
    return Text(tuple(windows), tuple(documents), tuple(starts), tuple(sizes))


def read_text(path: str | Path, tokenizer: Tokenizer, **options: Any) -> Text:
    """``cut_text`` of a file: text (one document), or JSONL or Parquet with a field ``text``.

    Raises:
        ToolmemError: when it is missing, empty or cannot be read, naming file and line.
    """
    documents = open_documents(str(path), shuffle=False)
    try:
        return cut_text(documents.once(), tokenizer, **options)
    except ToolmemError as error:
        raise ToolmemError(f"{path}: {error}") if "no text" in str(error) else error from error


def _loss(row: Row) -> float:
    return -float(row["log_prob"])


MEASURES = (
    ratio("perplexity", _loss, lambda row: row["tokens"], np.exp),
    ratio("bits_per_byte", lambda row: _loss(row) / math.log(2), lambda row: row["bytes"]),
)


def batches(text: Text, start: int, stop: int, alone: bool) -> Iterator[list[int]]:
    """Numbers of windows that are read together: neighbours, of one length.

    Args:
        text: whose windows.
        start: the first.
        stop: behind the last.
        alone: each by itself.
    """
    batch: list[int] = []
    for number in range(start, stop):
        width = len(text.windows[number].inputs)
        fits = batch and len(text.windows[batch[0]].inputs) == width
        if batch and (alone or not fits or (len(batch) + 1) * width > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def scored_states(model: LanguageModel, windows: Sequence[Window]) -> Tensor:
    """What the head reads where windows of one length predict their targets, (targets, dim).

    Args:
        model: in evaluation mode.
        windows: of one length.
    """
    tokens = torch.tensor(
        [window.inputs for window in windows], device=model.embedding.weight.device
    )
    hidden = model.hidden(tokens)
    return torch.cat(
        [own[-len(window.targets) :] for own, window in zip(hidden, windows, strict=True)]
    )


class WindowExamples:
    """A text for a model, an example a window; what is found of each is the subclass's.

    Args:
        text: what is read.
        model: on any device.
        invariant: a window is run by itself (float32 on a CPU; slower).

    Raises:
        ToolmemError: for ``invariant`` with a model that cannot be.
    """

    def __init__(self, text: Text, model: LanguageModel, *, invariant: bool = False) -> None:
        if invariant:
            check_invariant(model)
        self.text = text
        self.model = model
        self._invariant = invariant

    def __len__(self) -> int:
        return len(self.text.windows)

    @cached_property
    def _digest(self) -> str:
        return self.text.digest()

    def digest(self) -> str:
        """Of the tokens, and how they are cut."""
        return self._digest


class Perplexity(WindowExamples):
    """How well a model foretells a text: an ``Examples``, of windows."""

    measures = MEASURES

    def ask(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows of windows: ``log_prob`` in nats, ``tokens``, ``bytes``."""
        for numbers in batches(self.text, start, stop, self._invariant):
            windows = [self.text.windows[number] for number in numbers]
            with running(self.model, self._invariant):
                states = scored_states(self.model, windows)
                wanted = [token for window in windows for token in window.targets]
                targets = torch.tensor(wanted, device=states.device)
                found, _ = token_log_probs(self.model, states, targets)
            parts = found.double().split([len(window.targets) for window in windows])
            for number, part in zip(numbers, parts, strict=True):
                yield {**self.text.about(number), "log_prob": float(part.sum())}
