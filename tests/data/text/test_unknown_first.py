"""Dialogues drawn by the model's latest loss."""

import itertools
import math
import random

import numpy as np
import pytest
import torch

from toolmem.data.text.dialog_tokens import DialogTokenGenerator
from toolmem.data.text.token_table import TokenTable
from toolmem.data.text.unknown_first import LAG, LatestLosses, UnknownFirst
from toolmem.errors import ToolmemError

EVERYTHING = np.arange(5)


def reported(losses: dict[int, dict[int, float]], n: int = 5) -> LatestLosses:
    latest = LatestLosses(n)
    for batch, of_each in losses.items():
        tell(latest, batch, of_each)
    return latest


def tell(latest: LatestLosses, batch: int, of_each: dict[int, float]) -> None:
    latest.report(batch, torch.tensor(list(of_each)), torch.tensor(list(of_each.values())))


def make_table(n: int = 30) -> TokenTable:
    """Dialogues of 3 to 12 tokens whose second is their number; the assistant writes the last two."""
    rng = random.Random(0)
    lengths = [rng.randint(3, 12) for _ in range(n)]
    roles = [[1] * (length - 2) + [2, 2] for length in lengths]
    tokens = [[7, number, *range(40, 38 + length)] for number, length in enumerate(lengths)]
    codes = [t | (r << 14) for ts, rs in zip(tokens, roles, strict=True) for t, r in zip(ts, rs)]  # noqa: B905
    return TokenTable(np.array(codes, np.uint16), np.concatenate([[0], np.cumsum(lengths)]))


def test_weights_by_hand():
    # half life 4: at batch 8 what was measured at 4 counts half of what sets it apart from the mean
    latest = reported({4: {0: 8.0, 2: 2.0}, 6: {3: 2.0}, 7: {1: 99.0}})
    mean = (8 + 2 + 2) / 3
    expected = [mean + (8 - mean) / 2, 8, mean + (2 - mean) / 2, mean + (2 - mean) / 2**0.5, 8]
    assert latest.weights(8, 4.0).tolist() == pytest.approx(expected)  # 7 is not told before 9
    assert latest.weights(9, 4.0)[1] == pytest.approx(
        (8 + 99 + 2 + 2) / 4 * (1 - 2**-0.5) + 99 * 2**-0.5
    )


def test_nothing_known_and_nothing_to_learn():
    assert LatestLosses(3).weights(0, 1.0).tolist() == [1, 1, 1]
    latest = reported({0: {0: 0.0, 1: math.nan, 2: 0.0}}, n=3)
    weights = latest.weights(2, 1.0)
    assert (weights > 0).all() and np.isfinite(weights).all()
    assert sorted(latest.draw(2, 9, np.arange(3), 1.0, seed=0)) == [0, 1, 2]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_draws_are_by_weight_without_replacement(n):
    """Against the chances of every ordered draw, one after the other, added up."""
    losses = [0.5, 4.0, 1.0, 0.25, 2.0]
    rows = np.array([0, 1, 2, 4])  # 3 may not be drawn
    latest = reported({0: dict(enumerate(losses))})
    half_life = 1e12  # losses as they are

    chance = dict.fromkeys(rows.tolist(), 0.0)
    for order in itertools.permutations(rows.tolist(), n):
        left, p = sum(losses[i] for i in rows), 1.0
        for i in order:
            p *= losses[i] / left
            left -= losses[i]
        for i in order:
            chance[i] += p

    total = 4000
    counts = dict.fromkeys(rows.tolist(), 0)
    for batch in range(2, 2 + total):
        drawn = latest.draw(batch, n, rows, half_life, seed=3).tolist()
        assert len(set(drawn)) == n
        for i in drawn:
            counts[i] += 1
    for i, p in chance.items():
        assert abs(counts[i] / total - p) < 4.5 * math.sqrt(p * (1 - p) / total + 1e-12), i


def test_what_is_told_late_changes_nothing():
    """However soon reports come, a draw knows those of up to ``LAG`` batches before."""
    early, late = reported({}), reported({})
    losses = {b: {b % 5: float(b + 1), (b + 1) % 5: 0.1} for b in range(12)}
    told = 0
    for batch in range(12):
        while told < 12:  # everything at once
            tell(early, told, losses[told])
            told += 1
        if batch >= LAG:
            tell(late, batch - LAG, losses[batch - LAG])
        a, b = (x.draw(batch, 2, EVERYTHING, 3.0, seed=1).tolist() for x in (early, late))
        assert a == b


def test_a_batch_fetched_too_far_ahead_is_told():
    latest = reported({})
    latest.draw(0, 1, EVERYTHING, 1.0, seed=0)
    latest.draw(LAG, 1, EVERYTHING, 1.0, seed=0)
    with pytest.raises(ToolmemError, match="batch 2 was made before batch 0 was trained on"):
        latest.report(0, torch.tensor([0]), torch.tensor([1.0]))
    latest.begin()
    latest.report(0, torch.tensor([0]), torch.tensor([1.0]))


@pytest.mark.parametrize("layout", ["bucketed", "rows", "packed"])
def test_a_batch_is_the_plain_stream_and_what_is_drawn(layout):
    table = make_table()
    rows = np.arange(2, 30)
    options = {"layout": layout, "seq_len": 16, "rows": rows, "seed": 5}
    latest = LatestLosses(30)
    stream = UnknownFirst(table, 8, share=0.25, latest=latest, **options)
    plain = DialogTokenGenerator(table, 6, **options)
    often = 0
    for index in range(50):
        batch = stream.batch_at(index)
        numbers = batch.dialogues.tolist()
        assert len(numbers) == len(plain.dialogues_at(index)) + 2
        rest = list(numbers)
        for number in plain.dialogues_at(index).tolist():
            rest.remove(number)
        assert len(set(rest)) == 2
        often += len({3, 9} & set(rest)) if index >= 10 else 0  # once each was measured
        # what a batch says of its dialogues is what lies in it, in reading order
        losses = batch.targets.flatten()[batch.positions()].double()
        sums = batch.sums_by_document(losses, len(numbers))
        for number, found in zip(numbers, sums.tolist(), strict=True):
            assert found == table.tokens(number)[-2:].sum()
        unknown = torch.tensor([5.0 if number in (3, 9) else 0.0 for number in numbers])
        latest.report(index, batch.dialogues, unknown)
    assert often > 40  # of 80; the two of 28 dialogues would be 6 by chance


def test_what_cannot_be():
    table = make_table()
    for share, size in ((0.01, 8), (0.99, 8), (0.5, 1)):
        with pytest.raises(ToolmemError, match=r"prefer_unknown is .*: of a batch of"):
            UnknownFirst(table, size, share=share, latest=LatestLosses(30))
    with pytest.raises(ToolmemError, match=r"trainer.devices: 1"):
        UnknownFirst(table, 8, share=0.5, latest=LatestLosses(30), world_size=2)
