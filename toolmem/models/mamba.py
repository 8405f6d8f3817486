"""Mamba-1: a selective state-space model in place of attention (arXiv 2312.00752).

Unusual about it: no attention, no positions, and in the papers' shape no feed-forward: a block is one
branch, twice as wide inside as the stream, that convolves a few tokens, scans, and is gated. Decoding
takes the same time and memory for every token, however many came before.

Shapes: b batch, s seq, d inner channels (expand * dim), n state_dim.
"""

# ruff: noqa: N803, N806 (A, B, C and D are the names that the papers give them)
from __future__ import annotations

import importlib.util
import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.cache import LaneState
from toolmem.models.context import Context
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Block,
    FeedForward,
    FeedForwardKind,
    NormKind,
    ShortConvolution,
    make_norm,
)
from toolmem.models.scans import selective_scan, selective_scan_sequential
from toolmem.models.transformer import check_sizes

Kernel = Literal["torch", "mamba_ssm"]


class MambaState(LaneState):
    """What a Mamba layer remembers: the convolution's last inputs, and the state of the scan.

    Args:
        tail: (b, conv_width - 1, channels).
        ssm: (b, ...), float32 at least.
    """

    def __init__(self, tail: Tensor, ssm: Tensor) -> None:
        self.tail = tail
        self.ssm = ssm


class Mamba1Mixer(nn.Module):
    """Mamba's mixer: u, z = in(x); u = silu(conv(u)); y = scan(u) + D u; out(y * silu(z)).

    The scan's step sizes dt and its vectors B and C come from u: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t,
    y_t = C_t h_t, for each channel by itself (``scans.py``).

    Args:
        dim: width of the residual stream.
        state_dim: numbers that each channel remembers.
        conv_width: taps of the convolution before the scan.
        expand: inner channels over ``dim``.
        dt_rank: width of the bottleneck through which step sizes are made; dim / 16, rounded up, when
            None.
        dt_min: the smallest step size that a channel starts with; they are drawn evenly on a log scale.
        dt_max: the largest.
        bias: biases in the first and the last projection.
        conv_residual: the convolution's tap of the token itself is 1 + its weight, which weight decay pulls
            to the identity; false for the weight itself, as published models have it.
        kernel: ``torch``, or ``mamba_ssm`` for the authors' CUDA kernel.

    Raises:
        ToolmemError: for a size below 1, or a kernel that is not there, naming the key.
    """

    parameter_group = "ssm"

    def __init__(
        self,
        dim: int,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        kernel: Kernel = "torch",
        conv_residual: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(state_dim=state_dim, conv_width=conv_width, expand=expand, dt_rank=dt_rank)
        check_kernel(kernel)
        self.inner = expand * dim
        self.state_dim = state_dim
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.kernel = kernel
        self.in_proj = nn.Linear(dim, 2 * self.inner, bias=bias)
        self.conv = ShortConvolution(self.inner, conv_width, conv_residual)
        self.conv_bias = nn.Parameter(torch.zeros(self.inner))
        self.x_proj = nn.Linear(self.inner, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.inner, bias=False)
        self.dt_bias = nn.Parameter(step_size_bias(self.inner, dt_min, dt_max))
        # A = -1, -2, ..., -n for every channel (S4D-real), as (n, d) laid out flat: decay rates are no
        # matrix, and nothing that treats matrices as linear maps should take them for one.
        rates = torch.arange(1.0, state_dim + 1)[:, None].expand(state_dim, self.inner)
        self.A_log = nn.Parameter(rates.log().flatten())
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out = nn.Linear(self.inner, dim, bias=bias)
        self.after_initialization()

    @torch.no_grad()
    def after_initialization(self) -> None:
        """Draw again what the paper draws in its own way, whatever the scheme of the rest."""
        draw_taps(self.conv)
        bound = 1 / math.sqrt(self.dt_rank)
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Empty decoding state of this layer; its size does not depend on ``max_len``."""
        shape = (batch_size, self.state_dim, self.inner)
        ssm = torch.zeros(shape, device=device, dtype=scan_dtype(dtype))
        return MambaState(self.conv.new_tail(batch_size, device, dtype), ssm)

    def forward(self, x: Tensor, context: Context, cache: MambaState | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, s, dim).
            context: documents, or how much of a chunk is real.
            cache: this layer's state, written to.
        """
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = F.silu(self.conv.run(u, context, cache, "tail") + self.conv_bias)
        steps, B, C = self.x_proj(u).split((self.dt_rank, self.state_dim, self.state_dim), dim=-1)
        dtype = scan_dtype(u.dtype)
        dt = step_sizes(self.dt_proj(steps), self.dt_bias, context)
        A = -torch.exp(self.A_log.to(dtype)).view(self.state_dim, self.inner)
        y = self._scan(u.to(dtype), dt, A, B.to(dtype), C.to(dtype), context, cache)
        y = torch.addcmul(y.to(u.dtype), u, self.D)
        return self.out(y * F.silu(z))

    def _scan(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        context: Context,
        cache: MambaState | None,
    ) -> Tensor:
        if self.kernel == "mamba_ssm":
            refuse_cpu(u)
        initial, starts = initial_state(context, cache), document_starts(context)
        if cache is not None and u.shape[1] == 1:
            y, last = selective_scan_sequential(u, dt, A, B, C, starts, initial)
        elif self.kernel == "mamba_ssm" and initial is None:
            y, last = mamba_ssm_selective_scan(u, dt, A, B, C, starts)
        else:
            y, last = selective_scan(u, dt, A, B, C, starts, initial)
        if cache is not None:
            cache.ssm = last
        return y


class Mamba(LanguageModel):
    """A stack of Mamba-1 blocks.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        state_dim: numbers that each channel remembers.
        conv_width: taps of the convolution before the scan.
        expand: inner channels over ``dim``.
        dt_rank: width of the bottleneck that makes step sizes; dim / 16, rounded up, when None.
        dt_min: the smallest step size that a channel starts with.
        dt_max: the largest.
        hidden_dim: width inside a feed-forward after each mixer; None for none, as in the paper.
        max_seq_len: longest sequence. Nothing in the model depends on it.
        norm: ``rms`` or ``layer``.
        feed_forward: ``swiglu``, ``silu``, ``gelu`` or ``relu2``, where there is one.
        tie_embeddings: the head is the embedding, transposed.
        embedding_scale: multiply embedded tokens by sqrt(dim).
        embedding_norm: normalise embedded tokens.
        logit_softcap: bound the logits to (-cap, cap) by a tanh; 0 for none.
        dropout: probability, on embedded tokens and on what each branch adds to the stream.
        residual_conv: taps of a short convolution on each branch's input (Canon layers); 0 for none.
        sandwich_norm: normalise also what each branch adds.
        initialization: a scheme of ``initialization.py``.
        mup_base_dim: the width at which the learning rate was tuned, for ``initialization: mup``.
        norm_eps: epsilon of the norms.
        bias: biases in projections and layer norms.
        conv_residual: the convolution's tap of the token itself is 1 + its weight; false for the weight
            itself, as published models have it.
        kernel: ``torch``, or ``mamba_ssm`` for the authors' CUDA kernel.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        hidden_dim: int | None = None,
        max_seq_len: int = 1024,
        norm: NormKind = "rms",
        feed_forward: FeedForwardKind = "swiglu",
        tie_embeddings: bool = False,
        embedding_scale: bool = False,
        embedding_norm: bool = False,
        logit_softcap: float = 0.0,
        dropout: float = 0.0,
        residual_conv: int = 0,
        sandwich_norm: bool = False,
        initialization: str = "scaled",
        mup_base_dim: int | None = None,
        norm_eps: float = 1e-5,
        bias: bool = False,
        kernel: Kernel = "torch",
        conv_residual: bool = True,
    ) -> None:
        check_sizes(
            vocab_size=vocab_size,
            dim=dim,
            n_layers=n_layers,
            hidden_dim=hidden_dim,
            max_seq_len=max_seq_len,
        )

        def block() -> Block:
            return Block(
                dim,
                Mamba1Mixer(
                    dim,
                    state_dim,
                    conv_width,
                    expand,
                    dt_rank,
                    dt_min,
                    dt_max,
                    bias,
                    kernel,
                    conv_residual,
                ),
                None if hidden_dim is None else FeedForward(dim, hidden_dim, feed_forward, bias),
                norm,
                norm_eps,
                bias,
                dropout,
                sandwich_norm,
                residual_conv,
            )

        super().__init__(
            [block() for _ in range(n_layers)],
            make_norm(norm, dim, norm_eps, bias),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=max_seq_len,
            tie_embeddings=tie_embeddings,
            embedding_scale=embedding_scale,
            embedding_norm=make_norm(norm, dim, norm_eps, bias) if embedding_norm else None,
            logit_softcap=logit_softcap,
            dropout=dropout,
            initialization=initialization,
            mup_base_dim=mup_base_dim,
        )


def scan_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """What a scan is worked out in, and its state kept in: float32 at least."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


def step_size_bias(n: int, dt_min: float, dt_max: float) -> Tensor:
    """(n,) biases whose softplus is drawn evenly on a log scale from ``dt_min`` to ``dt_max``.

    Raises:
        ToolmemError: unless 0 < dt_min <= dt_max.
    """
    if not 0 < dt_min <= dt_max:
        raise ToolmemError(
            f"dt_min is {dt_min} and dt_max {dt_max}: they must be above 0, and dt_max the larger"
        )
    low, high = math.log(dt_min), math.log(dt_max)
    # The authors' floor: a channel of a smaller step would hardly take anything in.
    dt = torch.exp(low + torch.rand(n) * (high - low)).clamp(min=1e-4)
    return dt + torch.log(-torch.expm1(-dt))


@torch.no_grad()
def draw_taps(conv: ShortConvolution) -> None:
    """Start a short convolution as the papers do, evenly within ±1/sqrt(width)."""
    bound = 1 / math.sqrt(conv.width)
    conv.taps.uniform_(-bound, bound)
    if conv.residual:
        conv.taps[: conv.channels] -= (
            1  # what ``ShortConvolution`` adds: a token's own tap is 1 + that
        )


def step_sizes(raw: Tensor, bias: Tensor, context: Context) -> Tensor:
    """softplus(raw + bias), in a scan's dtype; 0 at padding, where the state is left as it is.

    Args:
        raw: (b, s, ...).
        bias: (...).
        context: of the forward pass.
    """
    dtype = scan_dtype(raw.dtype)
    dt = F.softplus(raw.to(dtype) + bias.to(dtype))
    if context.counts is not None:
        index = torch.arange(raw.shape[1], device=raw.device)
        dt = dt * (index < context.counts[:, None])[:, :, None]
    return dt


def initial_state(context: Context, cache: MambaState | None) -> Tensor | None:
    """The state that a chunk goes on from; None where there is nothing before it."""
    return cache.ssm if cache is not None and context.n_keys else None


def document_starts(context: Context) -> Tensor | None:
    """(b, s) bool, the first token of every document but a row's first; None without documents."""
    if context.documents is None:
        return None
    return F.pad(context.documents[:, 1:] != context.documents[:, :-1], (1, 0))


def check_kernel(kernel: str) -> None:
    """Refuse, by name, a kernel that is unknown or not installed."""
    if kernel not in ("torch", "mamba_ssm"):
        raise ToolmemError(f"kernel: unknown {kernel!r}; choose torch or mamba_ssm")
    if kernel == "mamba_ssm" and importlib.util.find_spec("mamba_ssm") is None:
        raise ToolmemError(
            "kernel: mamba_ssm is not installed: install toolmem[mamba] where there is CUDA, or set "
            "kernel: torch"
        )


def refuse_cpu(x: Tensor) -> None:
    """Raise ``ToolmemError`` where the CUDA kernels cannot run."""
    if not x.is_cuda:
        raise ToolmemError(
            f"kernel: mamba_ssm runs on CUDA, and the model is on {x.device}: set kernel: torch"
        )


def mamba_ssm_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``selective_scan`` by the authors' kernel, which starts from zeros.

    Raises:
        ToolmemError: for packed documents, which that kernel cannot keep apart.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    if starts is not None:
        raise ToolmemError(
            "kernel: mamba_ssm cannot keep packed documents apart in Mamba-1: set kernel: torch"
        )
    channels_first = (tensor.transpose(1, 2) for tensor in (x, dt))
    y, last = selective_scan_fn(
        *channels_first, A.T, B.transpose(1, 2), C.transpose(1, 2), return_last_state=True
    )
    return y.transpose(1, 2), last.transpose(1, 2)
