"""Recurrent networks: LSTM, GRU, minGRU, minLSTM and RG-LRU, as mixers and as one model.

    LSTM, GRU     torch's own cells, token after token
    minGRU        h_t = (1 - z_t) h_{t-1} + z_t g(W x_t),           z = sigmoid(W_z x)
    minLSTM       h_t = f'_t h_{t-1} + i'_t g(W x_t),               f' = f / (f + i), i' = i / (f + i)
    RG-LRU        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t x_t),    a = exp(-8 softplus(L) r_t)

The gates of the last three look at the token alone, not at the state, so that all states come of one
parallel scan (arXiv 2410.01201, arXiv 2402.19427). The state has a fixed size, whatever the length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from toolmem.errors import ToolmemError
from toolmem.models.cache import LaneState
from toolmem.models.context import Context
from toolmem.models.flop_work import PairWork, token_work
from toolmem.models.flops import register_flops
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Block,
    FeedForward,
    FeedForwardKind,
    NormKind,
    ShortConvolution,
    make_norm,
)
from toolmem.models.recurrences import linear_scan
from toolmem.models.transformer import check_sizes

Cell = Literal["lstm", "gru", "mingru", "minlstm", "rglru"]


class RecurrentState(LaneState):
    """What a recurrent layer remembers.

    Args:
        hidden: (batch, channels), the last state.
    """

    cell: Tensor  # (batch, channels), of an LSTM
    tail: Tensor  # (batch, width - 1, channels), of a short convolution

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def state_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """States are float32 or wider: what is added up over thousands of tokens is rounded once."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def document_starts(documents: Tensor) -> Tensor:
    """(b, s) bool, the first token of every document but a row's first."""
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))


def real_tokens(x: Tensor, context: Context) -> Tensor | None:
    """(b, s) bool, which tokens of a ragged chunk are real; None when all are."""
    if context.counts is None:
        return None
    return torch.arange(x.shape[1], device=x.device) < context.counts[:, None]


class _ConvolvedMixer(nn.Module):
    """A mixer whose input may pass through a short convolution first."""

    parameter_group = "recurrence"

    def __init__(self, dim: int, width: int, conv_width: int) -> None:
        super().__init__()
        check_sizes(width=width)
        if conv_width < 0:
            raise ToolmemError(f"conv_width is {conv_width}: it must be 0 (off) or more")
        self.width = width
        self.conv = ShortConvolution(dim, conv_width) if conv_width else None

    def convolved(self, x: Tensor, context: Context, cache: RecurrentState | None) -> Tensor:
        """The input after its convolution, where there is one."""
        return x if self.conv is None else self.conv.run(x, context, cache, "tail")

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RecurrentState:
        """Empty decoding state of this layer; its size does not depend on ``max_len``."""
        shape = (batch_size, self.width)
        state = RecurrentState(torch.zeros(shape, device=device, dtype=state_dtype(dtype)))
        if self.conv is not None:
            state.tail = self.conv.new_tail(batch_size, device, dtype)
        return state


def _work(cells: nn.Module, x: Tensor) -> PairWork:
    """Of each token a product with every matrix. The machine knows that the first state is zero."""
    matrices = [weight for weight in cells.parameters() if weight.ndim == 2]
    return token_work(2 * sum(weight.numel() for weight in matrices), seq=x.shape[1])


@register_flops(_work)
def _run(cells: nn.Module, x: Tensor) -> Tensor:
    """Whole rows (b, s, dim) through a recurrent layer, from no state: (b, s, width)."""
    return cells(x)[0]


class _TorchCell(_ConvolvedMixer):
    """One of torch's recurrent layers, token after token."""

    cells: nn.LSTM | nn.GRU
    out: nn.Linear

    def forward(self, x: Tensor, context: Context, cache: RecurrentState | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, s, dim).
            context: documents, or how much of a chunk is real.
            cache: this layer's state, written to.
        """
        x = self.convolved(x, context, cache)
        if context.documents is not None:
            return self.out(self._by_document(x, context.documents))
        if cache is None:
            return self.out(_run(self.cells, x))
        return self.out(self._continue(x, context.counts, cache))

    def _by_document(self, x: Tensor, documents: Tensor) -> Tensor:
        """Every document as a row of its own, then back to where it was."""
        starts = document_starts(documents)
        starts[:, 0] = True
        number = starts.flatten().cumsum(0) - 1
        index = torch.arange(number.numel(), device=x.device)
        first = index[starts.flatten()]
        within = index - first[number]
        rows = x.new_zeros(len(first), int(within.max()) + 1, x.shape[2])
        rows = rows.index_put((number, within), x.flatten(0, 1))
        return _run(self.cells, rows)[number, within].view(*x.shape[:2], self.width)

    def _continue(self, x: Tensor, counts: Tensor | None, cache: RecurrentState) -> Tensor:
        """A chunk that goes on from a state; only real tokens change it."""
        state = self._before(cache, x.dtype)
        if counts is None:
            y, state = self.cells(x, state)
            self._keep(cache, state, None)
            return y
        # A packed sequence must have a token in every row: one that waits is given a token to no effect.
        packed = pack_padded_sequence(
            x, counts.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False
        )
        packed, state = self.cells(packed, state)
        self._keep(cache, state, counts > 0)
        return pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])[0]

    def _before(self, cache: RecurrentState, dtype: torch.dtype) -> Any:
        return cache.hidden.to(dtype)[None]

    def _keep(self, cache: RecurrentState, state: Any, moved: Tensor | None) -> None:
        cache.hidden = _where(moved, state[0].to(cache.hidden.dtype), cache.hidden)


def _where(moved: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if moved is None else torch.where(moved[:, None], new, old)


class LSTM(_TorchCell):
    """Long short-term memory (Hochreiter and Schmidhuber, Neural Computation 9, 1997).

    Args:
        dim: width of the residual stream.
        width: channels of the state; dim when None.
        conv_width: taps of a short convolution on the input; 0 for none.
    """

    def __init__(self, dim: int, width: int | None = None, conv_width: int = 0) -> None:
        super().__init__(dim, dim if width is None else width, conv_width)
        self.cells = nn.LSTM(dim, self.width, batch_first=True)
        self.out = nn.Linear(self.width, dim, bias=False)
        self.after_initialization()

    @torch.no_grad()
    def after_initialization(self) -> None:
        """Gates as torch starts them, but open to remembering (arXiv 1504.00941)."""
        self.cells.reset_parameters()
        parameters = dict(self.cells.named_parameters())
        parameters["bias_ih_l0"].zero_()
        parameters["bias_hh_l0"].zero_()
        parameters["bias_ih_l0"][self.width : 2 * self.width] = 1.0

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> RecurrentState:
        """Empty decoding state of this layer."""
        state = super().new_cache(batch_size, max_len, device, dtype)
        state.cell = torch.zeros_like(state.hidden)
        return state

    def _before(self, cache: RecurrentState, dtype: torch.dtype) -> Any:
        return cache.hidden.to(dtype)[None], cache.cell.to(dtype)[None]

    def _keep(self, cache: RecurrentState, state: Any, moved: Tensor | None) -> None:
        hidden, cell = state
        cache.hidden = _where(moved, hidden[0].to(cache.hidden.dtype), cache.hidden)
        cache.cell = _where(moved, cell[0].to(cache.cell.dtype), cache.cell)


class GRU(_TorchCell):
    """Gated recurrent unit (arXiv 1406.1078).

    Args:
        dim: width of the residual stream.
        width: channels of the state; dim when None.
        conv_width: taps of a short convolution on the input; 0 for none.
    """

    def __init__(self, dim: int, width: int | None = None, conv_width: int = 0) -> None:
        super().__init__(dim, dim if width is None else width, conv_width)
        self.cells = nn.GRU(dim, self.width, batch_first=True)
        self.out = nn.Linear(self.width, dim, bias=False)
        self.after_initialization()

    def after_initialization(self) -> None:
        """Gates as torch starts them."""
        self.cells.reset_parameters()


class _Scanned(_ConvolvedMixer):
    """A linear recurrence whose weights depend on the token alone."""

    def scan(
        self,
        decay: Tensor,
        values: Tensor,
        context: Context,
        cache: RecurrentState | None,
    ) -> Tensor:
        """All states, in the dtype of states.

        Args:
            decay: (b, s, width).
            values: (b, s, width).
            context: documents, or how much of a chunk is real.
            cache: this layer's state, written to.
        """
        real = real_tokens(values, context)
        if context.documents is not None:
            decay = decay.masked_fill(document_starts(context.documents)[:, :, None], 0.0)
        if real is not None:  # padding keeps the state as it is
            decay = torch.where(real[:, :, None], decay, 1.0)
            values = torch.where(real[:, :, None], values, 0.0)
        states = linear_scan(decay, values, None if cache is None else cache.hidden)
        if cache is not None:
            cache.hidden = states[:, -1]
        return states


def _positive(x: Tensor) -> Tensor:
    """g(x) of arXiv 2410.01201: x + 1/2 above 0, sigmoid(x) below; above 0 and continuous."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGRU(_Scanned):
    """A GRU whose gate looks at the token alone (arXiv 2410.01201).

    Args:
        dim: width of the residual stream.
        width: channels of the state; dim when None.
        conv_width: taps of a short convolution on the input; 0 for none.
    """

    def __init__(self, dim: int, width: int | None = None, conv_width: int = 0) -> None:
        super().__init__(dim, dim if width is None else width, conv_width)
        self.gates = nn.Linear(dim, 2 * self.width, bias=False)
        self.out = nn.Linear(self.width, dim, bias=False)

    def forward(self, x: Tensor, context: Context, cache: RecurrentState | None = None) -> Tensor:
        """(b, s, dim) to (b, s, dim); reads and writes ``cache`` where there is one."""
        x = self.convolved(x, context, cache)
        gate, new = self.gates(x).to(state_dtype(x.dtype)).chunk(2, dim=-1)
        taken = torch.sigmoid(gate)
        # 1 - sigmoid(z) is sigmoid(-z): no cancellation where the gate is open
        states = self.scan(torch.sigmoid(-gate), taken * _positive(new), context, cache)
        return self.out(states.to(x.dtype))


class MinLSTM(_Scanned):
    """An LSTM whose gates look at the token alone, and add up to 1 (arXiv 2410.01201).

    Args:
        dim: width of the residual stream.
        width: channels of the state; dim when None.
        conv_width: taps of a short convolution on the input; 0 for none.
    """

    def __init__(self, dim: int, width: int | None = None, conv_width: int = 0) -> None:
        super().__init__(dim, dim if width is None else width, conv_width)
        self.gates = nn.Linear(dim, 3 * self.width, bias=False)
        self.out = nn.Linear(self.width, dim, bias=False)

    def forward(self, x: Tensor, context: Context, cache: RecurrentState | None = None) -> Tensor:
        """(b, s, dim) to (b, s, dim); reads and writes ``cache`` where there is one."""
        x = self.convolved(x, context, cache)
        forget, take, new = self.gates(x).to(state_dtype(x.dtype)).chunk(3, dim=-1)
        # f / (f + i), by the difference of logarithms: both gates may be next to 0
        difference = F.logsigmoid(forget) - F.logsigmoid(take)
        values = torch.sigmoid(-difference) * _positive(new)
        states = self.scan(torch.sigmoid(difference), values, context, cache)
        return self.out(states.to(x.dtype))


class RGLRU(_Scanned):
    """Griffin's recurrent block: a gated branch beside convolution and RG-LRU (arXiv 2402.19427).

    y = out(gelu(W_y x) * rglru(conv(W_x x))); the RG-LRU's gates are block-diagonal.

    Args:
        dim: width of the residual stream.
        width: channels of the state; dim when None.
        n_blocks: blocks of the gates' weights; the largest of 8, 4, 2, 1 that divides width when None.
        conv_width: taps of the convolution before the recurrence.
        decay_min: the slowest decay at the start, before the gate, squared: a^2 is drawn evenly between
            decay_min^2 and decay_max^2.
        decay_max: the other end.

    Raises:
        ToolmemError: when n_blocks does not divide width.
    """

    EXPONENT = 8.0  # the paper's c

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        n_blocks: int | None = None,
        conv_width: int = 4,
        decay_min: float = 0.9,
        decay_max: float = 0.999,
    ) -> None:
        width = dim if width is None else width
        super().__init__(width, width, conv_width)
        if n_blocks is None:
            n_blocks = next(n for n in (8, 4, 2, 1) if width % n == 0)
        if n_blocks < 1 or width % n_blocks:
            raise ToolmemError(
                f"n_blocks {n_blocks} does not divide width {width}: change n_blocks"
            )
        self.n_blocks = n_blocks
        self.inputs = nn.Linear(dim, 2 * width, bias=False)
        block = width // n_blocks
        # recurrence gate, then input gate; each block (outputs, inputs)
        self.gates = nn.Parameter(torch.empty(2 * n_blocks, block, block))
        self.gate_bias = nn.Parameter(torch.zeros(2 * width))
        nn.init.normal_(self.gates, std=1 / math.sqrt(block))
        # a = exp(-c softplus(L)) at an open gate
        squared = torch.empty(width).uniform_(decay_min**2, decay_max**2)
        rate = -squared.log() / (2 * self.EXPONENT)
        self.decay = nn.Parameter(rate.expm1().log())
        self.out = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor, context: Context, cache: RecurrentState | None = None) -> Tensor:
        """(b, s, dim) to (b, s, dim); reads and writes ``cache`` where there is one."""
        branch, x = self.inputs(x).chunk(2, dim=-1)
        x = self.convolved(x, context, cache)
        wide = x.to(state_dtype(x.dtype))
        log_decay, gated = self.gated(x)
        decay = log_decay.exp()
        # sqrt(1 - a^2), which expm1 gives without cancellation where a is next to 1
        weight = torch.sqrt(-torch.expm1(2 * log_decay))
        # a document's first token is taken in as it is: there is nothing to keep a share for
        first = (context.positions == 0)[..., None]
        states = self.scan(
            decay, torch.where(first, 1.0, weight) * gated.to(wide.dtype), context, cache
        )
        return self.out(F.gelu(branch, approximate="tanh") * states.to(x.dtype))

    def gated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The decay's logarithm, in the dtype of states, and the gated input, each (b, s, width)."""
        b, s, width = x.shape
        blocks = x.reshape(b * s, self.n_blocks, -1).transpose(0, 1)
        gates = torch.bmm(blocks.repeat(2, 1, 1), self.gates.transpose(1, 2))
        gates = gates.transpose(0, 1).reshape(b, s, 2 * width) + self.gate_bias
        recurrence, take = torch.sigmoid(gates.to(state_dtype(x.dtype))).chunk(2, dim=-1)
        return -self.EXPONENT * F.softplus(self.decay) * recurrence, take * x


CELLS: dict[str, Callable[..., nn.Module]] = {
    "lstm": LSTM,
    "gru": GRU,
    "mingru": MinGRU,
    "minlstm": MinLSTM,
    "rglru": RGLRU,
}


class RNN(LanguageModel):
    """A recurrent language model: a cell and a feed-forward in each block.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        cell: ``lstm``, ``gru``, ``mingru``, ``minlstm`` or ``rglru`` (then the model is Hawk).
        width: channels of the state; dim when None.
        hidden_dim: width inside the feed-forward; 4 * dim when None.
        max_seq_len: longest sequence.
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``.
        conv_width: taps of the short convolution before the cell; 4 in ``rglru``, 0 (none) in the others
            when None.
        residual_conv: taps of a short convolution on each branch's input; 0 for none.
        norm: ``rms`` or ``layer``.
        norm_eps: epsilon of the norms.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        initialization: a scheme of ``initialization.py``.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        cell: Cell = "mingru",
        width: int | None = None,
        hidden_dim: int | None = None,
        max_seq_len: int = 1024,
        feed_forward: FeedForwardKind = "swiglu",
        conv_width: int | None = None,
        residual_conv: int = 0,
        norm: NormKind = "rms",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        dropout: float = 0.0,
        initialization: str = "scaled",
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            max_seq_len=max_seq_len,
            width=width,
            hidden_dim=hidden_dim,
        )
        if cell not in CELLS:
            raise ToolmemError(f"cell: unknown {cell!r}; choose {', '.join(CELLS)}")
        if not 0 <= dropout < 1:
            raise ToolmemError(f"dropout is {dropout}: it must be at least 0 and below 1")
        if residual_conv < 0:
            raise ToolmemError(f"residual_conv is {residual_conv}: it must be 0 (off) or more")
        options: dict[str, Any] = {} if conv_width is None else {"conv_width": conv_width}

        def block() -> Block:
            return Block(
                dim,
                CELLS[cell](dim, width, **options),
                FeedForward(dim, hidden_dim or 4 * dim, feed_forward),
                norm,
                norm_eps,
                dropout=dropout,
                residual_conv=residual_conv,
            )

        super().__init__(
            [block() for _ in range(n_layers)],
            make_norm(norm, dim, norm_eps),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            dropout=dropout,
            initialization=initialization,
        )
