"""Each processor against transformers' own, and what is drawn against exact probabilities."""

import math
from collections import Counter

import pytest
import torch
from transformers.generation import logits_process as theirs

from toolmem.errors import ToolmemError
from toolmem.generation import Sampling
from toolmem.generation import processors as ours
from toolmem.generation.reference import ASSISTANT, USER
from toolmem.generation.sampling import History

LANES, VOCAB = 64, 50


def logits(seed=0, lanes=LANES, vocab=VOCAB):
    """Flat lanes and sharp ones, some with tokens that are ruled out already."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(lanes, vocab, generator=generator)
    x *= torch.linspace(0.1, 8, lanes)[:, None]
    x[1::4, ::3] = -torch.inf
    return x


def histories(seed=0, length=40, vocab=VOCAB, lanes=LANES):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (lanes, length), generator=generator)


TRUNCATIONS = [
    *[(ours.keep_top_k, k, theirs.TopKLogitsWarper(k)) for k in (1, 5, 49, 50)],
    *[(ours.keep_top_p, p, theirs.TopPLogitsWarper(p)) for p in (0.01, 0.5, 0.9, 0.999)],
    *[(ours.keep_min_p, p, theirs.MinPLogitsWarper(p)) for p in (0.001, 0.1, 0.5, 1.0)],
    *[(ours.keep_typical, p, theirs.TypicalLogitsWarper(p)) for p in (0.1, 0.5, 0.9, 0.99)],
    *[(ours.keep_epsilon, e, theirs.EpsilonLogitsWarper(e)) for e in (1e-4, 0.01, 0.1, 0.9)],
    *[(ours.keep_eta, e, theirs.EtaLogitsWarper(e)) for e in (1e-4, 0.01, 0.1, 0.9)],
]


@pytest.mark.parametrize(
    ("own", "value", "their"), TRUNCATIONS, ids=[f"{f.__name__}-{v}" for f, v, _ in TRUNCATIONS]
)
def test_truncations_equal_transformers(own, value, their):
    for seed in range(3):
        x = logits(seed)
        kept = own(x, value)
        assert torch.equal(kept, their(None, x.clone()))
        assert not kept.isneginf().all(dim=-1).any()


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty_equals_transformers(penalty):
    x, tokens = logits(), histories()
    seen = ours.token_counts(tokens.tolist(), x) > 0
    expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(tokens, x.clone())
    assert torch.equal(ours.penalise_repetition(x, seen, penalty), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [0, 1, 2, 7, 40])
def test_no_repeat_ngrams_equals_transformers(n, length):
    x, tokens = logits(1), histories(length=length, vocab=4)
    x[x.isneginf()] = -50.0  # else the few tokens that are left may all be banned
    expected = theirs.NoRepeatNGramLogitsProcessor(n)(tokens, x.clone())
    assert torch.equal(ours.forbid_repeated_ngrams(x, tokens.tolist(), n), expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_ragged_histories_forbid_what_each_alone_forbids(n):
    rows = [row[: i % 9] for i, row in enumerate(histories(vocab=3).tolist())]
    x = torch.zeros(LANES, VOCAB)
    together = ours.forbid_repeated_ngrams(x, rows, n)
    for lane, row in enumerate(rows):
        grams = {tuple(row[i : i + n]) for i in range(len(row) - n + 1)}
        prefix = tuple(row[len(row) - n + 1 :]) if len(row) >= n - 1 else None
        banned = {g[-1] for g in grams if g[:-1] == prefix}
        assert set(together[lane].isneginf().nonzero()[:, 0].tolist()) == banned


def test_bias_equals_transformers():
    x = logits(2)
    bias = {3: 2.5, 7: -4.0, 49: 0.25, 8: -math.inf}
    expected = theirs.SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items() if t != 8])
    expected = expected(histories(), x.clone())
    expected[:, 8] = -torch.inf
    assert torch.equal(ours.add_bias(x, bias), expected)


def test_frequency_and_presence_by_counting():
    x = logits(3)
    rows = [row[: 3 * i % 40] for i, row in enumerate(histories(vocab=9).tolist())]
    got = ours.penalise_frequency(x, ours.token_counts(rows, x), 0.3, 0.7)
    for lane, row in enumerate(rows):
        counts = Counter(row)
        for token in range(VOCAB):
            expected = x[lane, token].item() - 0.3 * counts[token] - 0.7 * (counts[token] > 0)
            assert got[lane, token].item() == pytest.approx(expected, abs=1e-5)


def test_the_whole_chain_equals_transformers():
    x, tokens = logits(4), histories()
    chain = theirs.LogitsProcessorList([
        theirs.SequenceBiasLogitsProcessor([[[5], 1.5]]),
        theirs.RepetitionPenaltyLogitsProcessor(1.3),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.TemperatureLogitsWarper(0.8),
        theirs.TopKLogitsWarper(30),
        theirs.TopPLogitsWarper(0.95),
        theirs.MinPLogitsWarper(0.02),
        theirs.TypicalLogitsWarper(0.9),
        theirs.EpsilonLogitsWarper(0.003),
        theirs.EtaLogitsWarper(0.004),
    ])  # fmt: skip
    options = Sampling(
        0.8, 30, 0.95, min_p=0.02, typical_p=0.9, epsilon_cutoff=0.003, eta_cutoff=0.004,
        repetition_penalty=1.3, no_repeat_ngram_size=2, logit_bias={5: 1.5},
    )  # fmt: skip
    lanes = [History(row, [USER] * len(row), len(row)) for row in tokens.tolist()]
    assert torch.equal(options.process(x, lanes), chain(tokens, x.clone()))


def test_frequency_counts_what_the_model_wrote_and_repetition_all():
    x = torch.zeros(1, 6)
    history = History([0, 1, 2, 2, 3], [USER, USER, ASSISTANT, ASSISTANT, 3], 2)
    own = Sampling(frequency_penalty=1.0, presence_penalty=0.5).process(x, [history])
    assert own.tolist() == [[0, 0, -2.5, 0, 0, 0]]
    everything = Sampling(repetition_penalty=2.0).process(x + 1, [history])
    assert everything.tolist() == [[0.5, 0.5, 0.5, 0.5, 1, 1]]


def test_a_ban_that_leaves_nothing_is_not_applied():
    x = torch.tensor([[1.0, -torch.inf, 2.0], [1.0, 0.0, 2.0]])
    banned = ours.forbid_repeated_ngrams(x, [[0, 2], [0, 2]], 1)
    assert torch.equal(banned[0], x[0])
    assert banned[1].tolist() == [-math.inf, 0.0, -math.inf]
    assert torch.equal(ours.add_bias(x, {0: -math.inf, 2: -math.inf})[0], x[0])


def test_a_bias_outside_the_vocabulary_is_named():
    with pytest.raises(ToolmemError, match="logit_bias names token 50"):
        Sampling(logit_bias={50: 1.0}).process(logits())


def exactly(options, row, history):
    """The distribution that the options leave of one lane, by their definitions in float64."""
    x = [float(v) for v in row]
    for token, bias in (options.logit_bias or {}).items():
        x[token] += bias
    for token in set(history.tokens):
        factor = options.repetition_penalty
        x[token] = x[token] * factor if x[token] < 0 else x[token] / factor
    for token, n in Counter(history.written()).items():
        x[token] -= n * options.frequency_penalty + options.presence_penalty
    n = options.no_repeat_ngram_size
    if n is not None:
        tokens = list(history.tokens)
        grams = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        for token in range(len(x)):
            if (*tokens[len(tokens) - n + 1 :], token) in grams:
                x[token] = -math.inf
    p = [math.exp(v / options.temperature) for v in x]

    def keep(p, rule):
        p = [v / sum(p) for v in p]
        best = max(p)
        kept = [v if v == best or rule(i, p) else 0.0 for i, v in enumerate(p)]
        return [v / sum(kept) for v in kept]

    def surprise(p):
        return -sum(v * math.log(v) for v in p if v)

    def before(p, order, i):  # the mass of what comes before token i
        return sum(p[j] for j in order[: order.index(i)])

    def typical(i, p):
        h = surprise(p)
        distance = [abs(-math.log(v) - h) if v else math.inf for v in p]
        order = sorted(range(len(p)), key=distance.__getitem__)
        return before(p, order, i) < options.typical_p

    def descending(p):
        return sorted(range(len(p)), key=lambda i: -p[i])

    if options.top_k:
        p = keep(p, lambda i, p: descending(p).index(i) < options.top_k)
    if options.top_p:
        p = keep(p, lambda i, p: before(p, descending(p), i) < options.top_p)
    if options.min_p:
        p = keep(p, lambda i, p: p[i] >= options.min_p * max(p))
    if options.typical_p:
        p = [v / sum(p) for v in p]
        kept = [v if typical(i, p) else 0.0 for i, v in enumerate(p)]
        p = [v / sum(kept) for v in kept]
    if options.epsilon_cutoff:
        p = keep(p, lambda i, p: p[i] >= options.epsilon_cutoff)
    if options.eta_cutoff:
        eta = options.eta_cutoff
        p = keep(p, lambda i, p: p[i] >= min(eta, math.sqrt(eta) * math.exp(-surprise(p))))
    return [v / sum(p) for v in p]


def chi_square(counts, probabilities):
    """Pearson's statistic and its degrees of freedom; bins of fewer than 5 expected are pooled."""
    n = sum(counts)
    assert all(c == 0 for c, p in zip(counts, probabilities, strict=True) if p == 0)
    bins = [(c, n * p) for c, p in zip(counts, probabilities, strict=True) if n * p >= 5]
    rest = [(c, n * p) for c, p in zip(counts, probabilities, strict=True) if 0 < n * p < 5]
    if rest:
        bins.append((sum(c for c, _ in rest), sum(e for _, e in rest)))
    return sum((c - e) ** 2 / e for c, e in bins), len(bins) - 1


def critical(freedom):
    """The value that chi-square passes once in 1,000 (Wilson and Hilferty)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.0902 * math.sqrt(part)) ** 3


EVERYTHING = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8},
    {"top_k": 4},
    {"top_p": 0.8},
    {"min_p": 0.15},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.06},
    {"eta_cutoff": 0.3},
    {"repetition_penalty": 1.8},
    {"frequency_penalty": 0.6},
    {"presence_penalty": 1.1},
    {"no_repeat_ngram_size": 2},
    {"logit_bias": {2: 1.4, 5: -math.inf}},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05, "frequency_penalty": 0.4},
]


@pytest.mark.parametrize("given", EVERYTHING, ids=lambda x: "-".join(x) or "free")
def test_what_is_drawn_passes_chi_square(given):
    """20,000 lanes with equal logits draw by their own uniform numbers."""
    n = 20_000
    row = torch.randn(12, generator=torch.Generator().manual_seed(3)) * 1.2
    history = History([1, 4, 1, 7, 4, 7, 1], [USER] * 3 + [ASSISTANT] * 4, 3)
    options = Sampling(**given)
    generator = torch.Generator().manual_seed(11)
    uniform = torch.rand(n, generator=generator, dtype=torch.float64)
    drawn = options(row.expand(n, -1), uniform, [history] * n)
    counts = torch.bincount(drawn, minlength=12).tolist()
    expected = exactly(options, row, history)
    statistic, freedom = chi_square(counts, expected)
    assert freedom >= 2
    assert statistic < critical(freedom)
    if given:  # the test could fail: what another setting gives is told apart
        free = exactly(Sampling(), row, history)
        wrong = torch.multinomial(torch.tensor(free), n, replacement=True, generator=generator)
        counts = torch.bincount(wrong, minlength=12).tolist()
        if all(c == 0 for c, p in zip(counts, expected, strict=True) if p == 0):
            assert chi_square(counts, expected)[0] > critical(freedom)
