"""FLOPs of a language model at any shape of batch, without running it.

A pass is made on tensors that have shapes and no numbers, once forward and once backward. For a model
that is on a device those are fake ones (``FakeTensorMode``), so that the kernels are that device's; for
a model on the meta device they are the meta device's, which has plain kernels only: exact FLOPs are the
same, executed ones are those of plain attention. A model that looks at its numbers (experts that are
chosen one by one) is run for real instead, with its state left as it was.

Shapes: b batch, s seq.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from toolmem.models.context import Extras
from toolmem.models.flop_work import PairCount, Tally, Work, merged
from toolmem.models.flops import FlopCounter, follow_groups

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel

# (window, seq) -> pairs of tokens that see each other in a batch: window as attention's, seq the
# longest that a row may be.
Pairs = Callable[[int, int], int]
# (model, like) -> results, where like(*shape, dtype=...) makes inputs.
Call = Callable[["LanguageModel", Callable[..., Tensor]], list[Tensor]]


@dataclass(frozen=True)
class BodyCount:
    """FLOPs of the body, all but the head, of whole rows.

    Args:
        rows: number of rows.
        seq: tokens in a row.
        forward: what grows with the tokens alone, the same for each.
        backward: the same of the backward pass.
        pairs: attention, and what is computed otherwise than the mathematics asks for it. Modules that
            predict more tokens are here too, whose rows are shorter.
        groups: ``forward`` by ``parameter_group``.
        unknown: operations that are not counted: name -> calls.
        recomputed: what checkpointed blocks (``recompute.py``) do again, attention apart; executed only.
    """

    rows: int
    seq: int
    forward: int
    backward: int
    pairs: tuple[PairCount, ...]
    groups: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)
    recomputed: int = 0

    def at(self, rows: int, seq: int) -> BodyCount:
        """What this would be at another shape if it grew with the tokens, and attention with pairs."""
        share = Fraction(rows * seq, self.rows * self.seq)
        return replace(
            self,
            rows=rows,
            seq=seq,
            forward=int(self.forward * share),
            backward=int(self.backward * share),
            recomputed=int(self.recomputed * share),
            pairs=tuple(
                pair.at(Fraction(rows, self.rows), seq - (self.seq - pair.seq))
                for pair in self.pairs
                if seq > self.seq - pair.seq
            ),
            groups={name: int(flops * share) for name, flops in self.groups.items()},
        )

    def same_work(self, other: BodyCount) -> bool:
        """Are the FLOPs equal?"""
        executed = (self.recomputed, set(self.pairs)) == (other.recomputed, set(other.pairs))
        return executed and self.same_mathematics(other)

    def same_mathematics(self, other: BodyCount) -> bool:
        """Are the exact FLOPs equal, whatever was executed?"""
        return self._asked() == other._asked()

    def _asked(self) -> tuple[Any, ...]:
        pairs: Counter[tuple[Any, ...]] = Counter()
        for pair in self.pairs:
            for part in ("forward", "backward"):
                pairs[pair.group, pair.window, pair.seq, part] += getattr(pair, part)
        return self.forward, self.backward, pairs

    def exact(self, n_tokens: int, pairs: Pairs, backward: bool = True) -> int:
        """What the mathematics asks for.

        Args:
            n_tokens: tokens that are not padding.
            pairs: pairs of tokens that see each other.
            backward: with the backward pass.
        """
        flops = self.forward + (self.backward if backward else 0)
        found = flops * n_tokens // (self.rows * self.seq)  # without a rest: tokens are alike
        for pair in self.pairs:
            each = pair.forward + (pair.backward if backward else 0)
            found += each * pairs(pair.window, pair.seq)
        return found

    def executed(self) -> int:
        """What the machine is given to do, forward and backward."""
        done_once = self.forward + self.backward
        return done_once + self.recomputed + sum(pair.executed for pair in self.pairs)


def seen_pairs(lengths: Tensor, window: int = 0) -> int:
    """Pairs of a token and one that it sees, causally: min(i, window) for the i-th token of each.

    Args:
        lengths: (n,) int64, tokens of each document.
        window: how many tokens back a token sees, itself included; 0 for all.
    """
    pairs = lengths * (lengths + 1) // 2
    if window:
        beyond = (lengths - window).clamp(min=0)
        pairs = pairs - beyond * (beyond + 1) // 2
    return int(pairs.sum())


def full_row(window: int, seq: int) -> int:
    """The pairs of one row that is full."""
    return seen_pairs(torch.tensor([seq]), window)


def run_lengths(ids: Tensor) -> Tensor:
    """How many tokens of each row share each id of 0 and up.

    Args:
        ids: (b, s) integers; below 0 where there is nothing.

    Returns:
        (n,) int64, some of them 0.
    """
    wide = ids.long()
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None] * (int(wide.max()) + 1)
    return torch.bincount((wide + rows)[wide >= 0])


def span_pairs(spans: Tensor, window: int = 0) -> int:
    """Pairs of a token and a later one that it sees, both being of one span.

    Args:
        spans: (b, s) int64: ids of 0 and up of spans seen both ways, -1 elsewhere.
        window: how far attention looks; 0 for all.
    """
    lengths = run_lengths(spans)
    return seen_pairs(lengths, window) - int(lengths.sum())


class ModelFlops:
    """FLOPs of a model by shape of batch; what was counted once is remembered.

    A shape between two that agree with each other on FLOPs a token (and a third one, as a check) is not
    counted but reckoned from them.

    Args:
        model: on any device, the meta device included. Its parameters' ``requires_grad`` decides what
            the backward pass computes.
        run: run it for real; for a small model that is quicker than to get torch to reckon shapes,
            the first time.
    """

    def __init__(self, model: LanguageModel, run: bool = False) -> None:
        self.model = model
        self.run = run
        self._head: Work | None = None
        self._ahead: Work | None = None
        self._unknown: dict[str, int] = {}
        self._counted: dict[tuple[bool, bool, int, int], BodyCount] = {}
        self._rules: dict[tuple[bool, bool], _Rule | None] = {}

    @property
    def unknown(self) -> dict[str, int]:
        """Operations met so far that are not counted: name -> calls."""
        return dict(self._unknown)

    def head(self) -> Work:
        """FLOPs of the head for one token, forward and backward."""
        if self._head is None:

            def call(model: LanguageModel, like: Callable[..., Tensor]) -> list[Tensor]:
                learns = any(p.requires_grad for p in model.blocks.parameters())
                dtype = model.head.weight.dtype
                return [model.logits(like(1, model.dim, dtype=dtype, learns=learns))]

            tally = self._pass(call)
            self._head = Work(tally.forward, tally.backward)
        return self._head

    def head_ahead(self) -> Work:
        """FLOPs of the head for one token beyond the next, by the modules that predict such."""
        if self._ahead is None:
            modules = self.model.multi_token
            assert modules is not None

            def call(model: LanguageModel, like: Callable[..., Tensor]) -> list[Tensor]:
                dtype = model.head.weight.dtype
                learns = any(p.requires_grad for p in modules.parameters())
                predicted = like(1, model.dim, dtype=dtype, learns=learns)
                truth = like(1, model.dim, dtype=dtype)
                return [modules.losses(model, 1, predicted, truth, like(1, dtype=torch.int64))]

            tally = self._pass(call)
            self._ahead = Work(tally.forward, tally.backward)
        return self._ahead

    def body(
        self, rows: int, seq: int, *, documents: bool = False, spans: bool = False
    ) -> BodyCount:
        """FLOPs of all but the head.

        Args:
            rows: number of rows.
            seq: tokens in a row, padding included.
            documents: rows are packed with documents.
            spans: the batch has spans; only a model of ``attention_mask: prefix`` looks at them.
        """
        spans = spans and self.model.attention_mask == "prefix"
        key = (documents, spans, rows, seq)
        if key not in self._counted:
            self._counted[key] = self._reckoned(*key) or self._measured(*key)
        return self._counted[key]

    def _reckoned(self, documents: bool, spans: bool, rows: int, seq: int) -> BodyCount | None:
        """By a rule of earlier shapes, which is found, tried and extended on the way."""
        kind = (documents, spans)
        if kind not in self._rules:
            self._rules[kind] = _Rule(self._measured(documents, spans, rows, seq), seq, seq)
            return self._rules[kind].base  # type: ignore[union-attr]
        rule = self._rules[kind]
        if rule is None:
            return None
        if not rule.shortest <= seq <= rule.longest:
            first = rule.shortest == rule.longest
            rule.shortest, rule.longest = min(rule.shortest, seq), max(rule.longest, seq)
            middle = (rule.shortest + rule.longest) // 2 | 1  # odd: chunks are mostly even
            tried = [(rows, seq)] + ([(rows + 1, middle)] if first else [])
            for shape in tried:
                if not self._measured(*kind, *shape).same_work(rule.base.at(*shape)):
                    self._rules[kind] = None
                    return None
        return rule.base.at(rows, seq)

    def _measured(self, documents: bool, spans: bool, rows: int, seq: int) -> BodyCount:
        key = (documents, spans, rows, seq)
        if key not in self._counted:

            def call(model: LanguageModel, like: Callable[..., Tensor]) -> list[Tensor]:
                tokens = like(rows, seq, dtype=torch.int64)
                ids = like(rows, seq, dtype=torch.int32) if documents else None
                both = like(rows, seq, dtype=torch.int64) if spans else None
                return _states(model, tokens, ids, both)

            tally = self._pass(call)
            if self.model.multi_token is not None:
                tally = self._parted(call, tally, rows, seq)
            self._counted[key] = BodyCount(
                rows,
                seq,
                tally.forward,
                tally.backward,
                tuple(merged(tally.pairs)),
                dict(tally.groups),
                dict(tally.unknown),
                tally.recomputed,
            )
        return self._counted[key]

    def _parted(self, call: Call, whole: Tally, rows: int, seq: int) -> Tally:
        """Tell modules that predict more tokens from the body: their rows are shorter.

        Args:
            call: the pass.
            whole: what it was found to cost.
            rows: number of rows.
            seq: tokens in a row.
        """
        modules, self.model.multi_token = self.model.multi_token, None
        try:
            body = self._pass(call)
        finally:
            self.model.multi_token = modules
        assert modules is not None
        lengths = [n for n in range(seq - 1, seq - 1 - len(modules.blocks), -1) if n > 0]
        forward, backward = whole.forward - body.forward, whole.backward - body.backward
        places = max(1, rows * sum(lengths))  # modules are alike
        pairs = [
            PairCount(
                modules.parameter_group,
                1,
                False,
                length,
                forward // places,
                backward // places,
                forward * length * rows // places,
                backward * length * rows // places,
            )
            for length in lengths
        ]
        return replace(
            whole,
            forward=body.forward,
            backward=body.backward,
            groups=body.groups,
            pairs=whole.pairs + pairs,
        )

    def _pass(self, call: Call) -> Tally:
        with left_alone(self.model):
            tally = None if self.run else self._by_shapes(call)
            if tally is None:
                tally = _counted(self.model, call, real=True)
        self._unknown.update(tally.unknown)
        return tally

    def _by_shapes(self, call: Call) -> Tally | None:
        """None when the model wants to see numbers."""
        try:
            with shapes_only(self.model):
                return _counted(self.model, call, real=False)
        except RuntimeError:
            return None


@dataclass
class _Rule:
    """Shapes of rows from ``shortest`` to ``longest`` cost what ``base`` says."""

    base: BodyCount
    shortest: int
    longest: int


def _states(
    model: LanguageModel, tokens: Tensor, documents: Tensor | None, spans: Tensor | None
) -> list[Tensor]:
    """What the loss of a training step is computed from, but for the head."""
    extras = Extras()
    states = model.hidden(tokens, documents=documents, spans=spans, extras=extras)
    found = [states, *extras.losses.values()]
    multi_token = getattr(model, "multi_token", None)
    if multi_token is not None:
        found += multi_token.hidden(model, states, tokens, documents)
    return found


class _CallAndGradients(nn.Module):
    """Lets ``functional_call`` reach any method of a model, and its gradients while it has stand-ins:
    blocks that are checkpointed are run again then.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        call: Callable[..., list[Tensor]],
        like: Callable[..., Tensor],
        wanted: list[Tensor],
    ) -> None:
        found = [tensor for tensor in call(self.model, like) if tensor.requires_grad]
        zeros = [torch.zeros_like(tensor) for tensor in found]
        if found and wanted:
            torch.autograd.grad(found, wanted, zeros, allow_unused=True)


def stand_ins(
    caller: nn.Module, real: bool
) -> tuple[dict[str, Tensor], Callable[..., Tensor], list[Tensor]]:
    """Tensors in place of a module's own, for ``functional_call``.

    Args:
        caller: a module, the model in it.
        real: with numbers, on the model's device; else with shapes alone.

    Returns:
        by name, parameters and buffers; ``like(*shape, dtype=..., learns=False)``, which makes inputs;
        those that gradients are wanted of.
    """
    device = next(caller.parameters()).device
    if real and device.type == "meta":
        device = torch.device("cpu")

    def stand_in(tensor: Tensor, learns: bool) -> Tensor:
        if not real:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        elif tensor.device.type == "meta":
            new = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
            if tensor.is_floating_point():
                new.normal_(std=0.02)
        else:  # a buffer may be written to, a parameter is not
            new = tensor.detach() if learns else tensor.detach().clone()
        return new.requires_grad_(learns)

    tensors = {name: stand_in(p, p.requires_grad) for name, p in caller.named_parameters()}
    tensors |= {name: stand_in(buffer, False) for name, buffer in caller.named_buffers()}
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]

    def like(*shape: int, dtype: torch.dtype, learns: bool = False) -> Tensor:
        new = torch.zeros(shape, dtype=dtype, device=device).requires_grad_(learns)
        if learns:
            wanted.append(new)
        return new

    return tensors, like, wanted


def _counted(model: LanguageModel, call: Call, real: bool) -> Tally:
    """Run ``call`` and its backward pass on stand-ins for the model's parameters."""
    caller = _CallAndGradients(model)
    tensors, like, wanted = stand_ins(caller, real)
    with ExitStack() as stack:
        counter = stack.enter_context(FlopCounter(apart=True))
        for handle in follow_groups(counter, model):
            stack.callback(handle.remove)
        functional_call(caller, tensors, (call, like, wanted))
    return counter.tally


def shapes_only(model: LanguageModel) -> AbstractContextManager[Any]:
    """In here new tensors have shapes and no numbers, on the model's device."""
    if model.embedding.weight.device.type == "meta":
        return nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Whatever a pass in here leaves in modules' attributes, and of random numbers, is taken back."""
    kept = [(module, dict(vars(module))) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    # FlexAttention compiles for every shape; what is counted is the mask's rectangle either way.
    model.attention_kernel = "sdpa"  # type: ignore[assignment]
    for module in model.modules():
        if hasattr(module, "capacity_factor"):  # experts are counted as if no token were dropped
            module.capacity_factor = 0.0  # type: ignore[assignment]
    try:
        with torch.random.fork_rng(sorted(device.index or 0 for device in devices)):
            yield
    finally:
        for module, attributes in kept:
            vars(module).clear()
            vars(module).update(attributes)
