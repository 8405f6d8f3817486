"""How far a model has gone from the one it comes from: KL divergence and total variation of next tokens.

Over held-out text, at every position, exactly over the whole vocabulary in float64:

    kl          sum p (log p - log q), nats, p the base's distribution and q the model's
    kl_reverse  sum q (log q - log p)
    tv          half the sum of |p - q|

Logits are held for some positions at a time. The base's may be kept on disk instead of the base: the
``top_k`` likeliest tokens of each position (``BaseFile``). What is left of the vocabulary is then one token,
so that what is found is never more than the exact number, and is it for a ``top_k`` of the whole vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.evaluation.measures import Row, mean_over, ratio
from toolmem.evaluation.perplexity import Text, WindowExamples, batches, scored_states
from toolmem.evaluation.scoring import running

if TYPE_CHECKING:
    from toolmem.models import LanguageModel

NUMBERS = 1 << 22  # of a distribution in float64 held at once: 32 MiB each of some six
KINDS = ("kl", "kl_reverse", "tv")


def divergences(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL both ways and total variation of distributions.

    Args:
        log_p: (n, outcomes) float64 log-probabilities.
        log_q: the same of others.

    Returns:
        (3, n) float64: ``KINDS``.
    """
    p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
    # Of outcomes that neither has: 0 · (-inf + inf) is 0 here.
    kl = torch.where(p > 0, p * apart, 0.0).sum(1)
    reverse = torch.where(q > 0, -q * apart, 0.0).sum(1)
    # Roundings may leave what is never negative just below 0.
    return torch.stack([kl.clamp(min=0), reverse.clamp(min=0), (p - q).abs().sum(1) / 2])


class Base(Protocol):
    """What a model is compared with."""

    def check(self, text: Text, model: LanguageModel) -> None:
        """Raise ``ToolmemError`` where it cannot be compared on this text."""

    def prepare(self, numbers: Sequence[int], text: Text) -> None:
        """Make ready for some windows."""

    def compare(self, start: int, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare positions of the windows that it was made ready for.

        Args:
            start: the first of the positions, counted over these windows' targets.
            log_q: (n, vocab) float64, the model's.
            targets: (n,) int64.

        Returns:
            (3, n) divergences; (n,) float64, the base's log-probability of each target, nan where it is not
            known; (n,) bool, whether both think the same token the likeliest.
        """


class BaseModel:
    """The base as a model.

    Args:
        model: on the device of the other.
        invariant: as of ``Divergence``.
    """

    def __init__(self, model: LanguageModel, *, invariant: bool = False) -> None:
        self.model = model
        self._invariant = invariant
        self._states = torch.empty(0)

    def check(self, text: Text, model: LanguageModel) -> None:
        """Both must have one vocabulary."""
        if self.model.vocab_size != model.vocab_size:
            raise ToolmemError(
                f"divergence: the model has vocab_size {model.vocab_size} and the base "
                f"{self.model.vocab_size}: they must have one tokenizer"
            )
        longest = max(len(window.inputs) for window in text.windows)
        if longest > self.model.max_seq_len:
            raise ToolmemError(
                f"divergence: windows of {longest} tokens are longer than the base's max_seq_len "
                f"{self.model.max_seq_len}: choose a smaller window"
            )

    def prepare(self, numbers: Sequence[int], text: Text) -> None:
        """Run the windows."""
        with running(self.model, self._invariant):
            self._states = scored_states(self.model, [text.windows[n] for n in numbers])

    def log_probs(self, start: int, stop: int) -> Tensor:
        """(stop - start, vocab) float64."""
        with running(self.model, self._invariant):
            logits = self.model.logits(self._states[start:stop])
        return logits.double().log_softmax(1)

    def compare(self, start: int, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Exactly, over the vocabulary."""
        log_p = self.log_probs(start, start + len(log_q))
        same = log_p.argmax(1) == log_q.argmax(1)
        return divergences(log_p, log_q), log_p.gather(1, targets[:, None])[:, 0], same


def rest(log_probs: Tensor) -> Tensor:
    """(n, 1): log-probability of all that is not among some outcomes (n, k)."""
    left = 1 - log_probs.exp().sum(1, keepdim=True)
    return left.clamp(min=0).log()


class BaseFile:
    """The base's likeliest tokens of every position, from disk.

    Args:
        path: what ``write_base`` wrote.

    Raises:
        ToolmemError: when it is something else.
    """

    def __init__(self, path: str | Path) -> None:
        from toolmem.checkpoints.tensor_files import DamagedError, TensorFile

        self.path = Path(path)
        try:
            file = TensorFile(self.path)
            self.about = json.loads(file.metadata["toolmem.divergence"])
            self._tokens = file.read("tokens")
            self._log_probs = file.read("log_probs")
            file.close()
        except (DamagedError, OSError, KeyError, ValueError) as error:
            raise ToolmemError(
                f"{self.path} is no file of a base's likeliest tokens ({error}): write one by "
                "--store_base"
            ) from error
        self._starts = np.concatenate(([0], np.cumsum(self.about["targets"])))
        self._places = np.empty(0, np.int64)

    def check(self, text: Text, model: LanguageModel) -> None:
        """It must be of this text, cut so."""
        if self.about["vocab_size"] != model.vocab_size or self.about["text"] != text.digest():
            raise ToolmemError(
                f"divergence: {self.path} is of another text, window, stride or tokenizer: write it anew "
                "by --store_base"
            )

    def prepare(self, numbers: Sequence[int], text: Text) -> None:
        """Find the windows' positions."""
        ranges = [np.arange(self._starts[n], self._starts[n + 1]) for n in numbers]
        self._places = np.concatenate(ranges)

    def compare(self, start: int, log_q: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Over the kept tokens, and all others as one."""
        places = torch.from_numpy(self._places[start : start + len(log_q)])
        tokens = self._tokens[places].long().to(log_q.device)
        log_p = self._log_probs[places].double().to(log_q.device)
        kept = log_q.gather(1, tokens)
        known = tokens == targets[:, None]
        of_target = torch.where(known, log_p, -math.inf).amax(1)
        of_target = torch.where(known.any(1), of_target, math.nan)
        same = tokens[:, 0] == log_q.argmax(1)
        if tokens.shape[1] < log_q.shape[1]:
            log_p, kept = torch.cat((log_p, rest(log_p)), 1), torch.cat((kept, rest(kept)), 1)
        return divergences(log_p, kept), of_target, same


def write_base(path: str | Path, text: Text, model: LanguageModel, top_k: int) -> None:
    """Keep a base's likeliest tokens at every position of a text.

    Args:
        path: a safetensors file; (positions, top_k) ``tokens`` int32 and ``log_probs`` float32.
        text: what is read.
        model: the base.
        top_k: tokens a position; those of the whole vocabulary keep everything.

    Raises:
        ToolmemError: when it cannot be written.
    """
    from toolmem.checkpoints import tensor_files
    from toolmem.files import atomic_path

    if not 1 <= top_k <= model.vocab_size:
        raise ToolmemError(
            f"top_k is {top_k}: it must be from 1 to the vocabulary, {model.vocab_size}"
        )
    base = BaseModel(model)
    base.check(text, model)
    tokens, log_probs = [], []
    for numbers in batches(text, 0, len(text.windows), alone=False):
        base.prepare(numbers, text)
        total = sum(len(text.windows[number].targets) for number in numbers)
        step = max(1, NUMBERS // model.vocab_size)
        for start in range(0, total, step):
            found = base.log_probs(start, min(total, start + step)).topk(top_k, dim=1)
            tokens.append(found.indices.int().cpu())
            log_probs.append(found.values.float().cpu())
    about = {
        "vocab_size": model.vocab_size,
        "text": text.digest(),
        "targets": [len(window.targets) for window in text.windows],
    }
    with atomic_path(path) as temporary:
        tensor_files.write(
            temporary,
            {"tokens": torch.cat(tokens), "log_probs": torch.cat(log_probs)},
            {"toolmem.divergence": json.dumps(about)},
        )


def _loss(row: Row) -> float:
    return -float(row["log_prob"])


def _base_loss(row: Row) -> float:
    return math.nan if row["base_log_prob"] is None else -float(row["base_log_prob"])


MEASURES = (
    *(mean_over(name, f"{name}_sum", "tokens") for name in KINDS),
    mean_over("same_likeliest", "same", "tokens"),
    ratio("perplexity", _loss, lambda row: row["tokens"], np.exp),
    ratio("base_perplexity", _base_loss, lambda row: row["tokens"], np.exp),
    ratio("bits_per_byte", lambda row: _loss(row) / math.log(2), lambda row: row["bytes"]),
)


class Divergence(WindowExamples):
    """A text for a model and its base: an ``Examples``, of windows.

    Args:
        text: what is read.
        model: on any device.
        base: what it is compared with.
        invariant: a window is run by itself (float32 on a CPU; slower).

    Raises:
        ToolmemError: when they cannot be compared.
    """

    measures = MEASURES

    def __init__(
        self, text: Text, model: LanguageModel, base: Base, *, invariant: bool = False
    ) -> None:
        super().__init__(text, model, invariant=invariant)
        base.check(text, model)
        self.base = base

    def ask(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Rows of windows: sums, and ``kl``, ``kl_reverse`` and ``tv`` of every position."""
        for numbers in batches(self.text, start, stop, self._invariant):
            yield from self._compared(numbers)

    def _compared(self, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        windows = [self.text.windows[number] for number in numbers]
        with running(self.model, self._invariant):
            states = scored_states(self.model, windows)
        wanted = [token for window in windows for token in window.targets]
        targets = torch.tensor(wanted, device=states.device)
        self.base.prepare(numbers, self.text)
        step = max(1, NUMBERS // self.model.vocab_size)
        parts: list[list[Tensor]] = []
        for first in range(0, len(targets), step):
            own = targets[first : first + step]
            with running(self.model, self._invariant):
                logits = self.model.logits(states[first : first + step])
            log_q = logits.double().log_softmax(1)
            del logits
            apart, of_base, same = self.base.compare(first, log_q, own)
            mine = log_q.gather(1, own[:, None])[:, 0]
            parts.append([x.cpu() for x in (apart, mine, of_base, same)])
        apart = torch.cat([part[0] for part in parts], 1)
        mine, of_base, same = (torch.cat([part[i] for part in parts]) for i in (1, 2, 3))
        place = 0
        for number, window in zip(numbers, windows, strict=True):
            here = slice(place, place + len(window.targets))
            place = here.stop
            base_total = float(of_base[here].sum())
            row = {
                **self.text.about(number),
                "log_prob": float(mine[here].sum()),
                "base_log_prob": None if math.isnan(base_total) else base_total,
                "same": int(same[here].sum()),
            }
            for name, values in zip(KINDS, apart[:, here], strict=True):
                row[f"{name}_sum"] = float(values.sum())
                row[name] = [float(f"{value:.7g}") for value in values.tolist()]
            yield row


def by_position(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Means by place in the document: 0, 1, 2–3, 4–7, ... tokens before it.

    Args:
        rows: of ``Divergence``.

    Returns:
        for each stretch that there is: ``start``, ``tokens``, and the mean ``kl``, ``kl_reverse``, ``tv``.
    """
    found: dict[int, np.ndarray] = {}
    for row in rows:
        places = row["start"] + np.arange(row["tokens"])
        stretch = np.where(places > 0, np.frexp(places)[1], 0)
        for number in np.unique(stretch):
            mine = stretch == number
            sums = [float(np.array(row[name])[mine].sum()) for name in KINDS]
            found.setdefault(int(number), np.zeros(4))
            found[int(number)] += [mine.sum(), *sums]
    return [
        {
            "start": 2 ** (number - 1) if number else 0,
            "tokens": int(sums[0]),
            **{name: float(value / sums[0]) for name, value in zip(KINDS, sums[1:], strict=True)},
        }
        for number, sums in sorted(found.items())
    ]
