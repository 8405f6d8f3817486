from __future__ import annotations

from collections import Counter

import pytest

from toolmem.data import FactsDataModule, RecallDataModule
from toolmem.data.exposures import steps_of_exposures
from toolmem.errors import ToolmemError


def data_of(**changes):
    return FactsDataModule(**({"people": 10, "unseen_people": 0, "batch_size": 32} | changes))


def times_seen(data, steps):
    """How often each fact comes up in so many batches, counted dialogue by dialogue."""
    batches = iter(data.train_dataloader())
    seen = Counter()
    for _ in range(steps):
        for dialogue in data.dialogues(next(batches)):
            seen[dialogue.person, dialogue.attribute] += 1
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batch_size": 7},
        {"batch_size": 64},
        {"layout": "packed"},
        {"attributes": ["birth_place", "occupation"]},
        {"templates": ["in_weight", "biographies/in_weight"]},
    ],
)
@pytest.mark.parametrize("exposures", [1, 5])
def test_every_fact_comes_up_so_often(options, exposures):
    data = data_of(**options)
    data.setup()
    steps = steps_of_exposures(data, exposures)
    seen = times_seen(data, steps)
    n_facts = 10 * len(options.get("attributes", "1234"))
    tellings = len(data.table) / n_facts
    assert len(seen) == n_facts or exposures < tellings
    # one batch more may have been needed to come so far
    assert exposures * n_facts <= seen.total() < exposures * n_facts + data.batch_size
    if exposures % tellings == 0 and "templates" not in options:
        assert set(seen.values()) == {exposures}


def test_on_paper():
    assert steps_of_exposures(data_of(), 100) == 200  # 40 dialogues make two batches of 20
    assert steps_of_exposures(data_of(people=16), 1000) == 2000  # 64 make two of 32
    assert steps_of_exposures(data_of(people=1), 3) == 3


def test_what_has_no_facts_to_count_is_refused():
    with pytest.raises(ToolmemError, match="exposures is 0"):
        steps_of_exposures(data_of(), 0)
    with pytest.raises(ToolmemError, match="held_out"):
        steps_of_exposures(data_of(held_out=0.5), 1)
    with pytest.raises(ToolmemError, match="RecallDataModule has no facts"):
        steps_of_exposures(RecallDataModule(), 1)
