"""Scores of heads: they find the two heads that were built, and those alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from circuits_toys import VOCAB, induction, repeats

from toolmem.analysis.circuits import (
    copy_scores,
    head,
    induction_scores,
    logit_effects,
    ov_copying,
    previous_token_scores,
    record,
    repeated_tokens,
    tell,
)
from toolmem.analysis.circuits.scores import frozen_norm, head_outputs
from toolmem.data.dialogues import Dialogue, Turn
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import Hybrid, LinearAttention, Mamba, Transformer

EVERY = [head(layer, index) for layer in (0, 1) for index in (0, 1)]


def only(scores, node, others=0.2):
    assert list(scores) == EVERY
    assert scores[node] > 0.99
    assert all(value < others for other, value in scores.items() if other != node)


def test_the_previous_token_head_is_found():
    only(previous_token_scores(induction(), repeats()), head(0, 0))


def test_the_induction_head_is_found():
    model = induction()
    only(induction_scores(model, repeats()), head(1, 0))
    only(induction_scores(model, repeated_tokens(model, 8, 10)), head(1, 0))


def test_weights_that_are_even_score_what_they_must():
    model = induction()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.qkv.weight.zero_()
    tokens = repeats(length=4)
    # over the tokens 1 to 7, each looks evenly at all up to itself
    previous = np.mean([1 / (t + 1) for t in range(1, 8)])
    induced = np.mean([1 / (t + 1) for t in range(4, 8)])
    assert previous_token_scores(model, tokens)[head(1, 1)] == pytest.approx(previous)
    assert induction_scores(model, tokens)[head(1, 1)] == pytest.approx(induced)


def test_random_tokens_come_twice():
    model = induction()
    tokens = repeated_tokens(model, n=5, length=50, vocabulary=torch.tensor([3, 5, 7]))
    assert tokens.shape == (5, 24)  # as long as the model takes
    assert torch.equal(tokens[:, :12], tokens[:, 12:]) and set(tokens.flatten().tolist()) == {
        3,
        5,
        7,
    }
    once = repeated_tokens(model, length=12)[:, :12]
    assert all(len(set(row.tolist())) == 12 for row in once)
    assert torch.equal(repeated_tokens(model, seed=3), repeated_tokens(model, seed=3))
    assert not torch.equal(repeated_tokens(model, seed=3), repeated_tokens(model, seed=4))
    with pytest.raises(ToolmemError, match="twice"):
        induction_scores(model, torch.arange(12)[None])


def test_a_model_without_attention_is_refused():
    model = Mamba(vocab_size=11, dim=8, n_layers=1)
    for score in (previous_token_scores, induction_scores):
        with pytest.raises(ToolmemError, match="Mamba has no attention"):
            score(model, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ToolmemError, match="no attention"):
        ov_copying(model)


def in_tool() -> Dialogue:
    said = ("How old is Ann?", "ask Ann", "37", "Ann: 37")
    roles = ("user", "assistant", "database", "assistant")
    return Dialogue(tuple(map(Turn, roles, said)), "37", "age", "Ann")


def byte_model(**options) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(260, 16, n_layers=2, n_heads=2, hidden_dim=16, max_seq_len=64, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def test_attention_to_what_is_copied():
    model, told = byte_model(), [tell(in_tool(), ByteTokenizer())]
    tokens = told[0].tokens
    weights = record(model, tokens[None], ["blocks.1.mixer.weights"])["blocks.1.mixer.weights"][
        0, 1
    ]
    text = [chr(t) if t < 256 else "|" for t in tokens.tolist()]
    assert "".join(text) == "|How old is Ann?|ask Ann|37|Ann: 37|"
    # the answer stands at 33 and 34, the database's at 25 and 26
    by_hand = (weights[32, 25] + weights[33, 26]) / 2
    scores = copy_scores(model, told, "answer")
    assert scores[head(1, 1)] == pytest.approx(by_hand.item(), abs=1e-12)
    by_hand = (weights[32, 26] + weights[33, 27]) / 2
    assert copy_scores(model, told, "answer", 1)[head(1, 1)] == pytest.approx(
        by_hand.item(), abs=1e-12
    )
    # the last turn's Ann (28 to 30) has two to look at: 12 to 14 and 21 to 23
    pairs = [(27 + i, at + i) for i in range(3) for at in (12, 21)]
    by_hand = sum(weights[a, b] for a, b in pairs) / 3
    assert copy_scores(model, told, "name")[head(1, 1)] == pytest.approx(by_hand.item(), abs=1e-12)
    assert np.isnan(copy_scores(model, told, "nothing")[head(1, 1)])


@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"sandwich_norm": True}], ids=str)
def test_parts_of_the_stream_add_up_behind_the_last_norm(options):
    model, tokens = byte_model(**options), torch.randint(260, (2, 9))
    names = ["embedding", "norm", "blocks.1.output"]
    inside = ("mixer.heads", "mixer.output", "feed_forward.output")
    names += [f"blocks.{i}.{part}" for i in (0, 1) for part in inside]
    found = record(model, tokens, names)
    parts = [found["embedding"]]
    for i in (0, 1):
        each = head_outputs(model.blocks[i], found[f"blocks.{i}.mixer.heads"])
        torch.testing.assert_close(
            each.sum(1), found[f"blocks.{i}.mixer.output"], rtol=0, atol=1e-12
        )
        parts += [*each.unbind(1), found[f"blocks.{i}.feed_forward.output"]]
    whole = found["blocks.1.output"]
    read = sum(frozen_norm(model.norm, whole, part) for part in parts)
    torch.testing.assert_close(read, found["norm"], rtol=0, atol=1e-11)


def test_effect_on_the_logit_of_what_is_copied():
    model, told = byte_model(), [tell(in_tool(), ByteTokenizer())]
    tokens = told[0].tokens[None]
    with torch.no_grad():
        # without head 1.1, under the divisor that the last norm has with it
        found = record(model, tokens, ["blocks.1.mixer.heads", "blocks.1.output"])
        z = found["blocks.1.mixer.heads"][0, 1]
        added = z @ model.blocks[1].mixer.out.weight[:, 8:].T
        x = found["blocks.1.output"][0]
        divisor = (x.square().mean(-1, keepdim=True) + model.norm.eps).sqrt()
        logits = added / divisor * model.norm.weight @ model.head.weight.T
        gain = [logits[32, ord("3")] - logits[32].mean(), logits[33, ord("7")] - logits[33].mean()]
    effect = logit_effects(model, told, "answer")
    assert effect[head(1, 1)] == pytest.approx((sum(gain) / 2).item(), rel=1e-9)
    linear = LinearAttention(260, 16, 1, n_heads=2, max_seq_len=64)
    assert set(logit_effects(linear, told, "answer")) == {head(0, 0), head(0, 1)}


def test_the_ov_circuit_of_the_induction_head_copies():
    scores = ov_copying(induction())
    assert scores[head(1, 0)] == pytest.approx(1.0, abs=1e-3)
    model = induction()
    with torch.no_grad():
        model.head.weight.neg_()
    assert ov_copying(model)[head(1, 0)] == pytest.approx(-1.0, abs=1e-3)


@pytest.mark.parametrize(
    "options", [{}, {"n_kv_heads": 1, "conv_width": 3, "embedding_norm": True, "tie_embeddings": True}],
    ids=str,
)  # fmt: skip
def test_eigenvalues_against_the_whole_matrix_of_tokens(options):
    model = byte_model(**options)
    with torch.no_grad():
        embedded = model.embed(torch.arange(260))
        if model.embedding_norm is not None:
            embedded = model.embedding_norm(embedded)
        mixer = model.blocks[1].mixer
        rows = slice(2 * 8 + 8, None) if mixer.n_kv_heads == 1 else slice(2 * 8 + 2 * 8 + 8, None)
        value = mixer.qkv.weight[rows] * model.blocks[1].mixer_norm.weight
        if mixer.conv is not None:
            value = value * (1 + mixer.conv.taps[: mixer.conv.channels][rows, None])
        out = mixer.out.weight[:, 8:]
        whole = embedded @ value.T @ out.T @ (model.head.weight * model.norm.weight).T
    values = np.linalg.eigvals(whole.numpy())
    expected = values.real.sum() / np.abs(values).sum()
    assert ov_copying(model)[head(1, 1)] == pytest.approx(expected, rel=1e-4)


def test_heads_of_a_hybrid_are_numbered_by_their_block():
    model = Hybrid(
        11,
        8,
        2,
        pattern=["mamba1", "attention"],
        mixers={"attention": {"n_heads": 2}},
        max_seq_len=16,
    )
    assert list(previous_token_scores(model, torch.zeros(1, 4, dtype=torch.int64))) == [
        head(1, 0),
        head(1, 1),
    ]
    assert VOCAB == 20
