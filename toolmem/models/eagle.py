"""EAGLE: drafts by a one-layer model of the base's own features (arXiv 2401.15077).

A *feature* is what the base's head reads at a position. From it and the token that was then sampled a
small autoregressive model predicts the next feature, and the base's own head turns that into a token:

    f'_{t+1} = Block(M [f_t ; Emb(x_{t+1})])_t        p(x_{t+2}) = softmax(Head(f'_{t+1}))

The next step takes f'_{t+1} and x_{t+2} in their place, and so on. Knowing the token that was sampled is
what makes features predictable (section 3). The loss is SmoothL1(f', f) + w CE(Head(f), Head(f')),
with noise on the features in training (section 4.2, 4.3).

Unlike in the paper the block, Llama's with both its norms, attends to the last ``window`` pairs of
feature and token alone. So a draft needs nothing but those, and keeps no state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toolmem.errors import ToolmemError
from toolmem.models.attention import Attention, rotary_tables
from toolmem.models.context import Context
from toolmem.models.draft_trees import Topology, Tree
from toolmem.models.drafting import Drafting
from toolmem.models.layers import Block, BlockState, FeedForward
from toolmem.models.linear_maps import linear_maps
from toolmem.models.multi_token import TokensAhead, wide

if TYPE_CHECKING:
    from toolmem.models.language_model import LanguageModel


class FeaturePredictor(TokensAhead):
    """Predicts a base's next feature.

    Args:
        base: whose features they are.
        n_heads: query heads of its layer.
        hidden_dim: width inside its feed-forward.
        window: pairs of feature and token that it looks back on.
        classification_weight: of the tokens' cross-entropy beside the features' distance.
        noise: in training features are off by up to this, uniformly.
    """

    rotary_cos: Tensor
    rotary_sin: Tensor

    def __init__(
        self,
        base: LanguageModel,
        n_heads: int,
        hidden_dim: int,
        window: int,
        classification_weight: float,
        noise: float,
    ) -> None:
        super().__init__("eagle", "sequential", [1.0])
        self.classification_weight = classification_weight
        self.noise = noise
        attention = Attention(base.dim, n_heads, window=window)
        if attention.head_dim % 2:
            raise ToolmemError(
                f"n_heads {n_heads} makes heads of {attention.head_dim} numbers, and rotary positions "
                f"turn pairs: the base's dim {base.dim} / n_heads must be even"
            )
        feed_forward = FeedForward(base.dim, hidden_dim)
        self.join = nn.Linear(2 * base.dim, base.dim)
        self.blocks = nn.ModuleList([Block(base.dim, attention, feed_forward)])
        cos, sin = rotary_tables(attention.head_dim, base.max_seq_len + window, 10_000.0)
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)
        for weight in linear_maps(self).values():
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        nn.init.zeros_(self.join.bias)

    @property
    def attention(self) -> Attention:
        """The layer's."""
        return self.blocks[0].mixer  # type: ignore[return-value]

    def joined(self, model: LanguageModel, features: Tensor, tokens: Tensor) -> Tensor:
        """What the layer reads of features and the tokens after them, (..., dim)."""
        return self.join(torch.cat((features, model.embed(tokens).to(features.dtype)), dim=-1))

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines at positions of any shape."""
        return self.rotary_cos[positions], self.rotary_sin[positions]

    def hidden(
        self, model: LanguageModel, states: Tensor, tokens: Tensor, documents: Tensor | None = None
    ) -> list[Tensor]:
        """The predicted features of all positions but the first; as ``TokensAhead.hidden``."""
        length = tokens.shape[1] - 1
        if length < 1:
            return []
        of_rows = None if documents is None else documents[:, :length]
        context = model.context(tokens[:, :length], of_rows, None)
        context.rotary = self.rotary(context.positions)
        features = states[:, :length]
        if self.noise and self.training:
            features = features + self.noise * (2 * torch.rand_like(features) - 1)
        return [self.blocks[0](self.joined(model, features, tokens[:, 1:]), context)]

    def losses(
        self, model: LanguageModel, ahead: int, predicted: Tensor, truth: Tensor, wanted: Tensor
    ) -> Tensor:
        """Distance from the true feature, a mean over its numbers, and cross-entropy with what the base
        says there; arguments as ``TokensAhead.losses``.
        """
        truth = truth.detach()
        distance = F.smooth_l1_loss(wide(predicted), wide(truth), reduction="sum") / truth.shape[-1]
        said = wide(model.logits(truth)).softmax(dim=-1).detach()
        cross_entropy = F.cross_entropy(wide(model.logits(predicted)), said, reduction="sum")
        return distance + self.classification_weight * cross_entropy


class Seen:
    """Keys and values of the pairs that a draft has met; a layer's state that says who sees whom."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.mask: Tensor | None = None  # (batch, new, all so far) bool, of the next call

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Keep new pairs: (batch, n, heads, head_dim) each."""
        self.keys.append(keys.transpose(1, 2))
        self.values.append(values.transpose(1, 2))

    def attend(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """As ``AttentionCache.attend``, by the mask."""
        assert self.mask is not None
        self.add(keys, values)
        all_keys, all_values = torch.cat(self.keys, dim=2), torch.cat(self.values, dim=2)
        return mixer.attend(queries.transpose(1, 2), all_keys, all_values, self.mask[:, None])


class Eagle(Drafting):
    """A model with EAGLE's feature predictor (arXiv 2401.15077).

    Args:
        vocab_size: number of token ids.
        base: ``class_path`` and ``init_args`` of the model that is drafted for; taken from the run that
            ``model.init_from`` names when None.
        n_heads: query heads of the predictor's layer.
        hidden_dim: width inside its feed-forward; 4 * dim when None.
        window: pairs of feature and token that it looks back on.
        depth: tokens that are drafted one after the other, at most.
        classification_weight: of the tokens' cross-entropy beside the features' distance.
        noise: in training features are off by up to this, uniformly.
        tree: paths of the tree that is drafted, each the rank of the token at each depth; a guess when
            None.
        freeze_base: train the predictor alone.

    Raises:
        ToolmemError: for options outside their range, by name, or a base that does not fit.
    """

    multi_token: FeaturePredictor

    def __init__(
        self,
        vocab_size: int,
        base: dict[str, Any] | None = None,
        n_heads: int = 2,
        hidden_dim: int | None = None,
        window: int = 32,
        depth: int = 4,
        classification_weight: float = 0.1,
        noise: float = 0.1,
        tree: list[list[int]] | None = None,
        freeze_base: bool = True,
    ) -> None:
        sizes = {"n_heads": n_heads, "window": window, "depth": depth, "hidden_dim": hidden_dim}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ToolmemError(f"{name} is {size}: it must be at least 1")
        if depth > window:
            raise ToolmemError(
                f"depth is {depth}, window {window}: drafts are at most a window deep"
            )
        if classification_weight < 0 or noise < 0:
            raise ToolmemError("classification_weight and noise must be 0 (off) or more")

        def make(built: LanguageModel) -> FeaturePredictor:
            width = hidden_dim or 4 * built.dim
            return FeaturePredictor(built, n_heads, width, window, classification_weight, noise)

        super().__init__(vocab_size, base, make, depth, tree, freeze_base)
        self.window = window

    @torch.no_grad()
    def draft(
        self,
        features: Tensor,
        tokens: Tensor,
        counts: Tensor | None = None,
        topology: Topology | None = None,
    ) -> Tree:
        """Draft level by level; arguments as ``Drafting.draft``.

        A node of depth d sees its ancestors and the window's columns but the first d: as many pairs as
        in training.
        """
        shape = self.tree_shape(topology)
        predictor, device = self.multi_token, tokens.device
        features, tokens = features[:, -self.window :], tokens[:, -self.window :]
        batch, columns = tokens.shape
        seen, context = Seen(), Context(torch.arange(columns, device=device))
        there = torch.ones(batch, columns, dtype=torch.bool, device=device)
        if counts is not None:
            there = context.positions >= columns - counts[:, None]
        x = predictor.joined(self, features, tokens)
        if columns > 1:
            before = x[:, :-1]
            context.rotary = predictor.rotary(context.positions[:-1])
            normed = predictor.blocks[0].mixer_norm(before)  # type: ignore[operator]
            seen.add(*predictor.attention.project(normed, context)[1:])
        seen.mask = there[:, None]
        x, inner = x[:, -1:], torch.empty(0, dtype=torch.int64)
        drafted = torch.empty(batch, len(shape), dtype=torch.int64, device=device)
        log_probs = torch.empty(batch, len(shape), dtype=torch.float32, device=device)
        for depth, level in enumerate(shape.levels):
            context.rotary = predictor.rotary(torch.full((x.shape[1],), columns - 1 + depth))
            predicted = predictor.blocks[0](x, context, BlockState(seen))  # type: ignore[arg-type]
            said = wide(self.logits(predicted)).log_softmax(dim=-1)
            best = said.topk(1 + max(level.ranks), dim=-1)
            drafted[:, level.nodes] = best.indices[:, level.parents, level.ranks]
            log_probs[:, level.nodes] = best.values[:, level.parents, level.ranks].float()
            # those that have children go on
            nodes = torch.tensor([level.nodes[place] for place in level.inner], dtype=torch.int64)
            if not len(nodes):
                break
            parents = [level.parents[place] for place in level.inner]
            x = predictor.joined(self, predicted[:, parents], drafted[:, nodes])
            inner = torch.cat((inner, nodes))
            near = there & (context.positions > columns + depth - self.window)
            lineage = shape.ancestors[nodes][:, inner].to(device)
            seen.mask = torch.cat(
                (
                    near[:, None].expand(-1, len(nodes), -1),
                    lineage.expand(batch, -1, -1),
                ),
                dim=2,
            )
        return Tree(drafted, shape.parents, log_probs)
