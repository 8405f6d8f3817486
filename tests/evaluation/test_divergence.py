"""Divergence and perplexity against float64 written plainly, and against the harness's windows."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation.divergence import (
    KINDS,
    BaseFile,
    BaseModel,
    Divergence,
    by_position,
    divergences,
    write_base,
)
from toolmem.evaluation.examples import ask_in_parts
from toolmem.evaluation.measures import estimates
from toolmem.evaluation.perplexity import Perplexity, cut_text, read_text, rolling_windows
from toolmem.evaluation.suite import units
from toolmem.models import Mamba, Transformer

TOKENIZER = ByteTokenizer()
TEXTS = ["Où est la bibliothèque?", "x" * 7, "To be, or not to be: that is the question."]


def model_of(seed, kind=Transformer, **options):
    torch.manual_seed(seed)
    size = {"dim": 16, "n_layers": 1, "max_seq_len": 64}
    if kind is Transformer:
        size["n_heads"] = 2
    model = kind(TOKENIZER.vocab_size, **size | options).eval()
    with torch.no_grad():
        model.head.weight *= 5
    return model


def plainly(model, text, longest, stride):
    """Log-probabilities (targets, vocab) in float64, window by window, with numpy's softmax."""
    tokens = [TOKENIZER.role_ids["end"], *TOKENIZER.encode(text)]
    found, done = [], 0
    while done < len(tokens) - 1:
        done = min(len(tokens) - 1, done + (stride if done else longest))
        inputs = tokens[max(0, done - longest) : done]
        with torch.no_grad():
            logits = model.double()(torch.tensor([inputs]))[0].numpy()
        scores = logits - logits.max(1, keepdims=True)
        found.append(
            (scores - np.log(np.exp(scores).sum(1, keepdims=True)))[len(found_rows(found)) - done :]
        )
    model.float()
    return np.concatenate(found), np.array(tokens[1:])


def found_rows(parts):
    return [row for part in parts for row in part]


@pytest.mark.parametrize("kind", [Transformer, Mamba])
@pytest.mark.parametrize(("longest", "stride"), [(64, 64), (10, 10), (10, 3)])
def test_against_float64_written_plainly(kind, longest, stride):
    model, base = model_of(0, kind), model_of(1, kind)
    text = cut_text(TEXTS, TOKENIZER, longest=longest, stride=stride)
    rows = ask_in_parts(Divergence(text, model, BaseModel(base)), part=5)
    of_text = ask_in_parts(Perplexity(text, model), part=5)
    totals = np.zeros(4)
    for number, words in enumerate(TEXTS):
        log_q, targets = plainly(model, words, longest, stride)
        log_p, _ = plainly(base, words, longest, stride)
        p, q = np.exp(log_p), np.exp(log_q)
        wanted = {
            "kl": (p * (log_p - log_q)).sum(1),
            "kl_reverse": (q * (log_q - log_p)).sum(1),
            "tv": np.abs(p - q).sum(1) / 2,
        }
        own = [row for row in rows if row["document"] == number]
        assert [row["start"] for row in own] == np.cumsum(
            [0, *(row["tokens"] for row in own[:-1])]
        ).tolist()
        for name, values in wanted.items():
            assert found_rows(row[name] for row in own) == pytest.approx(values, abs=2e-5)
            assert sum(row[f"{name}_sum"] for row in own) == pytest.approx(values.sum(), rel=1e-4)
        at = np.arange(len(targets)), targets
        assert sum(row["log_prob"] for row in own) == pytest.approx(log_q[at].sum(), rel=1e-5)
        assert sum(row["base_log_prob"] for row in own) == pytest.approx(log_p[at].sum(), rel=1e-5)
        mine = [row for row in of_text if row["document"] == number]
        assert sum(row["log_prob"] for row in mine) == pytest.approx(log_q[at].sum(), rel=1e-5)
        assert sum(row["bytes"] for row in mine) == pytest.approx(len(words.encode()))
        totals += [wanted["kl"].sum(), wanted["tv"].sum(), -log_q[at].sum(), len(targets)]
    numbers = estimates(Divergence.measures, units(rows))
    assert numbers["kl"].value == pytest.approx(totals[0] / totals[3], rel=1e-4)
    assert numbers["tv"].value == pytest.approx(totals[1] / totals[3], rel=1e-4)
    assert numbers["kl"].n == len(TEXTS)
    assert numbers["kl"].low < numbers["kl"].value < numbers["kl"].high
    assert numbers["perplexity"].value == pytest.approx(math.exp(totals[2] / totals[3]), rel=1e-5)
    n_bytes = sum(len(words.encode()) for words in TEXTS)
    bits = estimates(Perplexity.measures, units(of_text))["bits_per_byte"].value
    assert bits == pytest.approx(totals[2] / math.log(2) / n_bytes, rel=1e-5)


def test_from_itself_it_is_nothing():
    model = model_of(0)
    text = cut_text(TEXTS, TOKENIZER, longest=16)
    rows = ask_in_parts(Divergence(text, model, BaseModel(model)), part=9)
    assert {row[f"{name}_sum"] for row in rows for name in KINDS} == {0.0}
    assert all(row["same"] == row["tokens"] for row in rows)


def test_outcomes_that_cannot_be():
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).double().log()
    log_q = torch.tensor([[0.25, 0.75, 0.0]]).double().log()
    kl, reverse, tv = divergences(log_p, log_q)[:, 0].tolist()
    assert kl == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert reverse == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))
    assert tv == pytest.approx(0.25)


def test_a_base_on_disk(tmp_path):
    """Lumping outcomes together can only bring distributions nearer; the whole vocabulary is exact."""
    model, base = model_of(0), model_of(1)
    text = cut_text(TEXTS, TOKENIZER, longest=16, stride=5)
    exact = ask_in_parts(Divergence(text, model, BaseModel(base)), part=3)
    for top_k in (1, 8, TOKENIZER.vocab_size):
        path = tmp_path / f"{top_k}.safetensors"
        write_base(path, text, base, top_k)
        rows = ask_in_parts(Divergence(text, model, BaseFile(path)), part=3)
        for row, wanted in zip(rows, exact, strict=True):
            assert row["same"] == wanted["same"]
            for name in KINDS:
                found, bound = np.array(row[name]), np.array(wanted[name])
                assert (found <= bound + 2e-5).all()
                if top_k == TOKENIZER.vocab_size:
                    assert found == pytest.approx(bound, abs=3e-5)  # kept in float32
                    assert row["base_log_prob"] == pytest.approx(wanted["base_log_prob"], rel=1e-5)
    assert all(row["base_log_prob"] is None for row in ask_in_parts(
        Divergence(text, model, BaseFile(tmp_path / "1.safetensors")), part=3
    )[:1])  # fmt: skip
    few = ask_in_parts(Divergence(text, model, BaseFile(tmp_path / "8.safetensors")), part=3)
    told = estimates(Divergence.measures, units(few))["base_perplexity"].as_dict()
    assert told == {"value": None, "interval_95": [None, None], "n": len(TEXTS)}
    other = cut_text(TEXTS, TOKENIZER, longest=16)
    with pytest.raises(ToolmemError, match="another text, window"):
        Divergence(other, model, BaseFile(path))
    (tmp_path / "no").write_bytes(b"x" * 40)
    with pytest.raises(ToolmemError, match="no file of a base's"):
        BaseFile(tmp_path / "no")


def test_by_position_in_stretches():
    rows = [
        {"start": 0, "tokens": 3, **{name: [1.0, 2.0, 3.0] for name in KINDS}},
        {"start": 3, "tokens": 2, **{name: [5.0, 7.0] for name in KINDS}},
    ]
    found = by_position(rows)
    assert [(one["start"], one["tokens"], one["kl"]) for one in found] == [
        (0, 1, 1.0), (1, 1, 2.0), (2, 2, 4.0), (4, 1, 7.0),
    ]  # fmt: skip


@pytest.mark.parametrize(("n", "longest", "stride"), [(1, 4, 4), (23, 4, 4), (23, 7, 2), (5, 9, 9)])
def test_windows_predict_each_token_once(n, longest, stride):
    tokens = list(range(100, 100 + n))
    windows = list(rolling_windows(tokens, longest, stride, 0))
    assert [token for window in windows for token in window.targets] == tokens
    for window in windows:
        assert len(window.inputs) <= longest
        at = tokens.index(window.targets[-1])
        assert window.inputs == tuple([0, *tokens][max(0, at + 1 - longest) : at + 1])


def test_windows_are_the_harness_own():
    from lm_eval import utils  # a dev dependency: without it the suite must fail, not pass it over

    for n in (1, 5, 12, 13, 31):
        tokens = list(range(100, 100 + n))
        wanted = list(utils.get_rolling_token_windows(tokens, 0, 6, 1))
        found = [(list(w.inputs), list(w.targets)) for w in rolling_windows(tokens, 6, 6, 0)]
        assert found == [(list(inputs), list(targets)) for inputs, targets in wanted]


def test_invariant_in_any_company():
    text = cut_text(TEXTS * 3, TOKENIZER, longest=12, stride=4)
    model, base = model_of(0), model_of(1)
    asked = Divergence(text, model, BaseModel(base, invariant=True), invariant=True)
    together = list(asked.ask(0, len(asked)))
    assert together == [row for n in range(len(asked)) for row in asked.ask(n, n + 1)]


def test_bad_text_is_named(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n{oops\n")
    with pytest.raises(ToolmemError, match=r"text\.jsonl.*line 2"):
        read_text(path, TOKENIZER, longest=4)
    with pytest.raises(ToolmemError, match="stride is 5"):
        cut_text(["abc"], TOKENIZER, longest=4, stride=5)
    with pytest.raises(ToolmemError, match="vocab_size 260 and the base 300"):
        text = cut_text(["abc"], TOKENIZER, longest=4)
        other = Transformer(300, dim=8, n_layers=1, n_heads=1, max_seq_len=8)
        Divergence(text, model_of(0), BaseModel(other))


PEAK = """
import resource, torch
from toolmem.evaluation.divergence import BaseModel, Divergence
from toolmem.evaluation.perplexity import cut_text
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.models import Transformer
torch.set_num_threads(1)
size = dict(dim=16, n_layers=1, n_heads=1, max_seq_len=2048)
model, base = Transformer(49152, **size).eval(), Transformer(49152, **size).eval()
text = cut_text(["some words " * 60], ByteTokenizer(), longest=2048)
asked = Divergence(text, model, BaseModel(base))
next(iter(Divergence(cut_text(["ab"], ByteTokenizer(), longest=2), model, BaseModel(base)).ask(0, 1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
list(asked.ask(0, 1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_gigabyte_at_most():
    """661 positions over 49,152 tokens: six arrays of all of them would take 1.6 GB."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) * 1024 < 1e9
