"""Decoding over pages by ``torch.compile``: one graph for any number of lanes and of pages.

The pages of an engine are a static cache: they stay where they are, and tables say which are whose. What
changes from step to step is how many lanes there are and how long their tables; both are rounded up to a
few sizes (``Buckets``), dead rows and columns standing for the rest, as in the engine's invariant mode.
The two sizes are symbols of one graph, beside a second one for a single lane, so that nothing is compiled
anew as dialogues come, grow and go. On CUDA inductor records a CUDA graph for each pair of sizes, which
has **not been run on a GPU**.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel
    from toolmem.models.paged import PagedState

GRAPHS = 2  # for one lane, and for more
FEWEST_PAGES = 4  # of a table


class Buckets(NamedTuple):
    """Sizes that passes are rounded up to.

    Args:
        lanes: numbers of rows, ascending.
        pages: widths of tables, ascending.
    """

    lanes: tuple[int, ...]
    pages: tuple[int, ...]

    @classmethod
    def upto(cls, lanes: int, pages: int) -> Buckets:
        """Powers of two, and from 8 rows on what lies half-way, up to the most that there can be."""
        rows = {2**i for i in range(lanes.bit_length()) if 2**i < lanes}
        rows |= {3 * n // 2 for n in rows if n >= 8 and 3 * n // 2 < lanes}
        widths = [FEWEST_PAGES]
        while widths[-1] < pages:
            widths.append(2 * widths[-1])
        return cls(tuple(sorted(rows | {lanes})), tuple(min(width, pages) for width in widths))

    def around(self, lanes: int, pages: int) -> tuple[int, int]:
        """The smallest sizes that hold so many rows, and tables of so many pages."""
        return (
            next(size for size in self.lanes if size >= lanes),
            next(size for size in self.pages if size >= pages),
        )

    def __iter__(self) -> Iterator[Any]:
        return iter((rows, pages) for rows in self.lanes for pages in self.pages)


class _Inductor:
    """``torch.compile``'s own backend, counted. torch keeps it for ever: so it keeps nothing itself."""

    def __init__(self, cuda_graphs: bool) -> None:
        self.options = {"triton.cudagraphs": cuda_graphs}
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx

        self.graphs += 1
        return compile_fx(graph, inputs, config_patches=self.options)


class CompiledDecoder:
    """One token a lane, by a compiled forward pass.

    Args:
        model: on any device.
        state: its decoding state.
        lanes: rows of a pass, at most.

    Raises:
        ToolmemError: for a model that cannot be compiled.
    """

    def __init__(self, model: LanguageModel, state: PagedState, lanes: int) -> None:
        self.model = model
        self.state = state
        grows = bool(state.page_bytes)
        self.buckets = Buckets.upto(lanes, -(-model.max_seq_len // state.page_size) if grows else 1)
        self.seconds = 0.0  # that compiling has taken so far
        self._inductor = _Inductor(state.device.type == "cuda")
        # Not dynamic of itself: what differs from the engine before is no size that changes.
        self._run = torch.compile(
            _forward_pass(model, state), fullgraph=True, dynamic=False, backend=self._inductor
        )
        for layer in model.modules():
            if isinstance(layer, nn.RNNBase):
                raise self._refused(f"torch compiles no {type(layer).__name__}")
        for arena in (*state.arenas("page"), *state.arenas("slot")):
            if arena.is_cuda:  # written to in place, from inside a CUDA graph
                torch._dynamo.mark_static_address(arena)

    @property
    def graphs(self) -> int:
        """Graphs compiled so far."""
        return self._inductor.graphs

    def _refused(self, reason: str) -> ToolmemError:
        name = type(self.model).__name__
        return ToolmemError(
            f"compile: a {name} cannot be compiled here ({reason}): leave compile out"
        )

    @torch.no_grad()
    def warm_up(self, told: Callable[[int, int], None] | None = None) -> None:
        """Compile ahead, and run each pair of sizes once, on lanes that nobody has.

        Args:
            told: called with how many pairs are done, and how many there are.
        """
        pairs = list(self.buckets)
        # many lanes first: the graph for any number is the longer one to compile
        pairs.sort(key=lambda pair: -pair[0])
        for done, (rows, pages) in enumerate(pairs):
            if told is not None:
                told(done, len(pairs))
            zeros = np.zeros(rows, dtype=np.int64)
            self._call(zeros, np.zeros((rows, pages + 1), dtype=np.int64), zeros, zeros)
        if told is not None:
            told(len(pairs), len(pairs))

    @torch.no_grad()
    def step(
        self, tokens: np.ndarray, pages: np.ndarray, lengths: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        """Read one token a lane, and what the head reads there.

        Args:
            tokens: (n,) int64.
            pages: (n, any) int64, of each lane, with room for the token.
            lengths: (n,) int64, tokens of the lane before this one.
            slots: (n,) int64.

        Returns:
            (n, dim).

        Raises:
            ToolmemError: for a model that cannot be compiled.
        """
        n, size = len(tokens), self.state.page_size
        own = lengths // size + 1  # pages that hold something of a lane
        rows, width = self.buckets.around(n, int(own.max()) if self.state.page_bytes else 1)
        # the last column is where padding would go
        table = np.zeros((rows, width + 1), dtype=np.int64)
        some = pages[:, :width]
        table[:n, : some.shape[1]] = np.where(np.arange(some.shape[1]) < own[:, None], some, 0)
        filled = np.zeros((3, rows), dtype=np.int64)
        filled[:, :n] = tokens, lengths, slots
        return self._call(filled[0], table, filled[1], filled[2])[:n]

    def _call(
        self, tokens: np.ndarray, pages: np.ndarray, lengths: np.ndarray, slots: np.ndarray
    ) -> Tensor:
        arrays = (tokens[:, None], pages, lengths, slots)
        inputs = [torch.from_numpy(array).to(self.state.device) for array in arrays]
        if self.graphs < GRAPHS:  # what is compiled once takes any size
            if len(tokens) > 1:  # a single lane has a graph of its own
                for each in inputs:
                    torch._dynamo.maybe_mark_dynamic(each, 0)
            torch._dynamo.maybe_mark_dynamic(inputs[1], 1)
        before, began = self.graphs, time.perf_counter()
        try:
            y = self._run(*inputs)
        except Exception as error:
            if self.graphs == before and before:
                raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise self._refused(lines[0].strip() if lines else type(error).__name__) from error
        if self.graphs > before:
            self.seconds += time.perf_counter() - began
        self.state.let_go()
        return y


def _forward_pass(model: LanguageModel, state: PagedState) -> Callable[..., Tensor]:
    """One token a lane through the model, as a function of tensors alone."""

    def decode(tokens: Tensor, pages: Tensor, lengths: Tensor, slots: Tensor) -> Tensor:
        width = pages.shape[1] - 1
        # Masks reach as far as tables do: how long lanes really are is data, and no size.
        longest = width * state.page_size - 1
        cache = state.cache(pages, lengths, longest, [(slice(None), width)], slots)
        cache.lengths_checked = True
        return model.hidden(tokens, cache=cache)[:, 0]

    # torch keeps compiled graphs with a function's code, and at most eight: code of its own for each
    # decoder lets them go with it, and keeps engines out of each other's way.
    own = decode.__code__.replace()
    return FunctionType(own, decode.__globals__, "decode", None, decode.__closure__)
