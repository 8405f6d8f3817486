"""How often drafts are right, against drafting at one place after another."""

import pytest
import torch

from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.evaluation import draft_accuracy
from toolmem.models import Eagle, Medusa
from toolmem.models.draft_trees import Topology

BASE = {
    "class_path": "toolmem.models.Transformer",
    "init_args": {"dim": 8, "n_layers": 1, "n_heads": 2, "max_seq_len": 32},
}
VOCAB = 3  # few, so that guesses are often right


def model_of(kind):
    torch.manual_seed(0)
    return (Medusa if kind == "medusa" else Eagle)(
        VOCAB, BASE, **({"n_heads": 3} if kind == "medusa" else {"depth": 3, "window": 4})
    ).eval()


def batch_of(packed, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(VOCAB, (3, 15), generator=generator)
    mask = torch.rand((3, 14), generator=generator) < 0.8
    documents = None
    if packed:
        documents = torch.tensor([[0] * 5 + [1] * 9, [0] * 14, [0] * 2 + [1] * 8 + [2] * 4]).int()
        ends = torch.cat((documents[:, 1:] != documents[:, :-1], torch.ones(3, 1).bool()), dim=1)
        mask &= ~ends
    return Batch(x[:, :-1], x[:, 1:], mask, documents=documents, n_tokens=42)


def one_by_one(model, batch, ranks):
    """The same, each document by itself, each place by itself."""
    tried, right = [0] * 3, [[0] * ranks for _ in range(3)]
    places = 0
    for row in range(3):
        ids = batch.documents[row] if batch.documents is not None else torch.zeros(14)
        for document in ids.unique():
            own = (ids == document).nonzero().flatten()
            tokens, targets, mask = (
                part[row, own] for part in (batch.tokens, batch.targets, batch.loss_mask)
            )
            states = model.hidden(tokens[None])[0]
            for t in range(len(own)):
                if not mask[t]:
                    continue
                places += 1
                first = max(0, t + 1 - model.window)
                pair = states[None, first : t + 1], targets[None, first : t + 1]
                chain = model.draft(*pair, topology=Topology.chain(3)).tokens[0]
                for depth in range(3):
                    if t + 1 + depth >= len(own) or not mask[t + 1 + depth]:
                        break
                    paths = [[0] * d for d in range(1, depth + 1)]
                    paths += [[0] * depth + [rank] for rank in range(ranks)]
                    tree = model.draft(*pair, topology=Topology.of(paths))
                    tried[depth] += 1
                    for rank in range(ranks):
                        hit = tree.tokens[0, depth + rank] == targets[t + 1 + depth]
                        right[depth][rank] += int(hit)
                    if chain[depth] != targets[t + 1 + depth]:
                        break
    return tried, right, places


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@torch.no_grad()
def test_counts(kind, packed, monkeypatch):
    monkeypatch.setattr("toolmem.evaluation.drafts.PLACES", 5)
    model = model_of(kind)
    batches = [batch_of(packed, seed) for seed in (0, 1)]
    found = draft_accuracy(model, batches, ranks=2)
    each = [one_by_one(model, batch, 2) for batch in batches]
    assert found.places == sum(one[2] for one in each)
    assert list(found.tried) == [sum(one[0][d] for one in each) for d in range(3)]
    for depth in range(3):
        expected = [sum(one[1][depth][rank] for one in each) for rank in range(2)]
        assert list(found.right[depth]) == expected
    assert found.accuracies[0][1] == found.right[0][1] / found.tried[0]
    assert found.accepted == sum(ranks[0] for ranks in found.right) / found.places


def test_nothing_to_draft():
    batch = batch_of(False)
    batch.loss_mask[:] = False
    with pytest.raises(ToolmemError, match="nothing to draft"):
        draft_accuracy(model_of("medusa"), [batch], ranks=1)
