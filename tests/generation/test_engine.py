"""The engine equals the naive loop, token for token, in float32, whatever its schedule."""

import math
import random

import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Request, Sampling, generate, generate_naive
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    MoETransformer,
    Transformer,
)
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


def always_call(logits, uniform):
    return torch.full((len(logits),), ROLES["database"])


always_call.random = False


def test_calls_of_one_step_are_made_together():
    toolbox = Count()
    prompts = [[ROLES["user"], letter, ROLES["assistant"]] for letter in b"abcdefghi"]
    results = generate(
        random_model(0), TOKENIZER, prompts, toolbox=toolbox, sampler=always_call, max_tool_calls=3
    )
    assert {result.finish_reason for result in results} == {"tool_calls"}
    assert toolbox.batches[0] == 9
    assert sum(toolbox.batches) == 27


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


HEADS = {"n_heads": 2}
ARCHITECTURES = {
    "moe": (MoETransformer, HEADS | {"n_experts": 4, "top_k": 2, "hidden_dim": 16}),
    "latent attention": (Transformer, HEADS | {"attention": "mla", "mla_kv_rank": 8}),
    "mamba": (Mamba, {"state_dim": 4}),
    "mamba2": (Mamba2, {"state_dim": 8, "head_dim": 8, "chunk_size": 5, "hidden_dim": 24}),
    "lstm": (RNN, {"cell": "lstm"}),
    "mingru": (RNN, {"cell": "mingru", "conv_width": 3, "residual_conv": 2}),
    "gated delta": (LinearAttention, HEADS | {"rule": "gated_delta"}),
    "griffin": (
        Hybrid,
        {
            "pattern": ["rglru", "local"],
            "mixers": {"local": {"class_path": "attention", "n_heads": 2, "window": 5}},
        },
    ),
    "jamba": (
        Hybrid,
        {
            "pattern": ["mamba1", "attention"],
            "mixers": {"mamba1": {"state_dim": 4}, "attention": HEADS | {"conv_width": 3}},
        },
    ),
}


def talkative(cls, options, seed=0):
    torch.manual_seed(seed)
    model = cls(260, 16, **{"n_layers": 2, "max_seq_len": 120, **options}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_lanes": 7},
        {"max_lanes": 3, "step_tokens": 9, "page_size": 4},
        {"max_lanes": 16, "memory_limit": 1},
    ],
    ids=["plain", "chunks", "little memory"],
)
def test_every_architecture_equals_naive(name, settings):
    model = talkative(*ARCHITECTURES[name])
    prompts = ragged_prompts(6, longest=20)
    prompts += prompts[:3]  # the same again: they share what is read
    limits = {"max_new_tokens": 12, "sampler": Sampling(2.0, top_k=40)}
    if "memory_limit" in settings:
        with Engine(model, TOKENIZER, Count()) as engine:
            need = engine.pager.pages_for(120) * engine.pager.bytes_each["page"]
            settings = settings | {"memory_limit": need + 2 * engine.pager.bytes_each["slot"]}
    with Engine(model, TOKENIZER, Count(), host_limit=10_000, **settings) as engine:
        results = engine.generate(prompts, seed=3, **limits)
        stats = engine.stats()
        assert stats.bytes_peak <= engine.pager.memory_limit
        check_nothing_left(engine)
    for index, (prompt, ours) in enumerate(zip(prompts, results, strict=True)):
        theirs = generate_naive(model, TOKENIZER, prompt, toolbox=Count(), seed=3 + index, **limits)
        assert_equal(ours, theirs)


def check_nothing_left(engine):
    """No lane, page or state is owned by anybody but the tree of prefixes."""
    stats = engine.stats()
    assert stats.lanes_running == stats.lanes_waiting == stats.lanes_calling == 0
    if engine.scheduler.tree is not None:
        engine.scheduler.tree.clear()
    assert engine.pager.live == {"page": 0, "slot": 0}
    assert engine.pager.bytes_used() == engine.pager.host_bytes == engine.pager.spilled_bytes() == 0
    assert sorted(engine.pager._free_rows) == list(range(len(engine.pager._free_rows)))


def test_samples_of_one_prompt_read_it_once():
    model = random_model(0, tie_embeddings=True)
    [prompt] = ragged_prompts(1, longest=60, seed=3)
    n, new = 12, 10
    for lanes in (n, 4):
        with Engine(model, TOKENIZER, max_lanes=lanes) as engine:
            results = engine.generate([prompt] * n, sampler=Sampling(), max_new_tokens=new)
            stats = engine.stats()
        assert stats.tokens_prefilled == len(prompt)
        assert stats.tokens_shared == (n - 1) * len(prompt)
        # each shared token is held once; beside it a lane holds its own, and a partial page at each end
        tokens = stats.bytes_peak / engine.pager.bytes_each["page"] * engine.pager.page_size
        assert tokens <= len(prompt) + n * (new + 2 * engine.pager.page_size)
        for index, result in enumerate(results):
            theirs = generate_naive(
                model, TOKENIZER, prompt, sampler=Sampling(), max_new_tokens=new, seed=index
            )
            assert_equal(result, theirs)


def test_a_long_prefix_is_read_once():
    """Questions behind the same long beginning: the first reads it, the others wait and share."""
    model = random_model(0)
    start = [ROLES["user"], *b"the same long introduction for everybody who asks: "]
    prompts = [[*start, *bytes([65 + i]) * (i + 1), ROLES["assistant"]] for i in range(6)]
    with Engine(model, TOKENIZER, page_size=8) as engine:
        results = engine.generate(prompts, max_new_tokens=5)
        shared = engine.stats().tokens_shared
        again = engine.generate(prompts, max_new_tokens=5)
        assert engine.stats().tokens_shared > 2 * shared
    assert shared == 5 * (len(start) // 8 * 8)
    for prompt, one, two in zip(prompts, results, again, strict=True):
        theirs = generate_naive(model, TOKENIZER, prompt, max_new_tokens=5)
        assert_equal(one, theirs)
        assert_equal(two, theirs)


INVARIANT = {
    "transformer": lambda: random_model(0, conv_width=4, n_kv_heads=1),
    "mamba2": lambda: talkative(*ARCHITECTURES["mamba2"]),
    "moe": lambda: talkative(*ARCHITECTURES["moe"]),
}


@pytest.mark.parametrize("name", INVARIANT)
def test_invariant_mode_gives_the_same_bits_in_any_batch(name):
    model = INVARIANT[name]()
    n = 200 if name == "transformer" else 12
    prompts = ragged_prompts(n, longest=50)
    options = {"toolbox": Count(), "max_new_tokens": 12, "max_tool_calls": 2, "invariant": True}
    alone = generate(model, TOKENIZER, prompts, batch_size=1, **options)
    for batch_size in (7, 64):
        together = generate(model, TOKENIZER, prompts, batch_size=batch_size, **options)
        for one, other in zip(alone, together, strict=True):
            assert one.tokens == other.tokens
            # bit for bit: nan marks what was not sampled
            assert torch.equal(
                torch.tensor(one.log_probs).nan_to_num(9),
                torch.tensor(other.log_probs).nan_to_num(9),
            )


def test_log_probs_are_those_of_the_training_forward():
    model = random_model(2, n_kv_heads=1)
    results = generate(
        model,
        TOKENIZER,
        ragged_prompts(8),
        toolbox=Count(),
        sampler=Sampling(0.8),
        max_new_tokens=30,
    )
    for result in results:
        tokens = torch.tensor([result.tokens])
        log_probs = model(tokens[:, :-1]).log_softmax(-1).gather(2, tokens[:, 1:, None])[0, :, 0]
        for own, recomputed in zip(result.log_probs[1:], log_probs.tolist(), strict=True):
            assert math.isnan(own) or abs(own - recomputed) < 1e-4


def test_update_weights_drops_what_the_old_ones_made():
    first, second = random_model(0), random_model(1)
    prompts = ragged_prompts(5)
    with Engine(first, TOKENIZER, Count()) as engine:
        engine.generate(prompts, max_new_tokens=8)
        engine.update_weights(second)
        after = engine.generate(prompts, max_new_tokens=8)
        with pytest.raises(ToolmemError, match="update_weights"):
            engine.update_weights(random_model(0, n_kv_heads=1))
    for prompt, result in zip(prompts, after, strict=True):
        assert_equal(
            result, generate_naive(second, TOKENIZER, prompt, toolbox=Count(), max_new_tokens=8)
        )


@pytest.mark.parametrize("stop", ["token", "string", "both"])
def test_stops(stop):
    model = random_model(3)
    [prompt] = ragged_prompts(1)
    plain = generate_naive(model, TOKENIZER, prompt, max_new_tokens=40, sampler=Sampling(), seed=1)
    new = plain.tokens[len(prompt) :]
    at = next(i for i in range(4, len(new)) if new[i] < 128 and new[i] not in new[:i])
    options = {"token": {"stop_tokens": (new[at],)}, "string": {"stop_strings": (chr(new[at]),)}}
    options["both"] = options["token"] | {"stop_strings": ("never said by anybody",)}
    with Engine(model, TOKENIZER) as engine:
        [result] = engine.generate(
            [prompt], max_new_tokens=40, sampler=Sampling(), seed=1, **options[stop]
        )
    assert result.finish_reason == "stop"
    assert result.tokens == [*prompt, *new[: at + 1]]


def test_what_makes_no_sense_is_refused():
    model = random_model(0)
    with Engine(model, TOKENIZER, memory_limit=20_000) as engine:
        with pytest.raises(ToolmemError, match="memory_limit"):
            engine.generate(ragged_prompts(1), max_new_tokens=119)
        with pytest.raises(ToolmemError, match="seeds"):
            engine.generate(ragged_prompts(2), seed=[1])
        with pytest.raises(ToolmemError, match="empty"):
            engine.generate([[]])
        with pytest.raises(ToolmemError, match="max_seconds"):
            Request([1], max_seconds=0)
        with pytest.raises(ToolmemError, match="stop_strings"):
            Request([1], stop_strings="text")
    with pytest.raises(ToolmemError, match="closed"):
        engine.generate(ragged_prompts(1))
    with pytest.raises(ToolmemError, match="memory_limit"):
        Engine(model, TOKENIZER, memory_limit=100)
    with pytest.raises(ToolmemError, match="max_lanes"):
        Engine(model, TOKENIZER, max_lanes=0)
