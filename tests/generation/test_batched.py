"""The batched generator equals the naive loop, token for token, in float32."""

import math
import random

import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.generation import Sampling, generate, generate_naive
from toolmem.generation.batched import STEP_OVERHEAD, chunk_width
from toolmem.models import Transformer
from toolmem.tools.base import Answer

TOKENIZER = ByteTokenizer()
ROLES = TOKENIZER.role_ids


class Count:
    """A toolbox that answers with text of a length that depends on the query."""

    def __init__(self):
        self.batches = []

    def call_many(self, texts):
        self.batches.append(len(texts))
        return [Answer(f"{text[:1]}:" + "a" * (len(text) * 7 % 31), False, 0.0) for text in texts]


def random_model(seed, **options):
    """An untrained model that likes to call and to end."""
    torch.manual_seed(seed)
    model = Transformer(260, 16, 2, 2, max_seq_len=120, **options)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    with torch.no_grad():
        model.head.weight[ROLES["database"]] *= 2.5
        model.head.weight[ROLES["end"]] *= 2
    return model


def ragged_prompts(n, seed=0, longest=40):
    draw = random.Random(seed)
    return [
        [ROLES["user"], *draw.randbytes(draw.randint(1, longest)), ROLES["assistant"]]
        for _ in range(n)
    ]


def assert_equal(ours, theirs):
    for name in ("tokens", "roles", "finish_reason", "tool_calls", "prompt_length"):
        assert getattr(ours, name) == getattr(theirs, name)
    for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
        assert (math.isnan(a) and math.isnan(b)) or abs(a - b) < 1e-4


@pytest.mark.parametrize("batch_size", [5, 64])
@pytest.mark.parametrize(
    "sampler", [None, Sampling(), Sampling(0.7, top_k=20, top_p=0.9)], ids=["greedy", "free", "cut"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"conv_width": 4},
        {"n_kv_heads": 1, "qk_norm": True, "tie_embeddings": True},
        {"position": "learned", "norm": "layer", "feed_forward": "gelu", "bias": True},
        {"window": [9, 0], "conv_width": 2},
        {"attention_mask": "prefix"},
        {"attention_mask": "prefix", "window": 7, "residual_conv": 2},
    ],
    ids=["conv", "gqa", "learned", "window", "prefix", "prefix and window"],
)
def test_equals_naive(options, sampler, batch_size):
    model = random_model(0, **options)
    prompts = ragged_prompts(12)
    limits = {"max_new_tokens": 25, "max_tool_calls": 2, "sampler": sampler}
    toolbox = Count()
    results = generate(
        model, TOKENIZER, prompts, toolbox=toolbox, seed=7, batch_size=batch_size, **limits
    )
    for index, (prompt, ours) in enumerate(zip(prompts, results, strict=True)):
        theirs = generate_naive(model, TOKENIZER, prompt, toolbox=Count(), seed=7 + index, **limits)
        assert_equal(ours, theirs)
    if sampler is not None:
        assert len({result.finish_reason for result in results}) > 1
        assert sum(len(result.tool_calls) for result in results) > 3


def test_samples_depend_on_their_own_seed_only():
    model = random_model(1)
    prompts = ragged_prompts(6)
    options = {"toolbox": Count(), "max_new_tokens": 20, "sampler": Sampling()}
    seeds = [5, 1, 4, 2, 0, 3]
    together = generate(model, TOKENIZER, prompts, seed=seeds, **options)
    for order in ([0, 3], [5, 4, 3, 2, 1, 0]):
        chosen = [prompts[i] for i in order]
        again = generate(model, TOKENIZER, chosen, seed=[seeds[i] for i in order], **options)
        for index, result in zip(order, again, strict=True):
            assert_equal(result, together[index])
    twice = generate(model, TOKENIZER, [prompts[0]] * 2, seed=[1, 2], **options)
    assert twice[0].tokens != twice[1].tokens


def test_waiting_lanes_are_answered_together():
    def always_call(logits, uniform):
        return torch.full((len(logits),), ROLES["database"])

    always_call.random = False
    toolbox = Count()
    prompts = [[ROLES["user"], letter, ROLES["assistant"]] for letter in b"abcdefghi"]
    results = generate(
        random_model(0), TOKENIZER, prompts, toolbox=toolbox, sampler=always_call, max_tool_calls=3
    )
    assert toolbox.batches == [9, 9, 9]
    assert {result.finish_reason for result in results} == {"tool_calls"}


def test_chunk_width_takes_the_most_for_the_cost():
    assert chunk_width([1] * 50) == 1
    assert chunk_width([30]) == 30
    assert chunk_width([0, 12, 12]) == 12
    assert chunk_width([40, 38, 41, 35]) >= 35
    assert chunk_width([1] * 1000 + [100]) == 1  # nobody pads for one answer
    for waiting in ([3, 1, 1], [20, 1, 5, 0], [7] * 100 + [60] * 30):
        useful = {
            width: sum(min(n, width) for n in waiting) / (STEP_OVERHEAD + len(waiting) * width)
            for width in waiting
            if width
        }
        assert useful[chunk_width(waiting)] == max(useful.values())


def test_with_the_real_toolbox():
    """A model made to write a calculation gets the calculator's answer, in both loops."""
    from toolmem.tools import Calculator, Toolbox

    class Dictated:
        """Forces the words of a query, then greedy."""

        random = False

        def __init__(self):
            self.words = list(b"CALCULATE 1987 - 1950") + [ROLES["database"]]

        def __call__(self, logits, uniform=None):
            if self.words:
                return torch.full((len(logits),), self.words.pop(0))
            return torch.full((len(logits),), ROLES["end"])

    prompt = [ROLES["user"], *b"how old?", ROLES["assistant"]]
    model = random_model(0, conv_width=4)
    with Toolbox([Calculator()]) as toolbox:
        naive = generate_naive(model, TOKENIZER, prompt, toolbox=toolbox, sampler=Dictated())
        ours = generate(model, TOKENIZER, [prompt] * 3, toolbox=toolbox, sampler=Dictated())
    for result in ours:
        assert result.tokens == naive.tokens
        [(query, answer)] = result.tool_calls
        assert (query, answer.text) == ("CALCULATE 1987 - 1950", "37")
    assert TOKENIZER.decode(naive.tokens[-4:-2]) == "37"
