"""Looking at hook points, and changing what passes there: nothing stays behind, whatever happens.

Shapes: b batch, s seq, h heads, d head_dim.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from toolmem.analysis.circuits.points import INSIDE_ATTENTION, check_points
from toolmem.models import LanguageModel
from toolmem.models.attention import HeadMixing
from toolmem.models.layers import Block

# Is given what passes a point; what it returns passes on in its place, unless that is None.
Tap = Callable[[Tensor], Tensor | None]


@contextmanager
def tapped(model: LanguageModel, taps: Mapping[str, Tap]) -> Iterator[None]:
    """In here every forward pass calls ``taps`` at their points; of nested ones the outer is first.

    Attention's scores and weights are there only where they are written out: with one of them tapped
    the model runs its plain kernel, which rounds otherwise than the fused ones.

    Args:
        model: any architecture; it is as before afterwards, also after an error.
        taps: by point (``points.py``).

    Raises:
        ToolmemError: for a point that the model has not.
    """
    check_points(model, taps)
    with ExitStack() as stack:
        if any(name.endswith((".scores", ".weights")) for name in taps):
            stack.callback(setattr, model, "attention_kernel", model.attention_kernel)
            model.attention_kernel = "plain"
        for name, tap in taps.items():
            stack.callback(_attach(model, name, tap))
        yield


@contextmanager
def recording(model: LanguageModel, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """In here what passes the points is kept: of several forward passes, what passed in the last.

    Args:
        model: any architecture.
        names: of points.

    Yields:
        values by point, detached, filled by forward passes.
    """
    found: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor) -> None:
        found[name] = x.detach()

    with tapped(model, {name: partial(keep, name) for name in names}):
        yield found


@torch.no_grad()
def record(
    model: LanguageModel, tokens: Tensor, names: Iterable[str], **told: Any
) -> dict[str, Tensor]:
    """What passes some points in one forward pass.

    Args:
        model: any architecture.
        tokens: (b, s) int64.
        names: of points; with ``logits`` among them or not, the whole model is run.
        **told: what else its forward takes (``documents``, ``spans``).

    Returns:
        values by point, in the shapes that ``hook_points`` tells.
    """
    with recording(model, names) as found:
        model(tokens, **told)
    return found


def _attach(model: LanguageModel, name: str, tap: Tap) -> Callable[[], object]:
    """Attach one tap; return what takes it away again."""
    if name in ("embedding", "norm", "logits"):
        if name == "embedding":
            return _before(model.blocks[0], tap)
        return _after(model.norm, tap) if name == "norm" else _on_logits(model, tap)
    _, number, place = name.split(".", 2)
    block = model.blocks[int(number)]
    if place == "input":
        return _before(block, tap)
    if place == "output":
        return _after(block, tap)
    assert isinstance(block, Block)
    branch, _, part = place.partition(".")
    module: Any = getattr(block, branch)
    if part in INSIDE_ATTENTION:
        return _Attending.of(module).add(part, tap)
    if part == "input":
        return _before(module, tap)
    if part == "heads":
        return _before(module.out, partial(_by_head, module.n_heads, tap))
    if part == "hidden":
        return _before(module.down, tap)
    norm = getattr(block, f"{branch}_post_norm")
    return _after(module if norm is None else norm, tap)


def _before(module: nn.Module, tap: Tap) -> Callable[[], object]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = tap(args[0])
        return None if x is None else (x, *args[1:])

    return module.register_forward_pre_hook(hook).remove


def _after(module: nn.Module, tap: Tap) -> Callable[[], object]:
    return module.register_forward_hook(lambda module, args, y: tap(y)).remove


def _by_head(n_heads: int, tap: Tap, x: Tensor) -> Tensor | None:
    """A tap on heads (b, h, s, d) where they lie side by side, (b, s, h * d)."""
    y = tap(x.unflatten(-1, (n_heads, -1)).transpose(1, 2))
    return None if y is None else y.transpose(1, 2).flatten(2)


def _on_logits(model: LanguageModel, tap: Tap) -> Callable[[], object]:
    """A tap on the head, soft cap and all; the head of another weight is not this model's."""
    below = model.logits

    def logits(hidden: Tensor, weight: Tensor | None = None) -> Tensor:
        y = below(hidden, weight)
        x = None if weight is not None else tap(y)
        return y if x is None else x

    before = vars(model).get("logits")
    model.logits = logits

    def remove() -> None:
        if before is None:
            del model.logits
        else:
            model.logits = before

    return remove


class _Attending:
    """``attend`` of one attention layer, with taps: on the instance, before the class's own.

    The plain kernel calls the layer's ``weights`` and that its ``scores``, so they come by here too.
    """

    def __init__(self, mixer: HeadMixing) -> None:
        self.mixer = mixer
        self.taps: dict[str, list[Tap]] = defaultdict(list)
        for name in ("attend", "weights", "scores"):
            setattr(mixer, name, getattr(self, name))

    @classmethod
    def of(cls, mixer: HeadMixing) -> _Attending:
        """The one that a layer has already, or a new one."""
        present = getattr(vars(mixer).get("attend"), "__self__", None)
        return present if isinstance(present, cls) else cls(mixer)

    def add(self, part: str, tap: Tap) -> Callable[[], object]:
        """Add a tap; return what takes it away, and with the last of them all of this."""
        self.taps[part].append(tap)

        def remove() -> None:
            self.taps[part].remove(tap)
            if not any(self.taps.values()):
                for name in ("attend", "weights", "scores"):
                    delattr(self.mixer, name)

        return remove

    def passed(self, part: str, x: Tensor) -> Tensor:
        """What comes out of all taps on a part."""
        for tap in self.taps[part]:
            y = tap(x)
            x = x if y is None else y
        return x

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        """As ``HeadMixing.attend``."""
        queries = self.passed("queries", queries)
        keys, values = self.passed("keys", keys), self.passed("values", values)
        return type(self.mixer).attend(self.mixer, queries, keys, values, mask)

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """As ``HeadMixing.weights``."""
        return self.passed("weights", type(self.mixer).weights(self.mixer, queries, keys, mask))

    def scores(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """As ``HeadMixing.scores``."""
        return self.passed("scores", type(self.mixer).scores(self.mixer, queries, keys, mask))
