"""Log-likelihoods with shared prefixes against whole rows run alone, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from toolmem.data.hf_tokenizer import HFTokenizer
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation.scoring import (
    Pair,
    Scorer,
    encode_pair,
    first_token,
    fitted,
    running,
    shared_beginning,
    token_log_probs,
)
from toolmem.models import RNN, Hybrid, Mamba, Mamba2, MoETransformer, Transformer

VOCAB = 23
SMALL = {"vocab_size": VOCAB, "max_seq_len": 64, "dim": 16, "n_layers": 2}
MODELS = {
    "transformer": lambda: Transformer(**SMALL, n_heads=2, n_kv_heads=1),
    "window": lambda: Transformer(**SMALL, n_heads=2, window=5),
    "prefix": lambda: Transformer(**SMALL, n_heads=2, attention_mask="prefix"),
    "moe": lambda: MoETransformer(**SMALL, n_heads=2, n_experts=4),
    "mamba": lambda: Mamba(**SMALL),
    "mamba2": lambda: Mamba2(**SMALL, head_dim=16),
    "rnn": lambda: RNN(**SMALL),
    "hybrid": lambda: Hybrid(
        **SMALL,
        pattern=["mamba2", "attention"],
        mixers={"mamba2": {"head_dim": 16}, "attention": {"n_heads": 2}},
    ),
}


def made(name):
    torch.manual_seed(3)
    return MODELS[name]().eval()


def pairs_of(seed=0, n=12, trunk=10):
    """Contexts on a common trunk, some of them twice, continuations of which some begin alike."""
    draw = torch.Generator().manual_seed(seed)

    def some(low, high):
        length = int(torch.randint(low, high, (1,), generator=draw))
        return tuple(torch.randint(0, VOCAB, (length,), generator=draw).tolist())

    beginning = some(trunk, trunk + 1) if trunk else ()
    pairs = []
    for _ in range(n):
        context, stem = beginning + some(1, 9), some(1, 3)
        pairs += [Pair(context, stem + some(0, 4)) for _ in range(3)]
        pairs.append(Pair(context, some(1, 2)))
    return [*pairs, pairs[0], Pair(beginning + (1,), (2,))]


def plainly(model, pair):
    """One row, whole, no cache, in float64."""
    tokens = torch.tensor([pair.context + pair.continuation])
    spans = None
    if model.attention_mask == "prefix":
        spans = torch.full_like(tokens, -1)
        spans[:, : len(pair.context)] = 0
    with torch.no_grad():
        logits = model.double()(tokens[:, :-1], spans=None if spans is None else spans[:, :-1])
    scores = logits[0].log_softmax(-1)[len(pair.context) - 1 :]
    targets = torch.tensor(pair.continuation)
    greedy = bool((scores.argmax(-1) == targets).all())
    return scores.gather(1, targets[:, None])[:, 0].tolist(), greedy


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_whole_rows_alone(name):
    pairs = pairs_of()
    scorer = Scorer(made(name))
    scorer.share(pairs)
    found = scorer.score(pairs)
    model = made(name)
    for pair, likelihood in zip(pairs, found, strict=True):
        log_probs, greedy = plainly(model, pair)
        assert likelihood.log_probs == pytest.approx(log_probs, abs=2e-5)
        assert likelihood.greedy == greedy
        assert likelihood.total == pytest.approx(sum(log_probs), abs=1e-4)


@pytest.mark.parametrize(("name", "n"), [("transformer", 12), ("moe", 12), ("mamba", 6)])
def test_invariant_is_the_same_to_the_bit_in_any_company(name, n):
    pairs = pairs_of(seed=1, n=n)
    scorer = Scorer(made(name), invariant=True)
    scorer.share(pairs)
    together = scorer.score(pairs)
    alone = list(itertools.chain.from_iterable(scorer.score([pair]) for pair in pairs))
    assert together == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_of_a_large_vocabulary_is_summed_alike_alone(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = Transformer(100_000, dim=8, n_layers=1, n_heads=1, max_seq_len=8).eval()
    states, targets = torch.randn(3, 8), torch.tensor([5, 70_000, 99_999])
    with running(model, invariant=True):
        together, _ = token_log_probs(model, states, targets)
        alone = [token_log_probs(model, states[i : i + 1], targets[i : i + 1])[0] for i in range(3)]
    assert torch.equal(together, torch.cat(alone))
    wanted = (states.double() @ model.head.weight.double().T).log_softmax(1)
    assert together.tolist() == pytest.approx(wanted[torch.arange(3), targets].tolist(), abs=1e-5)


def test_what_is_shared_is_read_once():
    model = made("transformer")
    pairs = pairs_of(trunk=30)
    read = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: read.append(given[0].shape[:2]))
    scorer = Scorer(model)
    scorer.share(pairs)
    scorer.score(pairs)
    padded = sum(rows * width for rows, width in read)
    alone = sum(len(pair.context) + len(pair.continuation) - 1 for pair in pairs)
    contexts = {pair.context for pair in pairs}
    assert padded < alone / 4
    assert padded < 30 + sum(len(c) - 30 for c in contexts) + 3 * sum(
        len(pair.continuation) - 1 for pair in pairs
    )


def test_the_head_is_asked_where_it_is_scored():
    model = made("transformer")
    asked = []
    model.head.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    pairs = [Pair((1, 2, 3, 4), (5, 6)), Pair((1, 2, 3, 4), (7,))]
    Scorer(model).score(pairs)
    assert sum(asked) == 3


@pytest.mark.parametrize(
    ("contexts", "shared"),
    [
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2), (1, 2, 4)], 1),
        ([(1, 2, 3)], 2),
        ([(3,), (4,)], 0),
        ([], 0),
    ],
)
def test_shared_beginning(contexts, shared):
    assert shared_beginning(contexts) == shared


def test_pairs_are_cut_as_in_the_harness():
    tokenizer = ByteTokenizer()
    pair = encode_pair(tokenizer, "one two  ", "three")
    assert tokenizer.decode(pair.context) == "one two"
    assert tokenizer.decode(pair.continuation) == "  three"
    assert encode_pair(tokenizer, "", "x", first_token(tokenizer)).context == (259,)
    assert encode_pair(tokenizer, " ", "x", 7) == Pair((7,), (32, 120))
    with pytest.raises(ToolmemError, match="context is empty"):
        encode_pair(tokenizer, "", "x")
    with pytest.raises(ToolmemError, match="nothing to score"):
        encode_pair(tokenizer, "a", "")


def test_a_long_context_loses_its_beginning():
    pair = Pair(tuple(range(10)), (1, 2, 3))
    assert fitted(pair, 12) == pair
    assert fitted(pair, 8) == Pair((4, 5, 6, 7, 8, 9), (1, 2, 3))
    with pytest.raises(ToolmemError, match="max_seq_len"):
        fitted(pair, 2)


def test_a_pretrained_models_text_begins_as_it_was_trained():
    """``<s>`` before a context where the tokenizer puts it, and for a text with nothing before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "?": 4}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    plain = HFTokenizer.pretrained(backend.to_str(), None, special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    begun = HFTokenizer.pretrained(backend.to_str(), None, special)
    for tokenizer, context in ((plain, (2,)), (begun, (0, 2))):
        assert first_token(tokenizer) == 0
        assert encode_pair(tokenizer, "a", " b", 0) == Pair(context, (3,))
        assert encode_pair(tokenizer, "", "b", 0) == Pair((0,), (3,))
    assert first_token(HFTokenizer.pretrained(backend.to_str(), None, {"eos_token": "</s>"})) == 1
