"""Medusa: further heads on a model's last state, each for one more token ahead (arXiv 2401.10774).

Head k reads what the model's own head reads at a position and predicts the token k places after the
next, without having seen those between:

    p_k = softmax(V_k (h + SiLU(W_k h + b_k)))        W_k, b_k start at 0, V_k as the model's own head

so every head starts as the model's own. The loss is sum_k decay^k CE(p_k) (section 2.2.1); on a frozen
base this is the paper's Medusa-1. At a position all heads are asked at once, and their likeliest tokens
combined in a tree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.draft_trees import Topology, Tree
from toolmem.models.drafting import Drafting
from toolmem.models.multi_token import TokensAhead, wide

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


class ResidualLayer(nn.Module):
    """x + SiLU(W x + b); the identity at first.

    Args:
        dim: width of the residual stream.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return x + F.silu(self.linear(x))


class MedusaHeads(TokensAhead):
    """Heads for the tokens 2, 3, ... places on.

    Args:
        base: whose head they start as.
        n_heads: how many.
        decay: head k's loss counts decay^k.
    """

    # The vocabulary does not grow with the width, under muP.
    mup_fixed_outputs = ("heads",)

    def __init__(self, base: LanguageModel, n_heads: int, decay: float) -> None:
        super().__init__("medusa", "parallel", [decay**k for k in range(1, n_heads + 1)])
        self.blocks = nn.ModuleList(ResidualLayer(base.dim) for _ in range(n_heads))
        # One tensor outside of any list of layers: to optimizers these are heads, not matrices inside.
        self.heads = nn.Parameter(base.head.weight.detach().repeat(n_heads, 1, 1))

    def hidden(
        self, model: LanguageModel, states: Tensor, tokens: Tensor, documents: Tensor | None = None
    ) -> list[Tensor]:
        """What each head's own matrix reads; arguments as ``TokensAhead.hidden``."""
        seq = tokens.shape[1]
        return [
            block(states[:, : seq - ahead])
            for ahead, block in enumerate(self.blocks, start=1)
            if ahead < seq
        ]

    def losses(
        self, model: LanguageModel, ahead: int, predicted: Tensor, truth: Tensor, wanted: Tensor
    ) -> Tensor:
        """Cross-entropy of a head's own prediction; arguments as ``TokensAhead.losses``."""
        logits = wide(model.logits(predicted, self.heads[ahead - 1]))
        return F.cross_entropy(logits, wanted, reduction="sum")

    def logits(self, model: LanguageModel, hidden: Tensor) -> Tensor:
        """What all heads say.

        Args:
            model: the model that these belong to.
            hidden: (batch, dim), what its head reads.

        Returns:
            (batch, heads, vocab_size), float32 at least.
        """
        each = [
            model.logits(block(hidden), weight)
            for block, weight in zip(self.blocks, self.heads, strict=True)
        ]
        return wide(torch.stack(each, dim=1))


class Medusa(Drafting):
    """A model with Medusa heads (arXiv 2401.10774).

    Args:
        vocab_size: number of token ids.
        base: ``class_path`` and ``init_args`` of the model that is drafted for; taken from the run that
            ``model.init_from`` names when None.
        n_heads: heads: tokens that can be drafted.
        decay: head k's loss counts decay^k.
        tree: paths of the tree that is drafted, each the rank of the token at each depth; a guess when
            None.
        freeze_base: train the heads alone (Medusa-1); else the base too, by its own loss and theirs.

    Raises:
        ToolmemError: for options outside their range, by name, or a base that does not fit.
    """

    multi_token: MedusaHeads

    def __init__(
        self,
        vocab_size: int,
        base: dict[str, Any] | None = None,
        n_heads: int = 4,
        decay: float = 0.8,
        tree: list[list[int]] | None = None,
        freeze_base: bool = True,
    ) -> None:
        if n_heads < 1 or not 0 < decay <= 1:
            raise ToolmemError("n_heads must be 1 or more, decay above 0 and at most 1")
        super().__init__(
            vocab_size,
            base,
            lambda built: MedusaHeads(built, n_heads, decay),
            n_heads,
            tree,
            freeze_base,
        )

    @torch.no_grad()
    def start_heads(self) -> None:
        """Each head is the model's own at first."""
        self.multi_token.heads.copy_(self.head.weight.expand_as(self.multi_token.heads))

    @torch.no_grad()
    def candidates(self, hidden: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Each head's likeliest tokens.

        Args:
            hidden: (batch, dim), what the model's head reads at the last position.
            n: how many of each head.

        Returns:
            tokens int64 and their log-probabilities, both (batch, heads, n), likeliest first.
        """
        log_probs = self.multi_token.logits(self, hidden).log_softmax(dim=-1)
        found = log_probs.topk(n, dim=-1)
        return found.indices, found.values

    @torch.no_grad()
    def draft(
        self,
        features: Tensor,
        tokens: Tensor,
        counts: Tensor | None = None,
        topology: Topology | None = None,
    ) -> Tree:
        """Combine the heads' likeliest tokens; arguments as ``Drafting.draft``, the tokens are not used.

        What a node's log-probability is given is the features alone, not the tokens before it.
        """
        shape = self.tree_shape(topology)
        chosen, log_probs = self.candidates(features[:, -1], shape.width)
        heads, ranks = shape.depths - 1, shape.ranks
        return Tree(chosen[:, heads, ranks], shape.parents, log_probs[:, heads, ranks])
