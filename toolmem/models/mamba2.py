"""Mamba-2: heads with one decay each, scanned by matrix products (SSD, arXiv 2405.21060).

Unusual about it, beside what is of Mamba-1: everything comes from one projection, B and C are shared by
all heads of a group, the convolution runs over them too, and a norm follows the gate.

Shapes: b batch, s seq, d inner channels (expand * dim), h heads, p head_dim, g n_groups, n state_dim.
"""

# ruff: noqa: N803, N806 (A, B, C and D are the names that the papers give them)
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.context import Context
from toolmem.models.language_model import LanguageModel
from toolmem.models.layers import (
    Block,
    FeedForward,
    FeedForwardKind,
    NormKind,
    RMSNorm,
    ShortConvolution,
    make_norm,
)
from toolmem.models.mamba import (
    Kernel,
    MambaState,
    check_kernel,
    document_starts,
    draw_taps,
    initial_state,
    refuse_cpu,
    scan_dtype,
    step_size_bias,
    step_sizes,
)
from toolmem.models.ssd import ssd_scan, ssd_sequential
from toolmem.models.transformer import check_sizes


class GatedRMSNorm(RMSNorm):
    """RMSNorm of x * silu(gate), each group of channels by itself.

    Args:
        dim: channels.
        n_groups: groups that are normalised apart.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, n_groups: int, eps: float) -> None:
        super().__init__(dim, eps)
        self.n_groups = n_groups

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        """(b, s, d) and (b, s, d) to (b, s, d)."""
        x = x * F.silu(gate)
        if self.n_groups == 1:
            return super().forward(x)
        groups = x.unflatten(-1, (self.n_groups, -1))
        return F.rms_norm(groups, groups.shape[-1:], eps=self.eps).flatten(-2) * self.weight


class Mamba2Mixer(nn.Module):
    """Mamba-2's mixer: z, u, B, C, dt = in(x); u, B, C = silu(conv(u, B, C)); y = scan(u) + D u;
    out(norm(y * silu(z))).

    Each head scans with one decay: S_t = exp(dt_t A) S_{t-1} + dt_t B_t u_t^T, y_t = S_t^T C_t
    (``ssd.py``).

    Args:
        dim: width of the residual stream.
        state_dim: numbers that each channel remembers.
        conv_width: taps of the convolution before the scan.
        expand: inner channels over ``dim``.
        head_dim: channels of a head.
        n_groups: groups of heads that share B and C, as key/value heads are shared in attention.
        chunk_size: tokens that are scanned by one set of products; it changes the time that is taken,
            and nothing else.
        dt_min: the smallest step size that a head starts with; they are drawn evenly on a log scale.
        dt_max: the largest.
        bias: biases in the first and the last projection.
        conv_residual: the convolution's tap of the token itself is 1 + its weight, which weight decay pulls
            to the identity; false for the weight itself, as published models have it.
        norm_eps: epsilon of the norm after the gate.
        kernel: ``torch``, or ``mamba_ssm`` for the authors' Triton kernels.

    Raises:
        ToolmemError: for sizes that do not go together, or a kernel that is not there, naming the key.
    """

    parameter_group = "ssm"

    def __init__(
        self,
        dim: int,
        state_dim: int = 128,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 64,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        norm_eps: float = 1e-5,
        kernel: Kernel = "torch",
        conv_residual: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(
            state_dim=state_dim,
            conv_width=conv_width,
            expand=expand,
            head_dim=head_dim,
            n_groups=n_groups,
            chunk_size=chunk_size,
        )
        check_kernel(kernel)
        self.inner = expand * dim
        if self.inner % head_dim:
            raise ToolmemError(
                f"head_dim {head_dim} does not divide expand * dim = {self.inner}: change head_dim"
            )
        self.n_heads = self.inner // head_dim
        if self.n_heads % n_groups:
            raise ToolmemError(
                f"n_groups {n_groups} does not divide the {self.n_heads} heads (expand * dim / "
                "head_dim): change n_groups"
            )
        self.state_dim = state_dim
        self.head_dim = head_dim
        self.n_groups = n_groups
        self.chunk_size = chunk_size
        self.kernel = kernel
        self.shared = n_groups * state_dim
        channels = self.inner + 2 * self.shared
        self.in_proj = nn.Linear(dim, self.inner + channels + self.n_heads, bias=bias)
        self.conv = ShortConvolution(channels, conv_width, conv_residual)
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.dt_bias = nn.Parameter(step_size_bias(self.n_heads, dt_min, dt_max))
        self.A_log = nn.Parameter((1 + 15 * torch.rand(self.n_heads)).log())  # A from -16 to -1
        self.D = nn.Parameter(torch.ones(self.n_heads))
        self.norm = GatedRMSNorm(self.inner, n_groups, norm_eps)
        self.out = nn.Linear(self.inner, dim, bias=bias)
        self.after_initialization()

    def after_initialization(self) -> None:
        """Draw again what the paper draws in its own way, whatever the scheme of the rest."""
        draw_taps(self.conv)

    def new_cache(
        self,
        batch_size: int,
        max_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Empty decoding state of this layer; its size does not depend on ``max_len``."""
        shape = (batch_size, self.n_heads, self.state_dim, self.head_dim)
        ssm = torch.zeros(shape, device=device, dtype=scan_dtype(dtype))
        return MambaState(self.conv.new_tail(batch_size, device, dtype), ssm)

    def forward(self, x: Tensor, context: Context, cache: MambaState | None = None) -> Tensor:
        """Mix tokens.

        Args:
            x: (b, s, dim).
            context: documents, or how much of a chunk is real.
            cache: this layer's state, written to.
        """
        z, convolved, steps = self.in_proj(x).split(
            (self.inner, self.inner + 2 * self.shared, self.n_heads), dim=-1
        )
        convolved = F.silu(self.conv.run(convolved, context, cache, "tail") + self.conv_bias)
        u, B, C = convolved.split((self.inner, self.shared, self.shared), dim=-1)
        dtype = scan_dtype(convolved.dtype)
        heads = u.unflatten(-1, (self.n_heads, self.head_dim))
        dt = step_sizes(steps, self.dt_bias, context)
        A = -torch.exp(self.A_log.to(dtype))
        B, C = (t.to(dtype).unflatten(-1, (self.n_groups, self.state_dim)) for t in (B, C))
        y = self._scan(heads.to(dtype), dt, A, B, C, context, cache)
        y = torch.addcmul(y.to(u.dtype), heads, self.D[:, None]).flatten(-2)
        return self.out(self.norm(y, z))

    def _scan(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        context: Context,
        cache: MambaState | None,
    ) -> Tensor:
        if self.kernel == "mamba_ssm":
            refuse_cpu(x)
        initial, starts = initial_state(context, cache), document_starts(context)
        if cache is not None and x.shape[1] == 1:
            y, last = ssd_sequential(x, dt, A, B, C, starts, initial)
        elif self.kernel == "mamba_ssm":
            y, last = mamba_ssm_ssd_scan(x, dt, A, B, C, starts, initial, self.chunk_size)
        else:
            y, last = ssd_scan(x, dt, A, B, C, starts, initial, self.chunk_size)
        if cache is not None:
            cache.ssm = last
        return y


class Mamba2(LanguageModel):
    """A stack of Mamba-2 blocks.

    Args:
        vocab_size: number of token ids.
        dim: width of the residual stream.
        n_layers: number of blocks.
        state_dim: numbers that each channel remembers.
        conv_width: taps of the convolution before the scan.
        expand: inner channels over ``dim``.
        head_dim: channels of a head.
        n_groups: groups of heads that share B and C.
        chunk_size: tokens that are scanned by one set of products; it changes the time that is taken,
            and nothing else.
        dt_min: the smallest step size that a head starts with.
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
        kernel: ``torch``, or ``mamba_ssm`` for the authors' Triton kernels.

    Raises:
        ToolmemError: for sizes that do not go together, naming the key.
    """

    def __init__(
        self,
        vocab_size: int,
        dim: int,
        n_layers: int,
        state_dim: int = 128,
        conv_width: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 64,
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
            mixer = Mamba2Mixer(
                dim,
                state_dim,
                conv_width,
                expand,
                head_dim,
                n_groups,
                chunk_size,
                dt_min,
                dt_max,
                bias,
                norm_eps,
                kernel,
                conv_residual,
            )
            return Block(
                dim,
                mixer,
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


def mamba_ssm_ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` by the authors' kernels, whose states are (b, h, p, n)."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, last = mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        initial_states=None if initial is None else initial.transpose(2, 3).contiguous(),
        seq_idx=None if starts is None else starts.cumsum(dim=1, dtype=torch.int32),
        return_final_states=True,
    )
    return y, last.transpose(2, 3)
