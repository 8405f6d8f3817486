"""Shapes of trees of drafts: order, ancestors, levels, and the best tree against trying all."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolmem.errors import ToolmemError
from toolmem.models.draft_trees import Topology, guessed


@st.composite
def trees(draw):
    """Paths of a tree, in any order."""
    paths = [()]
    for _ in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(paths))
        paths.append((*parent, draw(st.integers(0, 3))))
    return draw(st.permutations(sorted(set(paths[1:]))))


@given(trees())
def test_parents_come_first_and_ancestors_are_the_parents_of_parents(paths):
    shape = Topology.of(paths)
    assert sorted(shape.paths) == sorted(paths)
    parents = shape.parents.tolist()
    for node, parent in enumerate(parents):
        assert parent < node
        line, above = {node}, parent
        while above >= 0:
            line.add(above)
            above = parents[above]
        assert set(shape.ancestors[node].nonzero().flatten().tolist()) == line
        assert len(line) == shape.depths[node] == len(shape.paths[node])
        assert shape.ranks[node] == shape.paths[node][-1]
    assert shape.depth == max(map(len, paths))
    assert shape.width == 1 + max(itertools.chain(*paths))


@given(trees())
def test_levels_tell_the_same_tree(paths):
    shape = Topology.of(paths)
    inner = [-1]  # the root
    seen = []
    for level in shape.levels:
        assert [inner[place] for place in level.parents] == shape.parents[level.nodes].tolist()
        assert level.ranks == shape.ranks[level.nodes].tolist()
        inner = [level.nodes[place] for place in level.inner]
        seen += level.nodes
    assert seen == list(range(len(shape))) and inner == []
    with_children = set(shape.parents.tolist()) - {-1}
    assert with_children == {level.nodes[place] for level in shape.levels for place in level.inner}


def expected_tokens(shape, accuracies):
    """How many drafted tokens are right on average: each path's product, summed."""
    total = 0.0
    for path in shape.paths:
        product = 1.0
        for depth, rank in enumerate(path):
            product *= accuracies[depth][rank]
        total += product
    return total


@pytest.mark.parametrize("seed", range(5))
def test_no_tree_of_as_many_nodes_expects_more_tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(3, 2, generator=generator).sort(dim=1, descending=True).values / 2
    accuracies = drawn.tolist()
    every = [path for depth in (1, 2, 3) for path in itertools.product(range(2), repeat=depth)]
    for n_nodes in (1, 3, 5):
        best = 0.0
        for paths in itertools.combinations(every, n_nodes):
            chosen = set(paths)
            if all(len(path) == 1 or path[:-1] in chosen for path in paths):
                best = max(best, expected_tokens(Topology.of(paths), accuracies))
        found = Topology.from_accuracies(accuracies, n_nodes)
        assert len(found) == n_nodes
        assert expected_tokens(found, accuracies) == pytest.approx(best)


def test_a_chain_and_a_guess():
    assert Topology.chain(3).paths == ((0,), (0, 0), (0, 0, 0))
    assert Topology.chain(3).parents.tolist() == [-1, 0, 1]
    for depth in (1, 4):
        shape = guessed(depth)
        assert set(Topology.chain(depth).paths) <= set(shape.paths)
        assert shape.width > 1 and len(shape) == 3 * depth


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        ([], "no path"),
        ([[0], [0]], "twice"),
        ([[0], [1, 0]], "[1] is not there"),
        ([[0], [0, -1]], "no path"),
        ([[]], "no path"),
    ],
)
def test_refusals(paths, words):
    with pytest.raises(ToolmemError, match=words.replace("[", r"\[").replace("]", r"\]")):
        Topology.of(paths)
