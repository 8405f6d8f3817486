"""MAD's tasks, read by plain Python as a person would read a row."""

import math
from itertools import islice

import pytest
import torch

from toolmem.data.mad import TASKS, MADGenerator, MADSizes
from toolmem.data.stream import make_loader
from toolmem.errors import ToolmemError

VOCAB = 16


def make(task, seq_len=None, batch_size=20, stream=0, rank=0, world_size=1, **options):
    sizes = {
        "vocab_size": VOCAB,
        "seq_len": seq_len or (33 if task == "compression" else 64),
        "motif_len": 3,
        "noise_fraction": 0.3,
        "noise_vocab_size": 6,
        "n_copied": 5,
        "seed": 3,
        **options,
    }
    return MADGenerator(
        task, MADSizes(**sizes), batch_size, stream=stream, rank=rank, world_size=world_size
    )


def rows_of(task, **options):
    """(tokens, {place: target}) of each row."""
    batch = make(task, **options).batch_at(2)
    for tokens, targets, asked in zip(batch.tokens, batch.targets, batch.loss_mask, strict=True):
        places = asked.nonzero().flatten().tolist()
        assert places and not targets[~asked].any()
        yield tokens.tolist(), {place: targets[place].item() for place in places}


def test_in_context_recall_asks_for_what_the_row_has_shown():
    for tokens, asked in rows_of("in_context_recall"):
        shown, expected = {}, {}
        for place in range(0, len(tokens), 2):
            key, value = tokens[place : place + 2]
            assert key < 8 <= value < VOCAB
            if key in shown:
                assert shown[key] == value
                expected[place] = value
            shown[key] = value
        assert asked == expected


def test_noise_shows_nothing_and_is_not_asked():
    noisy = 0
    for tokens, asked in rows_of("noisy_recall"):
        shown, expected = {}, {}
        for place in range(0, len(tokens), 2):
            key, value = tokens[place : place + 2]
            if key >= 10:
                assert value >= 10
                noisy += 1
                continue
            assert key < 5 <= value < 10
            if key in shown:
                expected[place] = shown[key]
            shown[key] = value
        assert asked == expected
    assert noisy / (20 * 32) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 640))


def test_fuzzy_recall_asks_for_values_of_keys_of_many_symbols():
    lengths = set()
    for tokens, asked in rows_of("fuzzy_recall"):
        runs, place = [], 0
        while place < len(tokens):  # a run of keys' or of values' symbols
            end = place
            while end < len(tokens) and (tokens[end] < 8) == (tokens[place] < 8):
                end += 1
            runs.append((place, tuple(tokens[place:end])))
            place = end
        shown, expected = {}, {}
        for (_, key), (start, value) in zip(runs[::2], runs[1::2], strict=False):
            whole = start + len(value) < len(tokens)
            assert key[0] < 8 <= value[0]
            if key in shown:
                assert shown[key][: len(value)] == value
                for offset, symbol in enumerate(value):
                    expected[start + offset - 1] = symbol
            if whole:
                shown[key] = value
                lengths |= {("key", len(key)), ("value", len(value))}
        assert asked == expected
    assert lengths == {(kind, length) for kind in ("key", "value") for length in (1, 2, 3)}


def test_selective_copy_asks_for_the_symbols_in_order():
    blank, copy = VOCAB - 2, VOCAB - 1
    gaps = set()
    for tokens, asked in rows_of("selective_copy"):
        body, end = tokens[:-5], tokens[-5:]
        assert end == [copy] * 5 and copy not in body
        symbols = [token for token in body if token != blank]
        gaps.add(body.index(symbols[0]))
        assert [asked[place] for place in sorted(asked)] == symbols
        assert sorted(asked) == list(range(len(body), len(tokens)))
    assert len(gaps) > 5


def test_compression_asks_for_all_after_the_sign():
    for tokens, asked in rows_of("compression"):
        symbols, sign, rest = tokens[:16], tokens[16], tokens[17:]
        assert sign == VOCAB - 2 and rest == [VOCAB - 1] * 16 and max(symbols) < VOCAB - 2
        assert asked == dict(enumerate(symbols, start=17))


def test_memorization_has_one_dictionary_for_every_row_stream_and_batch():
    dictionary = {}
    for stream in (0, 1):
        for tokens, asked in rows_of("memorization", stream=stream):
            assert tokens[1::2] == [VOCAB - 1] * 32
            assert sorted(asked) == list(range(1, 64, 2))
            for place, value in asked.items():
                assert dictionary.setdefault(tokens[place - 1], value) == value
                assert 7 <= value < VOCAB - 1
    assert set(dictionary) == set(range(7)) and len(set(dictionary.values())) > 1
    others = {
        tokens[place - 1]: value
        for tokens, asked in rows_of("memorization", seed=4)
        for place, value in asked.items()
    }
    assert others != dictionary


@pytest.mark.parametrize("task", TASKS)
def test_batches_differ_ranks_share_and_resuming_continues(task, take):
    everything = list(islice(make_loader(make(task)), 6))
    assert not torch.equal(everything[0].tokens, everything[1].tokens)
    assert not torch.equal(make(task, stream=1).batch_at(0).tokens, everything[0].tokens)
    parts = [make(task, rank=rank, world_size=2).batch_at(4) for rank in (0, 1)]
    for name in ("tokens", "targets", "loss_mask"):
        joined = torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1)
        assert torch.equal(joined, getattr(everything[4], name))
    resumed = make(task)
    resumed.load_state_dict(everything[1].state)
    for a, b in zip(take(make_loader(resumed), 4), everything[2:], strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("in_context_recall", {"seq_len": 33}, "seq_len 33 must be even"),
        ("compression", {"seq_len": 32}, "seq_len 32 must be odd"),
        ("memorization", {"vocab_size": 3}, "leaves 3 symbols"),
        ("noisy_recall", {"noise_vocab_size": 13}, "leaves 3 symbols"),
        ("noisy_recall", {"noise_fraction": 1.0}, "noise_fraction is 1.0"),
        ("noisy_recall", {"noise_vocab_size": 0}, "noise_vocab_size is 0"),
        ("fuzzy_recall", {"motif_len": 0}, "motif_len is 0"),
        ("selective_copy", {"n_copied": 40}, "n_copied is 40"),
        ("selective_copy", {"seq_len": 5}, "seq_len 5 must be at least 6"),
        ("guessing", {}, "task: unknown 'guessing'"),
        ("compression", {"world_size": 21}, "smaller than 21 processes"),
    ],
)
def test_mistakes_are_told(task, options, message):
    with pytest.raises(ToolmemError, match=message):
        make(task, **options)
