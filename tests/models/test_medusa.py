"""Medusa's heads against their formula."""

import pytest
import torch
from drafting_toys import BASES, VOCAB, make, rows

from toolmem.models import Medusa
from toolmem.models.context import Extras


def plain_log_probs(model, k, h):
    """Head k of one state, written plainly."""
    linear, weight = model.multi_token.blocks[k - 1].linear, model.multi_token.heads[k - 1]
    z = linear.weight @ h + linear.bias
    logits = weight @ (h + z / (1 + torch.exp(-z)))
    if model.logit_softcap:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    return logits - torch.log(torch.exp(logits).sum())


@pytest.mark.parametrize("base", ["transformer", "softcap"])
def test_loss_in_plain_float64(base):
    model = make("medusa", base, n_heads=3, decay=0.7).double()
    x, targets, mask = rows(share=0.9)
    extras = Extras()
    states = model.hidden(x)
    model.multi_token.add_losses(model, extras, states, x, targets, mask)
    total = 0.0
    for k in (1, 2, 3):
        summed = 0.0
        for row in range(2):
            for t in range(11 - k):
                if mask[row, t : t + k + 1].all():  # all that is guessed is the model's own
                    log_probs = plain_log_probs(model, k, states[row, t])
                    summed -= log_probs[targets[row, t + k]]
        loss = summed / mask.sum()
        torch.testing.assert_close(extras.metrics[f"medusa/loss_{k + 1}"], loss.detach())
        total += 0.7**k * loss
    torch.testing.assert_close(extras.losses["medusa/loss"].double(), total, rtol=1e-6, atol=0)


@pytest.mark.parametrize("base", BASES)
@torch.no_grad()
def test_heads_start_as_the_models_own(base):
    model = Medusa(VOCAB, BASES[base], n_heads=2).eval()
    x, _, _ = rows(share=0.9)
    states = model.hidden(x)
    for _ in range(2):
        own = model.logits(states[:, -1]).log_softmax(-1)
        chosen, log_probs = model.candidates(states[:, -1], VOCAB)
        for head in (0, 1):
            torch.testing.assert_close(log_probs[:, head], own.gather(1, chosen[:, head]))
        model.head.weight.mul_(0.5)  # as if other weights had been loaded
        model.start_heads()


@torch.no_grad()
def test_a_tree_combines_the_heads_likeliest_tokens():
    tree = [[0], [1], [0, 0], [0, 2], [0, 2, 1]]
    model = make("medusa", n_heads=3, tree=tree)
    x, _, _ = rows(share=0.9)
    features = model.hidden(x)[:, -1:]
    drafted = model.draft(features, x[:, -1:])
    for lane in range(2):
        for node, path in enumerate(model.topology.paths):
            log_probs = plain_log_probs(model, len(path), features[lane, 0])
            best = log_probs.sort(descending=True)
            assert drafted.tokens[lane, node] == best.indices[path[-1]]
            torch.testing.assert_close(drafted.log_probs[lane, node], best.values[path[-1]])


@torch.no_grad()
def test_packed_documents_lose_what_rows_of_their_own_lose():
    model = make("medusa")
    x, targets, mask = rows(batch=1, seq=20, share=0.9)
    lengths = [7, 1, 12]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]

    def total(*parts, documents=None):
        extras = Extras()
        states = model.hidden(parts[0], documents=documents)
        model.multi_token.add_losses(model, extras, states, *parts, documents)
        return extras.losses["medusa/loss"] * parts[2].sum()

    packed = total(x, targets, mask, documents=documents)
    parts = [t.split(lengths, dim=1) for t in (x, targets, mask)]
    apart = sum(total(*part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)
