"""Models of transformers under our engine: the text of their own generate, in ragged lanes, with tools."""

import pytest
import torch
import transformers

from toolmem import ToolmemError
from toolmem.data import ByteTokenizer
from toolmem.generation import Engine, Request, Sampling, generate_naive
from toolmem.models.interop.adapter import Adapter
from toolmem.tools import Calculator, Toolbox

SIZES = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
MAMBA = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 6}
NO_IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
KINDS = {
    "llama": ("Llama", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 16}),
    "gpt2": (
        "GPT2",
        {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    ),
    "mistral": ("Mistral", {**SIZES, "sliding_window": 96}),
    "mamba": ("Mamba", MAMBA),
}
PROMPTS = [
    b"a",
    b"twelve words of some length, which are read as one",
    b"3 + 4",
    b"the same, but not",
]


@pytest.fixture(params=KINDS)
def theirs(request):
    name, options = KINDS[request.param]
    config = getattr(transformers, f"{name}Config")(**options, **NO_IDS)
    torch.manual_seed(0)
    cls = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    model = getattr(transformers, cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def their_text(model, prompt, n):
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "eos_token_id": -1, "pad_token_id": 0}
    return model.generate(ids, max_new_tokens=n, do_sample=False, **options)[0].tolist()


def until_end(tokens, prompt, tokenizer):
    """As the engine's rules cut it: at the first token that ends a turn or calls a tool."""
    for at in range(len(prompt), len(tokens)):
        if tokens[at] in (tokenizer.role_ids["end"], tokenizer.role_ids["database"]):
            return tokens[: at + 1]
    return tokens


def test_greedy_text_in_ragged_lanes(theirs):
    tokenizer, model = ByteTokenizer(), Adapter(theirs)
    prompts = [list(prompt) for prompt in PROMPTS]
    wanted = [until_end(their_text(theirs, one, 24), one, tokenizer) for one in prompts]
    with Engine(model, tokenizer, max_lanes=3) as engine:
        found = [one.tokens for one in engine.run([Request(p, max_new_tokens=24) for p in prompts])]
    assert found == wanted
    assert [
        generate_naive(model, tokenizer, p, max_new_tokens=24).tokens for p in prompts
    ] == wanted


@torch.no_grad()
def test_chunks_of_any_width(theirs):
    """Logits of rows that come in pieces of unlike widths are those of whole rows."""
    model = Adapter(theirs)
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 260, (3, 12), generator=draw)
    wanted = theirs(tokens).logits
    torch.testing.assert_close(model(tokens), wanted)
    cache = model.new_cache(3, 16)
    places = torch.zeros(3, dtype=torch.int64)
    for counts in ([4, 1, 6], [1, 5, 1], [7, 6, 5]):
        chunk = torch.zeros(3, max(counts), dtype=torch.int64)
        for row, n in enumerate(counts):
            chunk[row, :n] = tokens[row, places[row] : places[row] + n]
        found = model(chunk, cache=cache, counts=torch.tensor(counts))
        for row, n in enumerate(counts):
            span = wanted[row, places[row] : places[row] + n]
            torch.testing.assert_close(found[row, :n], span, atol=2e-4, rtol=1e-4)
        places += torch.tensor(counts)


def test_tool_calls(theirs):
    """Who likes to call a tool gets the answer, and goes on as the whole dialogue read again would."""
    tokenizer, model = ByteTokenizer(), Adapter(theirs)
    ids = tokenizer.role_ids
    prompts = [
        [ids["user"], *b"how much?", ids["assistant"], *query]
        for query in (b"CALCULATE 3 + 4", b"CALCULATE 12 * (2 + 1)")
    ]
    answers = set()
    for bias in (100.0, 8.0):  # at once, and when the model likes
        sampler = Sampling(temperature=0, logit_bias={ids["database"]: bias})
        with Toolbox([Calculator()]) as toolbox:
            options = {"max_new_tokens": 24, "max_tool_calls": 2, "sampler": sampler}
            wanted = [
                generate_naive(model, tokenizer, p, toolbox=toolbox, **options) for p in prompts
            ]
            with Engine(model, tokenizer, toolbox, max_lanes=2) as engine:
                found = engine.run([Request(prompt, **options) for prompt in prompts])
        assert [one.tokens for one in found] == [one.tokens for one in wanted]
        said = [[(q, answer.text) for q, answer in one.tool_calls] for one in found]
        assert said == [[(q, answer.text) for q, answer in one.tool_calls] for one in wanted]
        answers |= {text for calls in said for _, text in calls}
    assert {"7", "36"} <= answers


@torch.no_grad()
def test_a_window_bounds_the_sequence():
    config = transformers.MistralConfig(**SIZES, sliding_window=20, **NO_IDS)
    model = Adapter(transformers.MistralForCausalLM(config).eval())
    assert model.max_seq_len == 20
    with pytest.raises(ToolmemError, match="max_seq_len"):
        model(torch.zeros(1, 21, dtype=torch.int64))


def test_what_cannot_be_adapted_is_named():
    config = transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=64, **NO_IDS)
    config.final_logit_softcapping = 0.01
    with pytest.raises(
        ToolmemError, match="Gemma2ForCausalLM: its logits are not its head's output"
    ):
        Adapter(transformers.Gemma2ForCausalLM(config).eval())
