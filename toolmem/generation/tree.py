"""Trees of dialogues: fork any node, go on with each branch, score, prune; what is shared is held once.

    root = engine.root(prompt)
    first, second = root.fork(2, sampler=Sampling())      # two ways to go on, tools in the loop
    again = first.say("Are you sure?").fork(4, sampler=Sampling())
    best = max(again, key=lambda node: node.log_prob)
    first.prune()                                         # with all that hangs on it

Each node owns the decoding state of its dialogue in pages that it shares with its parent and children. A
node that is not being gone on with takes part in nothing: its pages leave memory when others need their
place, and come back when it is forked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolmem.data.turn_format import turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.reference import Generated
from toolmem.generation.requests import Request
from toolmem.generation.turns import split_turns

if TYPE_CHECKING:
    from toolmem.generation.engine import Engine
    from toolmem.generation.paging import Branch


class Node:
    """A dialogue in a tree of them; made by ``Engine.root`` and ``fork``.

    Args:
        engine: it runs in.
        dialogue: what it holds.
        branch: its decoding state, which it owns.
        parent: that it hangs on; None for a root.
    """

    def __init__(
        self, engine: Engine, dialogue: Generated, branch: Branch, parent: Node | None = None
    ) -> None:
        self.engine = engine
        self.dialogue = dialogue
        self.parent = parent
        self.children: list[Node] = []
        self.score: float | None = None  # the caller's own
        self._branch: Branch | None = branch
        self.weights = engine.weights  # that made its decoding state
        if parent is not None:
            parent.children.append(self)

    @property
    def tokens(self) -> list[int]:
        """The whole dialogue's."""
        return self.dialogue.tokens

    @property
    def finished(self) -> bool:
        """Whether it ended by itself, or by its limits: it can still be gone on with after ``say``."""
        return self.dialogue.finish_reason == "end"

    @property
    def log_prob(self) -> float:
        """The model's log-probability of all that it wrote on the way here, in nats."""
        own = [x for x in self.dialogue.log_probs if not math.isnan(x)]
        return math.fsum(own)

    @property
    def depth(self) -> int:
        """Nodes between it and the root."""
        return 0 if self.parent is None else self.parent.depth + 1

    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of each turn."""
        return split_turns(self.tokens, self.engine.tokenizer)

    def fork(self, n: int = 1, *, seed: int | None = None, **options: Any) -> list[Node]:
        """Go on in ``n`` ways, at once.

        Args:
            n: children.
            seed: child i samples by seed + i; another for every fork of the tree when None.
            options: of ``Request``.

        Returns:
            the children, each a turn or more of the model's and its tools' longer.
        """
        return [child for _, child in fork_all([self] * n, seed=seed, **options)]

    def say(self, text: str) -> Node:
        """A child in which the user goes on; fork it for what the model says to that."""
        tokenizer = self.engine.tokenizer
        form = turn_format(tokenizer)
        tokens = list(self.tokens)
        marks = [i for i, _ in form.marks("assistant", "user")]
        if tokens[-1] == form.end:  # else the turn ends before another speaks
            marks = marks[1:]
        opened = [*marks, *tokenizer.encode(text), *(i for i, _ in form.marks("user", "assistant"))]
        tokens += opened
        dialogue = Generated(
            tokens,
            [*self.dialogue.roles, *form.codes(tokens)[-len(opened) :]],
            [*self.dialogue.log_probs, *([math.nan] * len(opened))],
            "length",
            list(self.dialogue.tool_calls),
            len(tokens),
        )
        child = Node(self.engine, dialogue, self.engine.fork_branch(self.branch), self)
        child.weights = self.weights
        return child

    @property
    def branch(self) -> Branch:
        """Its decoding state.

        Raises:
            ToolmemError: when it was pruned.
        """
        if self._branch is None:
            raise ToolmemError("this node was pruned: fork another")
        return self._branch

    def prune(self) -> None:
        """Give up a node and all that hangs on it; what others share with it stays."""
        for child in list(self.children):
            child.prune()
        if self._branch is not None:
            self.engine.free_branch(self._branch)
            self._branch = None
        if self.parent is not None and self in self.parent.children:
            self.parent.children.remove(self)

    def leaves(self) -> Iterator[Node]:
        """The nodes below it, itself perhaps, on which nothing hangs."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()

    def __iter__(self) -> Iterator[Node]:
        """It and all nodes below it, parents first."""
        yield self
        for child in self.children:
            yield from child


def fork_all(
    nodes: Sequence[Node], *, seed: int | None = None, **options: Any
) -> list[tuple[Node, Node]]:
    """Go on with many nodes at once, in one batch.

    Args:
        nodes: of one engine; one that stands there n times gets n children.
        seed: child i samples by seed + i; another for every call when None.
        options: of ``Request``, for all.

    Returns:
        (parent, child), in the order of ``nodes``.
    """
    if not nodes:
        return []
    engine = nodes[0].engine
    first = engine.next_seeds(len(nodes)) if seed is None else seed
    requests = [Request(node.tokens, seed=first + i, **options) for i, node in enumerate(nodes)]
    # What other weights made is read again.
    branches = [
        engine.fork_branch(node.branch) if node.weights == engine.weights else None
        for node in nodes
    ]
    pairs = []
    handles = engine.finish(requests, branches, keep=True)
    if any(handle.dialogue().finish_reason == "error" for handle in handles):
        for handle in handles:
            if handle.branch is not None:
                engine.free_branch(handle.branch)
    for node, handle in zip(nodes, handles, strict=True):
        result = handle.result()
        known = len(node.tokens)
        dialogue = Generated(
            result.tokens,
            [*node.dialogue.roles, *result.roles[known:]],
            [*node.dialogue.log_probs, *result.log_probs[known:]],
            result.finish_reason,
            [*node.dialogue.tool_calls, *result.tool_calls],
            known,
        )
        assert handle.branch is not None
        pairs.append((node, Node(engine, dialogue, handle.branch, node)))
    return pairs
