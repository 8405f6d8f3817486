"""EAGLE: drafts by a one-layer model of the base's own features (arXiv 2401.15077).

A *feature* is what the base's head reads at a position. From it and the token that was then sampled a
small autoregressive model predicts the next feature, and the base's own head turns that into a token:

    f'_{t+1} = Block(M [f_t ; Emb(x_{t+1})])_t        p(x_{t+2}) = softmax(Head(f'_{t+1}))

The next step takes f'_{t+1} and x_{t+2} in their place, and so on. Knowing the token that was sampled is
what makes features predictable (section 3). The loss is SmoothL1(f', f) + w CE(Head(f), Head(f')),
with noise on the features in training (section 4.2, 4.3).

Unlike in the paper the block, Llama's with both its norms, looks back on the last ``window`` pairs of
feature and token alone. So a draft needs nothing but those, and keeps no state. A short convolution
(``conv_width``) lets a narrow layer compare the last tokens with earlier ones, which is what copying is.
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
        window: pairs of feature and token that it looks back on, by attention and convolution together.
        conv_width: taps of a short convolution on queries, keys and values; 0 for none.
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
        conv_width: int,
        classification_weight: float,
        noise: float,
    ) -> None:
        super().__init__("eagle", "sequential", [1.0])
        self.classification_weight = classification_weight
        self.noise = noise
        reach = window - max(conv_width - 1, 0)
        attention = Attention(base.dim, n_heads, conv_width=conv_width, window=reach)
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
    """Keys and values of the pairs that a draft has met; a layer's state that says who sees whom.

    New pairs come as lanes of one token each, those of a level side by side.

    Args:
        batch_size: number of trees.
    """

    mask: Tensor  # (batch, new, all so far) bool, of the next call
    tail: Tensor  # (batch * new, taps - 1, channels): what a short convolution reads before each

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor) -> None:
        """Keep new pairs: (batch, n, heads, head_dim) each."""
        self.keys.append(keys.transpose(1, 2))
        self.values.append(values.transpose(1, 2))

    def attend(
        self, mixer: Attention, queries: Tensor, keys: Tensor, values: Tensor, context: Context
    ) -> Tensor:
        """As ``AttentionCache.attend``, by the mask."""
        level = (self.batch_size, -1)
        self.add(keys.reshape(*level, *keys.shape[2:]), values.reshape(*level, *values.shape[2:]))
        y = mixer.attend(
            queries.reshape(*level, *queries.shape[2:]).transpose(1, 2),
            torch.cat(self.keys, dim=2),
            torch.cat(self.values, dim=2),
            self.mask[:, None],
        )
        return y.transpose(1, 2).reshape(len(queries), 1, *y.shape[1::2]).transpose(1, 2)

    def keep_tails(self, places: list[int]) -> None:
        """Of the level just met go on from these places, in this order."""
        of_level = self.tail.unflatten(0, (self.batch_size, len(self.tail) // self.batch_size))
        self.tail = of_level[:, places].flatten(0, 1)


class Eagle(Drafting):
    """A model with EAGLE's feature predictor (arXiv 2401.15077).

    Args:
        vocab_size: number of token ids.
        base: ``class_path`` and ``init_args`` of the model that is drafted for; taken from the run that
            ``model.init_from`` names when None.
        n_heads: query heads of the predictor's layer.
        hidden_dim: width inside its feed-forward; 4 * dim when None.
        window: pairs of feature and token that it looks back on.
        conv_width: taps of a short convolution on queries, keys and values; 0 for none, as in the paper.
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

    drafts_at_once = False

    def __init__(
        self,
        vocab_size: int,
        base: dict[str, Any] | None = None,
        n_heads: int = 2,
        hidden_dim: int | None = None,
        window: int = 32,
        conv_width: int = 0,
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
            return FeaturePredictor(
                built, n_heads, width, window, conv_width, classification_weight, noise
            )

        super().__init__(vocab_size, base, make, depth, tree, freeze_base)
        self.window = window

    def draft_weights(self) -> int:
        """As ``Drafting.draft_weights``: the layer's, and the base's head behind it."""
        return super().draft_weights() + self.head.weight.numel()

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
        block, attention = predictor.blocks[0], predictor.attention
        features, tokens = features[:, -self.window :], tokens[:, -self.window :]
        batch, columns = tokens.shape
        seen, context = Seen(batch), Context(torch.arange(columns, device=device))
        there = torch.ones(batch, columns, dtype=torch.bool, device=device)
        if counts is not None:
            there = context.positions >= columns - counts[:, None]
        x = predictor.joined(self, features, tokens)
        # what is not there is zero to the convolution, as what comes before a document
        normed = block.mixer_norm(x) * there[:, :, None]  # type: ignore[operator]
        context.rotary = predictor.rotary(context.positions)
        keys, values = attention.project(normed, context)[1:]
        seen.add(keys[:, :-1], values[:, :-1])
        if attention.conv is not None:
            first = attention.conv.width - 1
            earlier = F.pad(attention.qkv(normed[:, :-1]), (0, 0, first, 0))
            seen.tail = earlier[:, earlier.shape[1] - first :]
        seen.mask = self._near(there, 0)[:, None]
        x, inner = x[:, -1:], torch.empty(0, dtype=torch.int64)
        drafted = torch.empty(batch, len(shape), dtype=torch.int64, device=device)
        log_probs = torch.empty(batch, len(shape), dtype=torch.float32, device=device)
        for depth, level in enumerate(shape.levels):
            context.rotary = predictor.rotary(torch.tensor([columns - 1 + depth]))
            lanes = x.reshape(-1, 1, self.dim)
            predicted = block(lanes, context, BlockState(seen)).view_as(x)  # type: ignore[arg-type]
            said = wide(self.logits(predicted)).log_softmax(dim=-1)
            best = said.topk(1 + max(level.ranks), dim=-1)
            drafted[:, level.nodes] = best.indices[:, level.parents, level.ranks]
            log_probs[:, level.nodes] = best.values[:, level.parents, level.ranks].float()
            if not level.inner:
                break
            # those that have children go on
            nodes = torch.tensor([level.nodes[place] for place in level.inner])
            parents = [level.parents[place] for place in level.inner]
            if attention.conv is not None:
                seen.keep_tails(parents)
            x = predictor.joined(self, predicted[:, parents], drafted[:, nodes])
            inner = torch.cat((inner, nodes))
            near = self._near(there, depth + 1)[:, None].expand(-1, len(nodes), -1)
            lineage = shape.ancestors[nodes][:, inner].to(device)
            seen.mask = torch.cat((near, lineage.expand(batch, -1, -1)), dim=2)
        return Tree(drafted, shape.parents, log_probs)

    def _near(self, there: Tensor, depth: int) -> Tensor:
        """Which of the window's columns a node of this depth attends to, (batch, columns) bool."""
        columns = there.shape[1]
        first = columns + depth - self.multi_token.attention.window
        return there & (torch.arange(columns, device=there.device) >= first)
