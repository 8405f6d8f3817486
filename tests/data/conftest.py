from itertools import islice

import pytest


@pytest.fixture
def take():
    """The first batches of a loader, its workers sent home at once.

    (An iterator that is left to the garbage collector may wait ten seconds for its workers.)
    """

    def take(loader, n):
        iterator = iter(loader)
        batches = list(islice(iterator, n))
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        return batches

    return take
