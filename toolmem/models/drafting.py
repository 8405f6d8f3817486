"""A model with modules that draft its next tokens, for speculative generation.

``Drafting`` is any language model (the *base*) with such modules in the place where multi-token
prediction has its own (``multi_token``): they are trained and counted by the same code. The base's parts
are taken over under their own names, so that it computes, caches and generates as it did, and its
weights fit. Its recipe:

    model:
      init_from: runs/facts_in_tool            the base: its architecture and its weights
      model:
        class_path: toolmem.models.Medusa
        init_args: {n_heads: 4}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from toolmem.class_path import construct
from toolmem.errors import ToolmemError
from toolmem.models.draft_trees import Topology, Tree, guessed
from toolmem.models.language_model import LanguageModel
from toolmem.models.multi_token import TokensAhead

# What the engine and training call: a base that does one of these in its own way would lose it here.
SHARED = ("hidden", "embed", "logits", "forward", "context", "new_cache")


class Drafting(LanguageModel):
    """A base model and modules that draft; the base is frozen unless it is to learn on.

    Args:
        vocab_size: number of token ids, the base's.
        base: ``{"class_path": ..., "init_args": ...}`` of the base.
        make: makes the modules for a base.
        depth: tokens that they can draft one after the other.
        tree: paths of the tree that is drafted; a guess when None (``draft_trees.guessed``).
        freeze_base: the base's parameters are not trained, and it computes as in evaluation.

    Raises:
        ToolmemError: for a base that is missing, has another vocabulary, or cannot be wrapped.
    """

    multi_token: TokensAhead
    topology: Topology  # may be exchanged for one that was measured
    window: int = 1  # how many of the last features a draft wants
    drafts_at_once = True  # all depths by one call of the modules; else each depth by another

    def __init__(
        self,
        vocab_size: int,
        base: Mapping[str, Any] | None,
        make: Callable[[LanguageModel], TokensAhead],
        depth: int,
        tree: Sequence[Sequence[int]] | None,
        freeze_base: bool,
    ) -> None:
        nn.Module.__init__(self)
        built = build_base(base, vocab_size)
        vars(self).update({name: kept for name, kept in vars(built).items() if name != "init_args"})
        self.multi_token = make(built)
        self.freeze_base = freeze_base
        for name, parameter in self.named_parameters():
            if not name.startswith("multi_token."):
                parameter.requires_grad_(not freeze_base)
        self.depth = depth
        self.topology = self.tree_shape(guessed(depth) if tree is None else Topology.of(tree))

    def tree_shape(self, topology: Topology | None) -> Topology:
        """The tree that is asked for, the model's own when None.

        Raises:
            ToolmemError: for one that is deeper than what can be drafted.
        """
        shape = self.topology if topology is None else topology
        if shape.depth > self.depth:
            raise ToolmemError(
                f"tree: it has a path of {shape.depth} tokens, {self.depth} can be drafted: shorten it"
            )
        return shape

    def draft(
        self,
        features: Tensor,
        tokens: Tensor,
        counts: Tensor | None = None,
        topology: Topology | None = None,
    ) -> Tree:
        """Draft what comes after the token that was sampled last.

        Args:
            features: (batch, window, dim), what the head read (``hidden``) at the last positions that
                are certain, the newest last.
            tokens: (batch, window) int64, the token after each; the last is the one just sampled.
            counts: (batch,) int64, how many of the window's last columns are there; None when all are.
            topology: the tree's shape; the model's own when None.
        """
        raise NotImplementedError

    def draft_weights(self) -> int:
        """Weights that a call of the modules multiplies with."""
        return sum(p.numel() for p in self.multi_token.parameters())

    @torch.no_grad()
    def start_heads(self) -> None:
        """Give the modules what they take from the base's weights; called when those were loaded."""

    def train(self, mode: bool = True) -> Drafting:
        """As every module's; a frozen base stays as it is in evaluation."""
        super().train(mode)
        if self.freeze_base:
            for name, module in self.named_children():
                module.train(mode and name == "multi_token")
        return self

    def after_optimizer_step(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Nothing of a frozen base moves, its experts' balance included."""
        if not self.freeze_base:
            super().after_optimizer_step(reduce)


def build_base(spec: Mapping[str, Any] | None, vocab_size: int) -> LanguageModel:
    """The base, with first weights.

    Raises:
        ToolmemError: when it is missing, no language model, or of another vocabulary.
    """
    key = "model.model.init_args.base"
    if not spec or "class_path" not in spec:
        raise ToolmemError(
            f"{key} is missing: name the run whose model is to be drafted for by model.init_from, or "
            "give class_path and init_args"
        )
    options = {"vocab_size": vocab_size, **(spec.get("init_args") or {})}
    base = construct(str(spec["class_path"]), options, {}, key, LanguageModel)
    own = [name for name in SHARED if getattr(type(base), name) is not getattr(LanguageModel, name)]
    if own or isinstance(base, Drafting):
        what = f"has its own {own[0]}()" if own else "drafts already"
        raise ToolmemError(f"{key}: {spec['class_path']} {what}: it cannot be wrapped")
    if base.vocab_size != vocab_size:
        raise ToolmemError(
            f"{key} has vocab_size {base.vocab_size}, the data's tokenizer {vocab_size}: train on the "
            "data, with the tokenizer, of the base"
        )
    return base
