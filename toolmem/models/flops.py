"""FLOPs counted by dispatch: what runs is what is counted, and what has no formula is named.

Two figures are told apart:

- **exact**: what the mathematics asks for. Padding costs nothing, attention is counted pair by pair of
  tokens that may see each other (a causal row of n tokens has n (n + 1) / 2), a recurrence token by
  token, nothing is computed twice.
- **executed**: what the machine is given to do. Padding is multiplied like everything else, attention
  over whole blocks, a recurrence by chunks, and their backward passes compute the scores again. So do
  blocks that are checkpointed (``recompute.py``) with all that they are made of.

``FlopCounter`` counts code that really runs, ``model_flops.py`` a model without running it. An
architecture whose work is not all matmuls says so by ``register_flops``. The convention of what counts
is in ``flop_formulas.py``.

Shapes: b batch, s seq, h heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._library.simple_registry import singleton
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils._python_dispatch import TorchDispatchMode

from toolmem.models.flop_formulas import (
    ATTENTION,
    ATTENTION_BACKWARD,
    FORMULAS,
    attention_call,
    formula_of,
    is_free,
)
from toolmem.models.flop_work import PairCount, PairWork, Tally, Work, attention_work
from toolmem.models.recomputing import recomputing

T = TypeVar("T")

_counting: FlopCounter | None = None  # the counter in force


def register_flops(formula: Callable[..., Work | int]) -> Callable[[T], T]:
    """Say what calls of a function, or of an operation of ``torch.ops``, cost.

    On a function, ``formula`` takes the same arguments and returns ``Work`` (or its ``forward``), which
    is *added* to what dispatch finds inside of it, or ``PairWork``, which *replaces* that in the exact
    count (the function then returns a tensor, or several of which a loss hangs on the first alone; a
    module whose parameters it uses must be an argument). Where nothing counts, the function is called
    as it is.

    On an operation (``torch.ops.mylib.scan``), ``formula`` takes its arguments and the keyword
    ``out_val``, its result, and returns the FLOPs of one call. A backward pass that is an operation of
    its own needs a formula of its own.

    Args:
        formula: what one call costs.
    """

    def register(target: Any) -> Any:
        if isinstance(target, torch._ops.OpOverloadPacket):
            FORMULAS[target] = formula  # type: ignore[assignment]
            return target

        @functools.wraps(target)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if _counting is None:
                return target(*args, **kwargs)
            return _counting.call(target, formula(*args, **kwargs), args, kwargs)

        return counted

    return register


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of the code that runs inside of it.

        with FlopCounter() as counter:
            loss(model(x)).backward()
        counter.tally.forward, counter.tally.backward, counter.tally.unknown

    It is ``torch.utils.flop_counter.FlopCounterMode`` with more formulas, which says what it does not
    know, and costs a third (it follows no modules).

    Args:
        apart: tell attention apart in ``tally.pairs``. Gradients that pass a function with ``PairWork``
            are then stand-ins, and custom operations give shapes only: for passes whose results nobody
            uses.
    """

    supports_higher_order_operators = True

    def __init__(self, apart: bool = False) -> None:
        super().__init__()
        self.apart = self.shapes_only = apart
        self.tally = Tally()
        self._outer: list[FlopCounter | None] = []  # it is entered again for composite operations
        self.groups = ["other"]  # of the modules around, the innermost last

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: to leave this alone torch would import its compiler first, for seconds."""
        return False

    def __enter__(self) -> FlopCounter:
        global _counting
        self._outer.append(_counting)
        _counting = self
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        global _counting
        _counting = self._outer.pop()
        super().__exit__(*args)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        overload = isinstance(func, torch._ops.OpOverload)
        if overload and is_free(func):
            return func(*args, **kwargs)
        packet = func._overloadpacket if overload else func
        formula = formula_of(packet)
        if formula is None and overload:
            with self:  # in inference mode operations come whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        shapes = _shapes_of(func) if self.shapes_only and overload else None
        result = (shapes or func)(*args, **kwargs)
        if formula is None:
            name = func._schema.name if overload else func.name()
            self.tally.unknown[name] += 1
            return result
        flops = formula(*args, **kwargs, out_val=result)
        if packet in ATTENTION or packet in ATTENTION_BACKWARD:
            self._attention(func, flops, args, kwargs)
        else:
            self._add(flops)
        return result

    def _add(self, flops: int) -> None:
        if recomputing():
            self.tally.recomputed += flops
        elif torch._C._current_graph_task_id() != -1:  # in a backward pass
            self.tally.backward += flops
        else:
            self.tally.forward += flops
            self.tally.groups[self.groups[-1]] += flops

    def _attention(self, func: Any, flops: int, args: Any, kwargs: Mapping[str, Any]) -> None:
        call = attention_call(func, args, kwargs)
        self.tally.skips |= call.skips
        if not self.apart:
            self._add(flops)
            return
        # Nobody has said what tokens it is over: causal, over all of the row.
        work = attention_work(call.queries, call.values)
        pair = PairCount(self.groups[-1], 0, call.skips, call.queries.shape[2])
        if recomputing():
            pair = replace(pair, executed_backward=flops)
        elif func._overloadpacket in ATTENTION:
            pair = replace(pair, forward=work.forward, executed_forward=flops)
            if call.masked:
                self.tally.unknown[f"{func._schema.name} with a mask, taken for causal"] += 1
        else:
            pair = replace(pair, backward=work.gradient, executed_backward=flops)
        self.tally.pairs.append(pair)

    def call(
        self,
        function: Callable[..., Any],
        work: Work | int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Call a function that has a formula.

        Args:
            function: what to call.
            work: what the formula says of this call.
            args: the call's.
            kwargs: the call's.
        """
        if isinstance(work, PairWork):
            apart = self._call_apart if self.apart else None
            return apart(function, work, args, kwargs) if apart else function(*args, **kwargs)
        work = Work(work) if isinstance(work, int) else work
        if recomputing():
            self.tally.recomputed += work.forward
            return function(*args, **kwargs)
        self.tally.forward += work.forward
        self.tally.groups[self.groups[-1]] += work.forward
        if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(args, kwargs)):
            self.tally.backward += work.gradient
        return function(*args, **kwargs)

    def _call_apart(
        self,
        function: Callable[..., Any],
        work: PairWork,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Count a function forward and backward by itself, and put a stand-in into the graph."""
        modules = [module for module in args if isinstance(module, nn.Module)]
        inputs = [*_tensors(args, kwargs), *(p for module in modules for p in module.parameters())]
        leaves = {id(x): x.detach().requires_grad_(x.requires_grad) for x in inputs}

        def leaf(value: Any) -> Any:
            return leaves.get(id(value), value)

        outer, self.tally, self.apart = self.tally, Tally(unknown=self.tally.unknown), False
        wanted = [x for x in inputs if x.requires_grad]
        grads: tuple[Tensor | None, ...] = ()
        again = recomputing()
        try:
            with ExitStack() as stack:
                # nothing of it is wanted again, so a checkpointed block around has no say in it
                stack.enter_context(saved_tensors_hooks(lambda x: x, lambda x: x))
                for module in modules:
                    own = {name: leaf(p) for name, p in module.named_parameters()}
                    stack.enter_context(_reparametrize_module(module, own))
                found = function(*map(leaf, args), **{name: leaf(x) for name, x in kwargs.items()})
            first, *others = found if isinstance(found, tuple) else (found,)
            spent = self.tally.recomputed
            if first.requires_grad:
                zeros = torch.zeros_like(first)
                grads = torch.autograd.grad(first, [*map(leaf, wanted)], zeros, allow_unused=True)
        finally:
            inner, self.tally, self.apart = self.tally, outer, True
        pair = PairCount(self.groups[-1], work.window, inner.skips, work.seq)
        if again:
            pair = replace(pair, executed_backward=spent)
        else:
            pair = replace(
                pair,
                forward=work.forward,
                backward=work.gradient if first.requires_grad else 0,
                executed_forward=inner.forward,
                executed_backward=inner.backward,
            )
        self.tally.pairs.append(pair)
        used = [x for x, grad in zip(wanted, grads, strict=False) if grad is not None]
        stand_in = StandIn.apply(first.detach(), *used)
        return (stand_in, *(x.detach() for x in others)) if others else stand_in


class StandIn(torch.autograd.Function):
    """Hands on a result that was computed elsewhere; its gradients are zeros."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *inputs: Tensor) -> Tensor:
        """The result."""
        ctx.save_for_backward(*inputs)
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Zeros for every input."""
        return None, *(torch.zeros_like(x) for x in ctx.saved_tensors)


@functools.cache
def _shapes_of(func: Any) -> Callable[..., Any] | None:
    """What makes the results of a custom operation by their shapes alone; None for torch's own.

    The first call of a real one has torch import its compiler, for seconds.
    """
    if func._schema.name.startswith("aten::"):
        return None
    entry = singleton.find(func._schema.name)
    return entry.fake_impl.kernel


def _tensors(args: Iterable[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def follow_groups(counter: FlopCounter, model: nn.Module) -> list[Any]:
    """Let a counter know which ``parameter_group`` the running module is of.

    Returns:
        handles, to be removed.
    """
    handles = []
    for module in model.modules():
        group = getattr(module, "parameter_group", None)
        if group is not None:

            def enter(*_: Any, group: str = group) -> None:
                counter.groups.append(group)

            def leave(*_: Any) -> None:
                counter.groups.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    return handles
