"""Many models of one shape as stacked parameters, and the gradients of each member's own loss.

Unusual about it: members of like batches are run together by ``torch.func.vmap``, as many as are worth
it; a member that stands alone is run by the model itself, as any model is. Gradients are made group by
group, so that only one group's activations are ever held. Neither changes more than rounding.

Shapes: m members of a group, b rows, s seq, p loss-bearing positions.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from toolmem.data.batch import Batch
from toolmem.models import LanguageModel
from toolmem.models.attention import HeadMixing


class Stack(nn.Module):
    """The parameters of many models of one shape, each (members, ...), by the model's own names.

    Args:
        models: of one class with the same arguments.
    """

    def __init__(self, models: Sequence[LanguageModel]) -> None:
        super().__init__()
        self.n_members = len(models)
        self._keys: dict[str, str] = {}
        all_named = [dict(model.named_parameters()) for model in models]
        for name, parameter in all_named[0].items():
            # a module's parameter cannot have a dot in its name
            self._keys[name] = name.replace(".", "/")
            stacked = torch.stack([named[name].detach() for named in all_named])
            self.register_parameter(
                self._keys[name], nn.Parameter(stacked, requires_grad=parameter.requires_grad)
            )

    def key(self, name: str) -> str:
        """What the model's parameter of this name is called here."""
        return self._keys[name]

    def named(self) -> dict[str, nn.Parameter]:
        """The stacked parameters by the model's names."""
        return {name: getattr(self, key) for name, key in self._keys.items()}

    @torch.no_grad()
    def give(self, member: int, parameters: Mapping[str, Tensor]) -> None:
        """Copy a member's weights into a model's parameters, by their names."""
        for name, parameter in parameters.items():
            parameter.copy_(self._parameters[self._keys[name]][member])  # type: ignore[index]

    @torch.no_grad()
    def take(self, member: int, parameters: Mapping[str, Tensor]) -> None:
        """Copy a model's parameters, by their names, into a member."""
        for name, parameter in parameters.items():
            self._parameters[self._keys[name]][member] = parameter  # type: ignore[index]


class _Folded(torch.autograd.Function):
    """Attention of several members as attention of more rows: to vmap, one kernel and not one a member.

    Its vmap rule is all there is: below it, ordinary operators take care of gradients.
    """

    @staticmethod
    def forward(*inputs: Any) -> Any:
        raise AssertionError("only under vmap")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise AssertionError("only under vmap")

    @staticmethod
    def vmap(info: Any, in_dims: Any, attend: Any, *tensors: Any) -> Any:
        m = info.batch_size

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None or dim is None:  # a mask that all rows of all members share
                return tensor
            return tensor.movedim(dim, 0).flatten(0, 1)

        folded = [fold(t, d) for t, d in zip(tensors, in_dims[1:], strict=True)]
        return attend(*folded).unflatten(0, (m, -1)), 0


# Operators of ours that vmap would run in a loop too, but with a warning at every step.
LOOPED = ("linear_scan", "ssd_scan", "selective_scan")


@functools.cache
def _register_loops() -> None:
    """Let vmap take our scans, which are one operator each: a call a member."""
    from toolmem.models import recurrences, scans, ssd  # noqa: F401 (they define the operators)

    for name in LOOPED:
        operator = getattr(torch.ops.toolmem, name).default

        def loop(info: Any, in_dims: Any, *inputs: Any, operator: Any = operator) -> Any:
            found = [
                operator(
                    *(
                        value if dim is None else value.select(dim, member)
                        for value, dim in zip(inputs, in_dims, strict=True)
                    )
                )
                for member in range(info.batch_size)
            ]
            if isinstance(found[0], Tensor):
                return torch.stack(found), 0
            return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])

        torch.library.register_vmap(f"toolmem::{name}", loop)


@contextmanager
def folded_attention(model: LanguageModel) -> Iterator[None]:
    """In here the model's attention may be called under vmap without a loop over members."""
    _register_loops()
    mixers = [module for module in model.modules() if isinstance(module, HeadMixing)]
    kernel, model.attention_kernel = model.attention_kernel, "sdpa"
    for mixer in mixers:
        attend = mixer.attend

        def folded(*tensors: Any, attend: Any = attend) -> Any:
            return _Folded.apply(attend, *tensors)

        mixer.attend = folded  # type: ignore[assignment]
    try:
        yield
    finally:
        model.attention_kernel = kernel
        for mixer in mixers:
            del mixer.attend


class _Logits(nn.Module):
    """One member's logits at its loss-bearing positions, as a function for vmap."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, documents: Tensor | None, spans: Tensor | None, positions: Tensor
    ) -> Tensor:
        states = self.model.hidden(tokens, documents=documents, spans=spans).flatten(0, 1)
        return self.model.logits(states.index_select(0, positions))


class Joined:
    """Batches of several members, padded to one shape.

    Args:
        batches: one a member.

    Attributes:
        tokens: (m, b, s) int64.
        documents: (m, b, s), -1 at padding, or None.
        spans: (m, b, s) int64, -1 at padding, or None.
        positions: (m, p) int64, into b * s.
        targets: (m, p) int64.
        bears_loss: (m, p) bool; the others are padding.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.rows = max(batch.tokens.shape[0] for batch in batches)
        self.seq = max(batch.tokens.shape[1] for batch in batches)
        self.tokens = self._padded([batch.tokens for batch in batches], 0)
        self.documents = self._ids([batch.documents for batch in batches], alone=0)
        self.spans = self._ids([batch.spans for batch in batches], alone=-1)
        positions, targets = [], []
        for batch in batches:
            at = batch.positions()
            seq = batch.tokens.shape[1]
            positions.append(at.div(seq, rounding_mode="floor") * self.seq + at % seq)
            targets.append(batch.targets.flatten()[at])
        self.positions = pad_sequence(positions, batch_first=True)
        self.targets = pad_sequence(targets, batch_first=True)
        counts = torch.tensor([len(at) for at in positions])
        index = torch.arange(self.positions.shape[1])
        self.bears_loss = (index < counts[:, None]).to(self.tokens.device)

    def _padded(self, tensors: Sequence[Tensor], value: int) -> Tensor:
        return torch.stack(
            [
                F.pad(t, (0, self.seq - t.shape[1], 0, self.rows - t.shape[0]), value=value)
                for t in tensors
            ]
        )

    def _ids(self, tensors: Sequence[Tensor | None], alone: int) -> Tensor | None:
        """Ids of documents or spans; where only some members have them, ``alone`` in the others."""
        given = [tensor for tensor in tensors if tensor is not None]
        if not given:
            return None
        like = given[0].new_full((self.rows, self.seq), alone)
        return self._padded([like if tensor is None else tensor for tensor in tensors], -1)


def joint_gradients(
    model: LanguageModel,
    stack: Stack,
    members: Sequence[int],
    batches: Sequence[Batch],
    z_loss: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and gradients of several members in one pass.

    Args:
        model: of their shape; its own weights are not looked at.
        stack: their weights.
        members: their numbers.
        batches: one each.
        z_loss: weight of the squared log of the softmax's denominator.

    Returns:
        each member's summed cross-entropy (m,), without gradient, and the gradients (m, ...) of that
        and the z-loss, by the stacked parameter's name.
    """
    joined = Joined(batches)
    index = torch.tensor(members, device=joined.tokens.device)
    # without a copy where it is everybody in their order
    everybody = list(members) == list(range(stack.n_members))
    weights = {
        name: (p.detach() if everybody else p.detach()[index]).requires_grad_(p.requires_grad)
        for name, p in stack.named().items()
    }
    body = _Logits(model)
    optional = [joined.documents, joined.spans]

    def one(
        member: Mapping[str, Tensor], tokens: Tensor, documents: Any, spans: Any, at: Tensor
    ) -> Tensor:
        named = {f"model.{name}": weight for name, weight in member.items()}
        return functional_call(body, named, (tokens, documents, spans, at))

    in_dims: Any = (0, 0, *(None if ids is None else 0 for ids in optional), 0)
    with folded_attention(model):
        run: Callable[..., Tensor] = vmap(one, in_dims=in_dims)
        logits = run(weights, joined.tokens, *optional, joined.positions)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    losses = F.cross_entropy(logits.flatten(0, 1), joined.targets.flatten(), reduction="none")
    sums = torch.where(joined.bears_loss, losses.view_as(joined.targets), 0.0).sum(1)
    total = sums.sum()
    if z_loss:
        squares = torch.where(joined.bears_loss, logits.logsumexp(dim=-1).square(), 0.0)
        total = total + z_loss * squares.sum()
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    found = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
    gradients = {name: g for name, g in zip(trained, found, strict=True) if g is not None}
    return sums.detach(), gradients


def why_not_joint(model: LanguageModel, stack: Stack, device: torch.device) -> str | None:
    """What keeps members of this shape from running together; None when they can.

    Args:
        model: of the members' shape.
        stack: two members or more.
        device: where they are.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=device)
    batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool))
    if model.attention_kernel not in ("auto", "sdpa"):
        return f"attention_kernel {model.attention_kernel} takes one model at a time"
    if model.multi_token is not None:
        return "it predicts more tokens than the next (multi_token)"
    if any(hasattr(module, "inactive_parameters") for module in model.modules()):
        return "its experts take tokens by what they are, as many as there are"
    with warnings.catch_warnings():
        # vmap tells of an operator without a rule that it would run in a loop
        warnings.filterwarnings("error", ".*batching rule.*")
        try:
            joint_gradients(model, stack, [0, 1], [batch, batch])
        except (RuntimeError, UserWarning, ValueError) as error:
            return str(error).strip().partition("\n")[0]
    return None


def groups_of(
    batches: Mapping[int, Batch],
    at_once: int,
    least: int = 2,
    worth: Callable[[int, int], bool] = lambda rows, seq: True,
) -> Iterator[list[int]]:
    """Members that run together, those of like batches, so that little is padded.

    Args:
        batches: by member.
        at_once: the most members of a group.
        least: members below which none is run with others.
        worth: (rows, seq) -> is a member with such a batch run with others?
    """
    like = sorted(batches, key=lambda member: (*reversed(batches[member].tokens.shape), member))
    together = [member for member in like if worth(*batches[member].tokens.shape)]
    if at_once < 2 or len(together) < least:
        together = []
    if len(together) == len(like) <= at_once:
        together.sort()  # everybody in their order is run without a copy
    n_groups = -(-len(together) // at_once)
    for group in range(n_groups):  # of like sizes
        first, last = (len(together) * i // n_groups for i in (group, group + 1))
        yield together[first:last]
    yield from ([member] for member in like if member not in together)
