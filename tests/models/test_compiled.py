"""Compiled decoding: few sizes, few graphs, and what the engine says without it."""

import gc
import math
import re
import weakref
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.generation import Engine, PromptLookup, Request
from toolmem.models import (
    RNN,
    Hybrid,
    LinearAttention,
    Mamba2,
    MoETransformer,
    Transformer,
    kernels,
)
from toolmem.models.compiled import GRAPHS, Buckets

TOKENIZER = ByteTokenizer()
ROLES = TOKENIZER.role_ids
MODELS = {
    "transformer": (Transformer, {"n_heads": 2, "n_kv_heads": 1}),
    "plain attention": (Transformer, {"n_heads": 2, "n_kv_heads": 1}),
    "window": (Transformer, {"n_heads": 2, "window": [5, 0], "conv_width": 2}),
    "prefix": (Transformer, {"n_heads": 2, "attention_mask": "prefix"}),
    "learned, softcap": (
        Transformer,
        {"n_heads": 2, "position": "learned", "attention_softcap": 3.0, "residual_conv": 2},
    ),
    "latent": (Transformer, {"n_heads": 2, "attention": "mla"}),
    "moe": (MoETransformer, {"n_heads": 2, "n_experts": 4}),
    "mamba2": (Mamba2, {"head_dim": 8, "state_dim": 8}),
    "mingru": (RNN, {"cell": "mingru"}),
    "linear attention": (LinearAttention, {"n_heads": 2}),
    "hybrid": (
        Hybrid,
        {
            "pattern": ["mamba2", "attention"],
            "mixers": {"attention": {"n_heads": 2}, "mamba2": {"head_dim": 8, "state_dim": 8}},
        },
    ),
}


def model_of(name):
    torch.manual_seed(0)
    cls, options = MODELS[name]
    model = cls(260, 16, 2, max_seq_len=90, **options).eval()
    model.use_attention("plain" if name == "plain attention" else "auto")
    return model


def prompts(n):
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 50, (n,), generator=draw).tolist()
    texts = [torch.randint(256, (k,), generator=draw).tolist() for k in lengths]
    return [[ROLES["user"], *text, ROLES["assistant"]] for text in texts]


@pytest.fixture
def traced(monkeypatch):
    """What is compiled is traced, and run as it was traced: no C++ compiler is waited for. The graphs."""
    graphs = []
    monkeypatch.setattr(
        "torch._inductor.compile_fx.compile_fx",
        lambda graph, inputs, config_patches: graphs.append(graph) or graph,
    )
    return graphs


def test_buckets_on_paper():
    assert Buckets.upto(1, 1) == ((1,), (1,))
    assert Buckets.upto(6, 7) == ((1, 2, 4, 6), (4, 7))
    assert Buckets.upto(128, 64) == (
        (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128),
        (4, 8, 16, 32, 64),
    )


@given(most=st.tuples(st.integers(1, 300), st.integers(1, 300)), data=st.data())
def test_buckets_hold_what_is_asked_and_not_much_more(most, data):
    buckets = Buckets.upto(*most)
    lanes, pages = (data.draw(st.integers(1, each)) for each in most)
    rows, width = buckets.around(lanes, pages)
    assert lanes <= rows <= min(most[0], 2 * lanes)
    assert pages <= width <= min(most[1], max(4, 2 * pages))
    assert len(buckets.lanes) <= 2 * most[0].bit_length()
    assert len(buckets.pages) <= most[1].bit_length()


def assert_equal(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert ours.finish_reason == theirs.finish_reason
        for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
            assert (math.isnan(a) and math.isnan(b)) or abs(a - b) < 1e-5


@contextmanager
def more_memory():
    """By how many bytes this process was larger in here than before, where Linux tells it."""
    reset, status, more = Path("/proc/self/clear_refs"), Path("/proc/self/status"), []

    def told(name):
        return 2**10 * int(re.search(rf"{name}:\s*(\d+) kB", status.read_text())[1])

    try:
        reset.write_text("5")
        before = told("VmRSS")
        yield more
        more.append(told("VmHWM") - before)
    except OSError:
        yield more
        more.append(0)


def compare(name):
    """Ragged dialogues that come and go, with and without; the compiled engine's counts."""
    model = model_of(name)
    requests = [
        Request(prompt, max_new_tokens=3 + 7 * (i % 4)) for i, prompt in enumerate(prompts(9))
    ]
    with Engine(model, TOKENIZER, max_lanes=4) as engine:
        expected = engine.run(requests)
    with Engine(model, TOKENIZER, max_lanes=4, compile=True) as engine:
        assert engine.stats().compilations == 0
        told = []
        seconds = engine.warm_up(lambda done, total: told.append((done, total)))
        stats = engine.stats()
        assert stats.compilations == GRAPHS and seconds == stats.compile_seconds > 0
        total = told[-1][1]
        assert told == [(done, total) for done in range(total + 1)]
        assert_equal(engine.run(requests), expected)
        # from another thread, one at a time, and after new weights: the same graphs
        assert_equal([engine.submit(requests[0]).result()], expected[:1])
        engine.update_weights(model_of(name))
        assert_equal(engine.run(requests), expected)
        stats = engine.stats()
        assert stats.compilations == GRAPHS and seconds == stats.compile_seconds
        with more_memory() as more:
            engine.run(requests[:2])
        assert more[0] < 2**28  # pages and slots, which are 2**31 bytes, are not copied


@pytest.mark.parametrize("name", MODELS)
def test_traced_passes_are_the_models_own(name, traced):
    compare(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["transformer", "plain attention", "window", "moe", "mamba2", "mingru", "hybrid"]
)
def test_compiled_passes_are_the_models_own(name):
    compare(name)


def test_every_decoding_pass_is_compiled(traced, monkeypatch):
    """The model's own forward reads prompts, and never a single token of each lane."""
    model = model_of("transformer")
    with Engine(model, TOKENIZER, max_lanes=4, compile=True) as engine:
        engine.warm_up()
        compiled, widths, lanes = engine.scheduler.compiled, [], []
        step = compiled.step
        monkeypatch.setattr(
            compiled, "step", lambda *given: lanes.append(len(given[0])) or step(*given)
        )
        # only what calls it from outside of the graphs comes by here
        engine.scheduler.model = Watched(model, lambda x: widths.append(x.shape[1]))
        engine.generate(prompts(4), max_new_tokens=6)
    assert widths and min(widths) > 1
    assert len(lanes) >= 5 and max(lanes) == 4


class Watched:
    """A model whose forward passes are told of."""

    def __init__(self, model, told):
        self._model, self._told = model, told

    def __getattr__(self, name):
        return getattr(self._model, name)

    def hidden(self, x, **options):
        self._told(x)
        return self._model.hidden(x, **options)


def test_dead_rows_touch_nobody(traced):
    """Nothing but page 0 and slot 0 is written for lanes that are not there."""
    model = model_of("hybrid")
    with Engine(model, TOKENIZER, max_lanes=4, compile=True, memory_limit=2**20) as engine:
        engine.warm_up()
        state = engine.pager.state
        before = [arena.clone() for kind in ("page", "slot") for arena in state.arenas(kind)]
        compiled = engine.scheduler.compiled
        three = np.array([5, 6, 7])
        compiled.step(three, np.array([[1], [2], [3]]), np.array([0, 0, 0]), np.array([1, 2, 3]))
        after = [arena for kind in ("page", "slot") for arena in state.arenas(kind)]
        for old, new in zip(before, after, strict=True):
            changed = [
                place for place in range(len(old)) if not torch.equal(old[place], new[place])
            ]
            assert set(changed) <= {0, 1, 2, 3} and {1, 2, 3} <= set(changed)


@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_graphs_call_our_kernels_where_the_engine_does(kernel, traced):
    if not kernels.available():
        pytest.skip("no C compiler here: compiled passes call torch's operations alone")
    model = model_of("transformer")
    model.use_attention(kernel)
    with Engine(model, TOKENIZER, max_lanes=1, compile=True, memory_limit=2**20) as engine:
        engine.warm_up()
    [graph] = traced
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("toolmem.fast_linear" in name for name in called) == 4 * 2
    assert sum("toolmem.paged_attention" in name for name in called) == 2 * (kernel == "auto")


def test_with_drafts(traced):
    """Passes that check drafts are the model's own; the others are compiled."""
    model = model_of("transformer")
    given = [prompt[:-1] + prompt[1:] for prompt in prompts(3)]
    with Engine(model, TOKENIZER, max_lanes=3) as engine:
        expected = engine.generate(given, max_new_tokens=20)
    with Engine(
        model, TOKENIZER, max_lanes=3, compile=True, drafter=PromptLookup(max_tokens=4)
    ) as engine:
        assert_equal(engine.generate(given, max_new_tokens=20), expected)
        assert 0 < engine.stats().compilations <= GRAPHS


def test_graphs_go_with_their_engine(traced):
    model = RNN(260, 16, 1, cell="mingru", max_seq_len=64).eval()
    for _ in range(5):  # beyond eight graphs torch would compile no more of one function
        with Engine(model, TOKENIZER, max_lanes=2, compile=True) as engine:
            engine.warm_up()
            decoder = weakref.ref(engine.scheduler.compiled)
            arena = weakref.ref(next(engine.pager.state.arenas("slot")))
        assert engine.stats().compilations == GRAPHS
        del engine
    gc.collect()
    assert decoder() is None and arena() is None


def test_what_cannot_be_compiled_is_named(monkeypatch):
    torch.manual_seed(0)
    recurrent = RNN(260, 16, 1, cell="lstm", max_seq_len=64)
    with pytest.raises(ToolmemError, match=r"a RNN cannot be compiled here \(torch .* no LSTM\)"):
        Engine(recurrent, TOKENIZER, compile=True)

    def no_compiler(*_, **__):
        raise RuntimeError("\nNo working C++ compiler found\nmore")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", no_compiler)
    with (
        Engine(model_of("mingru"), TOKENIZER, max_lanes=2, compile=True) as engine,
        pytest.raises(ToolmemError, match=r"a RNN cannot be compiled here .*: leave compile out"),
    ):
        engine.warm_up()


@pytest.mark.parametrize("name", ["transformer", "plain attention", "window"])
def test_where_it_loses_it_says_so(name, caplog):
    if not kernels.available():
        pytest.skip("no C compiler here: there is nothing that it loses against")
    with Engine(model_of(name), TOKENIZER, compile=True):
        warned = "decoded by C" in caplog.text
    assert warned == (name == "transformer")


def test_refusals():
    with pytest.raises(ToolmemError, match="invariant"):
        Engine(model_of("transformer"), TOKENIZER, compile=True, invariant=True)


def test_without_compile_there_is_nothing_to_warm_up():
    with Engine(model_of("transformer"), TOKENIZER) as engine:
        assert engine.warm_up() == 0.0
        assert engine.stats().compilations == 0
