"""A data worker that hangs is named, and not waited for."""

import time

import pytest
import torch

from toolmem.data.batch import Batch
from toolmem.data.stream import IndexedBatches, make_loader
from toolmem.errors import ToolmemError


class Hangs(IndexedBatches):
    """Batch 4 never comes."""

    def batch_at(self, index: int) -> Batch:
        if index == 4:
            time.sleep(60)
        row = torch.full((1, 2), index)
        return Batch(row, row, row > 0, state={"batch": index + 1})


@pytest.mark.slow
def test_the_worker_that_gives_nothing_is_named():
    batches = iter(make_loader(Hangs(), num_workers=3, patience_s=2.0))
    assert [int(next(batches).tokens[0, 0]) for _ in range(4)] == [0, 1, 2, 3]
    pid = batches.batches._workers[1].pid
    with pytest.raises(
        ToolmemError, match=rf"data worker 1 of 3 \(process {pid}\) gave no batch for 2 s"
    ):
        next(batches)


def test_other_errors_of_workers_are_told_as_they_are():
    class Fails(IndexedBatches):
        def batch_at(self, index):
            raise ValueError("of its own")

    with pytest.raises(ValueError, match="of its own"):
        next(iter(make_loader(Fails(), num_workers=1)))
    with pytest.raises(ValueError, match="of its own"):
        next(iter(make_loader(Fails())))
