"""EAGLE's feature predictor against its formula, and its drafts against what it is trained to do."""

import math

import pytest
import torch
from drafting_toys import BASES, make, rows

from toolmem.models.context import Extras
from toolmem.models.draft_trees import Topology

TREE = [[0], [1], [2], [0, 0], [0, 1], [2, 1], [0, 1, 0], [0, 1, 2], [2, 1, 0]]


def norm(x, module):
    return x / (x.square().mean() + module.eps).sqrt() * module.weight


def turned(y, position):
    half = len(y) // 2
    out = torch.empty_like(y)
    for i in range(half):
        angle = position * 10_000.0 ** (-2 * i / len(y))
        cos, sin = math.cos(angle), math.sin(angle)
        out[i] = y[i] * cos - y[i + half] * sin
        out[i + half] = y[i + half] * cos + y[i] * sin
    return out


def plain_prediction(model, pairs):
    """The feature that follows pairs of (feature, embedded token): a layer over the last of them."""
    predictor = model.multi_token
    block, attention = predictor.blocks[0], predictor.attention
    heads, width = attention.n_heads, attention.head_dim
    x = [predictor.join.weight @ torch.cat(pair) + predictor.join.bias for pair in pairs]
    raw = [attention.qkv.weight @ norm(y, block.mixer_norm) for y in x]
    queries, keys, values = [], [], []
    for position, z in enumerate(raw):
        if attention.conv is not None:
            taps = attention.conv.taps.view(attention.conv.width, -1)
            z = z + sum(taps[j] * raw[position - j] for j in range(len(taps)) if j <= position)
        q, k, v = z.view(3, heads, width)
        queries.append([turned(head, position) for head in q])
        keys.append([turned(head, position) for head in k])
        values.append(v)
    reach = attention.window
    assert reach == model.window - (attention.conv.width - 1 if attention.conv is not None else 0)
    mixed = []
    for head in range(heads):
        scores = [queries[-1][head] @ k[head] / math.sqrt(width) for k in keys[-reach:]]
        shares = torch.softmax(torch.stack(scores), 0)
        mixed.append(sum(s * v[head] for s, v in zip(shares, values[-reach:], strict=True)))
    y = x[-1] + attention.out.weight @ torch.cat(mixed)
    gate, value = (block.feed_forward.up.weight @ norm(y, block.feed_forward_norm)).chunk(2)
    return y + block.feed_forward.down.weight @ (gate / (1 + torch.exp(-gate)) * value)


def head(model, feature):
    logits = model.head.weight @ feature
    if model.logit_softcap:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    return logits


def embedded(model, token):
    return model.embedding.weight[token] * model.scale


def double(model):
    """In float64, rotary tables too."""
    model = model.double()
    predictor = model.multi_token
    width = predictor.attention.head_dim
    half = torch.arange(0, width, 2).double()
    angles = torch.arange(len(predictor.rotary_cos)).double()[:, None] * 10_000.0 ** (-half / width)
    predictor.rotary_cos = torch.cat((angles.cos(), angles.cos()), -1)[:, None]
    predictor.rotary_sin = torch.cat((-angles.sin(), angles.sin()), -1)[:, None]
    return model


@pytest.mark.parametrize("conv_width", [0, 3])
@pytest.mark.parametrize("base", ["transformer", "softcap", "mamba2"])
def test_loss_in_plain_float64(base, conv_width):
    options = {"window": 4 + max(conv_width - 1, 0), "conv_width": conv_width}
    model = double(make("eagle", base, **options, classification_weight=0.3))
    x, targets, mask = rows(seq=9)
    extras = Extras()
    states = model.hidden(x)
    model.multi_token.add_losses(model, extras, states, x, targets, mask)
    total = 0.0
    for row in range(2):
        pairs = []
        for t in range(8):
            pairs.append((states[row, t], embedded(model, x[row, t + 1])))
            if not mask[row, t + 1]:
                continue
            predicted, truth = plain_prediction(model, pairs), states[row, t + 1]
            for a in (predicted - truth).abs():
                total += (0.5 * a**2 if a < 1 else a - 0.5) / len(truth)
            said = torch.softmax(head(model, truth), 0)
            total -= 0.3 * (said * torch.log_softmax(head(model, predicted), 0)).sum()
    expected = total / mask.sum()
    torch.testing.assert_close(extras.metrics["eagle/loss_2"], expected.detach())
    torch.testing.assert_close(extras.losses["eagle/loss"].double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("conv_width", [0, 1, 3])
@pytest.mark.parametrize("base", ["transformer", "softcap"])
@pytest.mark.parametrize(("columns", "window"), [(5, 5), (9, 5), (3, 8), (1, 5), (2, 5)])
@torch.no_grad()
def test_drafts_are_predictions_fed_back(base, columns, window, conv_width):
    """Every node by the formula, from the features before it: certain ones, then predicted ones."""
    model = double(make("eagle", base, window=window, conv_width=conv_width, depth=3, tree=TREE))
    x, _, _ = rows(seq=10)
    states = model.hidden(x)
    tokens = x[:, 10 - columns :]
    features = states[:, 9 - columns : 9]
    tree = model.draft(features, tokens)
    assert torch.equal(tree.parents, model.topology.parents)
    for lane in range(2):
        certain = [(features[lane, i], embedded(model, tokens[lane, i])) for i in range(columns)]
        for node, path in enumerate(model.topology.paths):
            pairs = list(certain)
            for depth in range(len(path)):
                predicted = plain_prediction(model, pairs)
                log_probs = torch.log_softmax(head(model, predicted), 0)
                best = log_probs.sort(descending=True)
                token = best.indices[path[depth]]
                pairs.append((predicted, embedded(model, token)))
            assert tree.tokens[lane, node] == token
            torch.testing.assert_close(
                tree.log_probs[lane, node], best.values[path[-1]].float(), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("conv_width", [0, 3])
@torch.no_grad()
def test_columns_that_are_not_there_change_nothing(conv_width):
    model = make("eagle", window=6, conv_width=conv_width, tree=TREE)
    x, _, _ = rows(batch=3)
    features, tokens = model.hidden(x)[:, -7:-1], x[:, -6:]
    counts = torch.tensor([1, 6, 3])
    ragged = model.draft(features, tokens, counts)
    for lane, count in enumerate(counts):
        alone = model.draft(
            features[lane : lane + 1, 6 - count :], tokens[lane : lane + 1, 6 - count :]
        )
        assert torch.equal(alone.tokens[0], ragged.tokens[lane])
        torch.testing.assert_close(alone.log_probs[0], ragged.log_probs[lane], atol=1e-5, rtol=1e-4)
    noise = torch.where(torch.arange(6)[:, None] < 6 - counts[:, None, None], 9.0, 0.0)
    other = model.draft(features + noise, tokens, counts)
    assert torch.equal(other.tokens, ragged.tokens)


@torch.no_grad()
def test_the_first_token_is_that_of_training():
    """Training's whole rows and a draft's window agree, at every place."""
    model = make("eagle", window=5)
    x, _, _ = rows(seq=12)
    states = model.hidden(x)
    [predicted] = model.multi_token.hidden(model, states, x)
    said = model.logits(predicted).log_softmax(-1).max(-1)
    for t in range(11):
        first = max(0, t - 4)
        tree = model.draft(
            states[:, first : t + 1], x[:, first + 1 : t + 2], topology=Topology.chain(1)
        )
        assert torch.equal(tree.tokens[:, 0], said.indices[:, t])
        torch.testing.assert_close(tree.log_probs[:, 0], said.values[:, t], atol=1e-5, rtol=1e-4)


def test_noise_is_of_training_alone_and_as_large_as_said():
    model = make("eagle", noise=0.25)
    x, _, _ = rows()
    states = model.hidden(x)
    seen = []
    joined = model.multi_token.joined
    model.multi_token.joined = lambda m, features, tokens: (
        seen.append(features) or joined(m, features, tokens)
    )
    model.multi_token.hidden(model, states, x)
    model.train()
    model.multi_token.hidden(model, states, x)
    assert torch.equal(seen[0], states[:, :-1])
    away = (seen[1] - states[:, :-1]).abs()
    assert 0.2 < away.max() <= 0.25 + 1e-6 and 0.1 < away.mean() < 0.15


@torch.no_grad()
def test_packed_documents_lose_what_rows_of_their_own_lose():
    model = make("eagle", window=6)
    x, targets, mask = rows(batch=1, seq=20)
    lengths = [7, 1, 12]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]

    def total(*parts, documents=None):
        extras = Extras()
        states = model.hidden(parts[0], documents=documents)
        model.multi_token.add_losses(model, extras, states, *parts, documents)
        return extras.losses["eagle/loss"] * parts[2].sum()

    packed = total(x, targets, mask, documents=documents)
    parts = [t.split(lengths, dim=1) for t in (x, targets, mask)]
    apart = sum(total(*part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)


def test_parameters_on_paper():
    model = make("eagle", n_heads=2, hidden_dim=40)
    block = 4 * 16 * 16 + 3 * 16 * 40 + 2 * 16
    assert model.parameter_counts()["eagle"] == block + 2 * 16 * 16 + 16
    assert BASES["transformer"]["init_args"]["dim"] == 16
