"""How likely a model takes given texts to be after others: log-likelihoods of continuations.

What continuations share is read once. The beginning that all contexts of a task have (few-shot examples)
is the *trunk*; a context is read on top of it, its continuations on top of the context, each lane beginning
with a copy of the decoding state. So it works for every architecture that has one. The head is asked at
the places that are scored, and nowhere else.

    trunk ──┬── context a ──┬── continuation 0
            │               └── continuation 1
            └── context b ──┬── continuation 0   ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from toolmem.data.hf_tokenizer import HFTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation.invariance import check_invariant
from toolmem.generation.planning import pass_overhead, passes
from toolmem.generation.reference import evaluating
from toolmem.models import kernels

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel
    from toolmem.models.cache import Cache

PASS_TOKENS = 2048  # of a pass, padding included, at most
STATE_TOKENS = 8192  # that the lanes of a pass have room for in their decoding state, at most
LOGITS = 1 << 24  # numbers of the head's output held at once: 64 MiB in float32
MIN_TRUNK = 8  # tokens that contexts share, from which on reading them once pays

Tokens = tuple[int, ...]


class Pair(NamedTuple):
    """What is scored: the continuation's tokens, each given all before it.

    Args:
        context: token ids, one at least.
        continuation: token ids, one at least.
    """

    context: Tokens
    continuation: Tokens


class Likelihood(NamedTuple):
    """What a continuation costs.

    Args:
        log_probs: of each of its tokens, nats.
        greedy: each is the likeliest.
    """

    log_probs: tuple[float, ...]
    greedy: bool

    @property
    def total(self) -> float:
        """The continuation's log-likelihood, nats."""
        return float(np.sum(self.log_probs, dtype=np.float64))


def token_log_probs(model: LanguageModel, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of given next tokens, the head's output never held as a whole.

    Args:
        model: whose head it is.
        states: (n, dim), what the head reads.
        targets: (n,) int64.

    Returns:
        (n,) float32 nats, and (n,) bool, whether the target is the likeliest; both on the host.
    """
    rows = max(1, LOGITS // model.vocab_size)
    found, hits = [], []
    for part, wanted in zip(states.split(rows), targets.split(rows), strict=True):
        alone = len(part) == 1  # one row would be summed by several threads, in another order
        logits = model.logits(part.expand(2, -1) if alone else part).float()
        chosen = logits.gather(1, wanted.expand(len(logits))[:, None])[:, 0]
        found.append((chosen - logits.logsumexp(dim=1))[: len(part)].cpu())
        hits.append((logits.argmax(dim=1)[: len(part)] == wanted).cpu())
    if not found:
        return torch.empty(0), torch.empty(0, dtype=torch.bool)
    return torch.cat(found), torch.cat(hits)


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, empty: int | None = None
) -> Pair:
    """Tokens of a context and of what follows it, cut as lm-eval cuts them.

    The whole is encoded and cut where the context alone would end; spaces at the context's end are the
    continuation's.

    Args:
        tokenizer: the model's.
        context: may be empty where ``empty`` says what stands for it.
        continuation: the text to score.
        empty: the token before a text with nothing before it.

    Raises:
        ToolmemError: when nothing is left to score, or to score it by.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    whole = tokenizer.encode(stripped + continuation)
    before = tokenizer.encode(stripped) if stripped else []
    after = whole[len(before) :]
    if before:
        before = [*prefix_of(tokenizer), *before]
    elif empty is None:
        raise ToolmemError("the context is empty, and the tokenizer has no token to begin with")
    else:
        before = [empty]
    if not after:
        raise ToolmemError(f"there is nothing to score in {continuation!r} behind the context")
    return Pair(tuple(before), tuple(after))


def first_token(tokenizer: Tokenizer) -> int | None:
    """The token that a text with nothing before it is scored after, as lm-eval chooses it.

    Of a pretrained model the one that begins a text, else the one that ends it; of others the one that ends
    dialogues.
    """
    if isinstance(tokenizer, HFTokenizer):
        for name in ("bos_token", "eos_token"):
            if (found := tokenizer.special_id(name)) is not None:
                return found
    return tokenizer.role_ids.get("end")


def prefix_of(tokenizer: Tokenizer) -> list[int]:
    """What a text by itself begins with as its model was trained; mostly nothing."""
    return tokenizer.prefix_ids if isinstance(tokenizer, HFTokenizer) else []


def fitted(pair: Pair, longest: int) -> Pair:
    """A pair whose context is cut on the left to what a model can look at.

    Args:
        pair: of any length.
        longest: tokens that the model can take; the last of the continuation is not read.

    Raises:
        ToolmemError: for a continuation that leaves no room for a token of context.
    """
    room = longest + 1 - len(pair.continuation)
    if room < 1:
        raise ToolmemError(
            f"a continuation of {len(pair.continuation)} tokens does not fit the model's max_seq_len "
            f"{longest}"
        )
    return pair if len(pair.context) <= room else Pair(pair.context[-room:], pair.continuation)


def shared_beginning(contexts: Sequence[Tokens]) -> int:
    """How many first tokens all contexts share, their last ones left aside."""
    if not contexts:
        return 0
    low, high = min(contexts), max(contexts)  # whatever both begin with, all between begin with
    pairs = zip(low, high, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(0, min(shared, min(map(len, contexts)) - 1))


@contextmanager
def running(model: LanguageModel, invariant: bool = False) -> Iterator[None]:
    """In here a model runs for its numbers alone: no dropout, no gradients, its linear layers by the kernels.

    Args:
        model: its mode is put back.
        invariant: linear layers give a row the same bits whatever is beside it.
    """
    with kernels.accelerate(model, invariant=invariant), evaluating(model), torch.no_grad():
        yield


class Scorer:
    """Log-likelihoods under one model. Use it within ``with``.

    Args:
        model: of any architecture, on any device.
        invariant: every lane is run by itself, so that its numbers hang on nothing beside it, bit for
            bit (float32 on a CPU; slower).

    Raises:
        ToolmemError: for a model that cannot be invariant.
    """

    def __init__(self, model: LanguageModel, *, invariant: bool = False) -> None:
        if invariant:
            check_invariant(model)
        self.model = model
        self.invariant = invariant
        self.device = model.embedding.weight.device
        self._overhead = pass_overhead(model)
        self._trunk: Tokens = ()
        self._trunk_cache: Cache | None = None

    def share(self, pairs: Sequence[Pair]) -> None:
        """Read what all contexts of a task begin with, to be gone on from by each.

        Args:
            pairs: all that are going to be scored, or more.
        """
        self._trunk, self._trunk_cache = (), None
        contexts = list({pair.context for pair in pairs})
        length = shared_beginning(contexts)
        # Attention that looks both ways within what the model did not write reads contexts whole.
        if len(contexts) < 2 or length < MIN_TRUNK or self.model.attention_mask == "prefix":
            return
        self._trunk = contexts[0][:length]
        cache = self.model.new_cache(1, length)
        with running(self.model, self.invariant):
            for part in torch.tensor([self._trunk], device=self.device).split(PASS_TOKENS, dim=1):
                self.model.hidden(part, cache=cache)
        self._trunk_cache = cache

    def score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The likelihood of each continuation after its context.

        Args:
            pairs: that fit the model (``fitted``); those of one context cost little more than one.

        Returns:
            one a pair, in order.
        """
        by_context: dict[Tokens, list[int]] = {}
        for number, pair in enumerate(pairs):
            by_context.setdefault(pair.context, []).append(number)
        found: list[Likelihood | None] = [None] * len(pairs)
        with running(self.model, self.invariant):
            for contexts in self._parts(list(by_context)):
                numbers = [by_context[context] for context in contexts]
                scored = self._score_contexts(
                    contexts, [[pairs[n].continuation for n in own] for own in numbers]
                )
                for own, likelihoods in zip(numbers, scored, strict=True):
                    for number, likelihood in zip(own, likelihoods, strict=True):
                        found[number] = likelihood
        assert all(one is not None for one in found)
        return found  # type: ignore[return-value]

    def _parts(self, contexts: list[Tokens]) -> Iterator[list[Tokens]]:
        """Contexts of about one length, read in one pass each."""
        lengths = [len(context) for context in contexts]
        for lanes in self._passes(lengths, max(lengths, default=1)):
            yield [contexts[lane] for lane in lanes]

    def _passes(self, lengths: Sequence[int], room: int) -> Iterator[list[int]]:
        """Which lanes, each with so much room in its state, are read together."""
        if self.invariant:
            yield from ([lane] for lane in range(len(lengths)))
            return
        if not lengths:
            return
        counts = np.array(lengths, np.int64)
        for group in passes(np.arange(len(counts)), counts, self._overhead):
            most = max(1, min(PASS_TOKENS // int(group.counts[0]), STATE_TOKENS // room))
            for start in range(0, len(group.lanes), most):
                yield group.lanes[start : start + most].tolist()

    def _score_contexts(
        self, contexts: list[Tokens], continuations: list[list[Tokens]]
    ) -> list[list[Likelihood]]:
        """Read contexts in one pass, then what follows each.

        Returns:
            likelihoods of each context's continuations.
        """
        reads = [list(dict.fromkeys(c[:-1] for c in own if len(c) > 1)) for own in continuations]
        room = max(len(c) for c in contexts) + max(
            (len(r) for own in reads for r in own), default=0
        )
        rest = [self._without_trunk(context) for context in contexts]
        cache = self._begin(len(contexts), room)
        hidden = self._read(rest, cache, foreign=True)
        at = torch.tensor([len(tokens) - 1 for tokens in rest], device=self.device)
        states = [hidden[torch.arange(len(rest), device=self.device), at]]
        # (context, tokens read of the continuation) -> the row that the head reads for each token
        rows: dict[tuple[int, Tokens], int] = {}
        total = len(rest)
        lanes = [(number, read) for number, own in enumerate(reads) for read in own]
        for group in self._passes([len(read) for _, read in lanes], room):
            chosen = [lanes[lane] for lane in group]
            owners = torch.tensor([number for number, _ in chosen], device=self.device)
            hidden = self._read([r for _, r in chosen], cache.detach(owners, self.device))
            for row, (number, read) in enumerate(chosen):
                rows[number, read] = total
                total += len(read)
                states.append(hidden[row, : len(read)])
        places: list[int] = []
        targets: list[int] = []
        owners_of: list[tuple[int, int]] = []
        for number, own in enumerate(continuations):
            for continuation in own:
                read = continuation[:-1]
                start = rows[number, read] if read else 0
                places += [number, *range(start, start + len(read))]
                targets += continuation
                owners_of.append((number, len(continuation)))
        index = torch.tensor(places, device=self.device)
        log_probs, hits = token_log_probs(
            self.model, torch.cat(states)[index], torch.tensor(targets, device=self.device)
        )
        scored: list[list[Likelihood]] = [[] for _ in contexts]
        sizes = [size for _, size in owners_of]
        for (number, _), mine, right in zip(
            owners_of, log_probs.split(sizes), hits.split(sizes), strict=True
        ):
            scored[number].append(Likelihood(tuple(mine.tolist()), bool(right.all())))
        return scored

    def _without_trunk(self, context: Tokens) -> Tokens:
        if self._trunk_cache is None:
            return context
        length = len(self._trunk)
        if context[:length] != self._trunk or len(context) == length:
            raise ToolmemError(
                "a context does not begin as those did that Scorer.share was told of"
            )
        return context[length:]

    def _begin(self, lanes: int, room: int) -> Cache:
        """Decoding state of so many lanes that have read the trunk."""
        if self._trunk_cache is None:
            return self.model.new_cache(lanes, room)
        first = torch.zeros(lanes, dtype=torch.int64, device=self.device)
        cache = self._trunk_cache.detach(first, self.device)
        cache.reserve(room)
        return cache

    def _read(self, lanes: Sequence[Tokens], cache: Cache, foreign: bool = False) -> Tensor:
        """Run tokens on top of a state, (lanes, longest, dim)."""
        lengths = [len(tokens) for tokens in lanes]
        width = max(lengths)
        chunk = torch.zeros(len(lanes), width, dtype=torch.int64)
        for row, tokens in enumerate(lanes):
            chunk[row, : len(tokens)] = torch.tensor(tokens)
        counts = None if min(lengths) == width else torch.tensor(lengths, device=self.device)
        spans = None
        if self.model.attention_mask == "prefix":
            spans = torch.full_like(chunk, 0 if foreign else -1).to(self.device)
        return self.model.hidden(chunk.to(self.device), cache=cache, counts=counts, spans=spans)
