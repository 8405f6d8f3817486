import pytest

from toolmem.errors import ToolmemError
from toolmem.training.callbacks.rounds import Rounds


def had(rounds, last, asked=2, begin=0):
    rounds.begin(begin)
    return [s for s in range(begin, last + 1) for _ in range(asked) if rounds.due(s, last)]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((0, None, 0), []),
        ((5, None, 0), [5, 10, 15, 20, 23]),
        ((0, [0, 3, 99], 0), [0, 3, 23]),
        ((10, [2, 10], 0), [2, 10, 20, 23]),
        ((0, None, 1), [1, 10, 23]),
        ((0, None, 2), [1, 3, 10, 23]),
        ((0, None, 4), [1, 2, 3, 6, 10, 18, 23]),
        ((0, [0], 1), [0, 1, 10, 23]),
    ],
)
def test_each_step_once(options, steps):
    assert had(Rounds("recall", *options), 23) == steps
    assert bool(Rounds("recall", *options)) == bool(steps)
    later = [step for step in steps if step > 10]
    assert had(Rounds("recall", *options), 23, begin=10) == later  # 10 was had before


def test_by_ratio():
    assert had(Rounds("recall", 0, None, 3), 1000) == [1, 2, 5, 10, 22, 46, 100, 215, 464, 1000]


def test_mistakes():
    for options in ((-1, None, 0), (0, [3, -1], 0), (0, None, -2)):
        with pytest.raises(ToolmemError, match="recall: every_n_steps, steps_per_decade and each"):
            Rounds("recall", *options)
