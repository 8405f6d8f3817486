"""Samplers against their definitions, written plainly."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Greedy, Sampling, choose, generate, generate_naive
from toolmem.generation.processors import keep_top_k, keep_top_p
from toolmem.generation.reference import ASSISTANT, DATABASE, USER
from toolmem.generation.sampling import History, draw, top_log_probs, uniform_numbers
from toolmem.models import Transformer

LOGITS = st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8, unique=True)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.integers(1, 10))
def test_top_k(logits, k):
    kept = keep_top_k(torch.tensor([logits]), k)[0]
    best = sorted(logits, reverse=True)[:k]
    assert [x for x in kept.tolist() if x > -math.inf] == [x for x in logits if x in best]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.floats(0.01, 0.99))
def test_top_p(logits, p):
    total = sum(math.exp(x) for x in logits)
    nucleus, mass = set(), 0.0
    for index in sorted(range(len(logits)), key=lambda i: -logits[i]):
        if mass >= p:
            break
        nucleus.add(index)
        mass += math.exp(logits[index]) / total
    if abs(mass - p) < 1e-5 or any(
        abs(sum(math.exp(x) / total for x in logits if x > y) - p) < 1e-5 for y in logits
    ):
        return  # too close to the border for float32
    kept = keep_top_p(torch.tensor([logits]), p)[0]
    assert {i for i, x in enumerate(kept.tolist()) if x > -math.inf} == nucleus


@settings(max_examples=60, deadline=None, derandomize=True)
@given(LOGITS, st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_distribution(logits, uniform):
    total = sum(math.exp(x) for x in logits)
    edges, mass = [], 0.0
    for x in logits:
        mass += math.exp(x) / total
        edges.append(mass)
    if min(abs(edge - uniform) for edge in edges) < 1e-6:
        return
    expected = sum(edge <= uniform for edge in edges)
    assert int(draw(torch.tensor([logits]), torch.tensor([uniform]))) == expected


def test_what_is_cut_is_never_drawn():
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, 1.0, -math.inf]])
    for uniform in (0.0, 0.2, 0.5, 1 - 2**-53):
        drawn = int(draw(logits, torch.tensor([uniform], dtype=torch.float64)))
        assert drawn == (1 if uniform < 1 / (1 + math.e) else 3)


def test_the_last_tokens_are_not_drawn_when_they_are_cut():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 40, generator=generator)
    logits[:, 25:] = -math.inf
    edge = torch.full((500,), 1 - 2**-53, dtype=torch.float64)
    assert torch.equal(draw(logits, edge), torch.full((500,), 24))
    logits[:, :5] = -math.inf
    assert torch.equal(draw(logits, torch.zeros(500)), torch.full((500,), 5))


def test_frequencies_follow_temperature():
    logits = torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, -1)
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    drawn = Sampling(temperature=2.0)(logits, uniform)
    expected = (logits[0] / 2).softmax(0)
    torch.testing.assert_close(torch.bincount(drawn) / 20_000, expected, atol=0.015, rtol=0)


def test_narrowest_sampling_is_greedy():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(50, generator=torch.Generator().manual_seed(1))
    for sampler in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)):
        assert torch.equal(sampler(logits, uniform), Greedy()(logits))


def test_uniform_numbers_depend_on_their_own_generator_only():
    def numbers(seeds):
        return uniform_numbers([torch.Generator().manual_seed(seed) for seed in seeds]).tolist()

    assert numbers([3, 4])[1] == numbers([4, 9, 3])[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": 1.1}, "min_p"),
        ({"typical_p": 0.0}, "typical_p"),
        ({"epsilon_cutoff": 1.0}, "epsilon_cutoff"),
        ({"eta_cutoff": 0.0}, "eta_cutoff"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"frequency_penalty": math.inf}, "frequency_penalty"),
        ({"presence_penalty": math.nan}, "presence_penalty"),
        ({"no_repeat_ngram_size": 0}, "no_repeat_ngram_size"),
        ({"logit_bias": {3: math.nan}}, "logit_bias"),
    ],
)
def test_refusals(options, key):
    with pytest.raises(ToolmemError, match=key):
        Sampling(**options)


def test_options_of_a_lane_do_not_touch_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 20, generator=generator)
    uniform = torch.rand(6, generator=generator, dtype=torch.float64)
    samplers = [
        Sampling(0.7),
        Greedy(),
        Sampling(0.7),
        Sampling(top_k=3, frequency_penalty=4.0),
        Sampling(0.0, no_repeat_ngram_size=1),
        Sampling(repetition_penalty=3.0, logit_bias={3: 5.0}),
    ]
    histories = [History([1, 2, 3, *range(n)], [USER] * 3 + [ASSISTANT] * n, 3) for n in range(6)]
    together = choose(samplers, logits, uniform, histories)
    for i, sampler in enumerate(samplers):
        alone = choose(sampler, logits[i : i + 1], uniform[i : i + 1], histories[i : i + 1])
        assert together[i] == alone[0]


def test_equal_options_share_one_call():
    calls = []

    class Counting(Sampling):
        def process(self, logits, histories=None):
            calls.append(len(logits))
            return super().process(logits, histories)

    samplers = [Counting(0.5, logit_bias={1: 2.0}) for _ in range(8)]
    choose(samplers, torch.zeros(8, 5), torch.zeros(8))
    assert calls == [8]


def test_generators_hand_over_the_history():
    torch.manual_seed(0)
    model = Transformer(260, 16, 1, 2, max_seq_len=120)
    tokenizer = ByteTokenizer()
    prompts = [[256, *b"abc" * n, 257] for n in (1, 3, 5)]
    sampler = Sampling(0.0, no_repeat_ngram_size=2, presence_penalty=0.1)
    options = {"max_new_tokens": 60, "sampler": sampler}
    together = generate(model, tokenizer, prompts, **options)
    free = generate(model, tokenizer, prompts, max_new_tokens=60)
    for prompt, result, plain in zip(prompts, together, free, strict=True):
        assert result.tokens == generate_naive(model, tokenizer, prompt, **options).tokens
        new = [*itertools.pairwise(result.tokens[len(prompt) - 1 :])]
        assert len(set(new)) == len(new)
        plainly = [*itertools.pairwise(plain.tokens)]
        assert len(set(plainly)) < len(plainly)  # without the rule it repeats itself


def test_turns_are_counted():
    roles = [USER, USER, ASSISTANT, ASSISTANT, DATABASE, DATABASE, ASSISTANT, DATABASE]
    tokens = list(range(len(roles)))

    def cut(n):
        return History(tokens[:n], roles[:n], 2)

    assert cut(2).turn() == (0, [])
    assert cut(4).turn() == (0, [2, 3])
    assert cut(6).turn() == (1, [])
    assert cut(7).turn() == (1, [6])
    assert cut(8).turn() == (2, [])
    assert cut(8).written() == [2, 3, 6]
    # What the prompt says in the assistant's name was given, not written.
    assert History([1, 2, 3], [USER, ASSISTANT, ASSISTANT], 2).turn() == (0, [3])


def test_top_log_probs():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 0.0, -1.0]])
    ids, values = top_log_probs(logits, 2)
    assert ids.tolist() == [[1, 2], [0, 1]]
    total = math.log(1 + math.e + math.e**2)
    assert values[0].tolist() == pytest.approx([2 - total, 1 - total], abs=1e-6)
    assert top_log_probs(logits, 9)[0].shape == (2, 3)


def test_many_lanes_are_cut_into_pieces_and_no_lanes_give_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(10, 20, generator=generator)
    uniform = torch.rand(10, generator=generator, dtype=torch.float64)
    histories = [History([n, n], [USER] * 2, 2) for n in range(10)]
    for sampler in (Sampling(top_p=0.8), Sampling(repetition_penalty=2.0), Greedy()):
        whole = choose(sampler, logits, uniform, histories)
        with monkeypatch.context() as patch:
            patch.setattr("toolmem.generation.sampling.CHUNK", 61)  # 3 lanes
            assert torch.equal(choose(sampler, logits, uniform, histories), whole)
        assert choose(sampler, logits[:0], uniform[:0], []).shape == (0,)
