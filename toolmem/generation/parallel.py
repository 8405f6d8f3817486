"""Generation by data-parallel ranks: each takes every n-th prompt, all get the results, in order.

Nothing here is a collective: a rank hands its results over by a store of keys and values that all ranks
see (``torch.distributed``'s; the process group's own by default), a few dialogues at a time, and shows
by a counter that it lives. So a rank that dies costs the dialogues that it had not handed over, and
nobody waits for it longer than ``patience_s``. (The store itself must live: the process group's is
served by rank 0.)
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch.distributed as dist

from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.generation.engine import Engine
    from toolmem.generation.reference import Generated
    from toolmem.generation.requests import Request

HANDED_OVER = 64  # dialogues at a time, at most ...
HAND_OVER_S = 0.5  # ... or what has come in so many seconds
POLL_S = 0.02
_calls = itertools.count()  # every rank makes the same calls in the same order


class _Pulse:
    """Counts up in the store while its rank lives."""

    def __init__(self, store: dist.Store, key: str, every_s: float) -> None:
        self._stop = threading.Event()

        def beat() -> None:
            count = 0
            while not self._stop.is_set():
                count += 1
                store.set(key, str(count))
                self._stop.wait(every_s)

        self._thread = threading.Thread(target=beat, name="toolmem-pulse", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def generate_over_ranks(
    engine: Engine,
    requests: Sequence[Request],
    *,
    store: dist.Store | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    patience_s: float = 60.0,
    name: str | None = None,
) -> list[Generated | None]:
    """Bring requests to their end on all ranks together.

    Args:
        engine: this rank's own, over the same weights as the others'.
        requests: the same on every rank, with seeds of their own: the results are those of one process.
        store: that all ranks see; the default process group's when None.
        rank: of this process; the process group's when None.
        world_size: number of ranks; the process group's when None.
        patience_s: seconds without a sign of life after which a rank is taken for dead.
        name: of this call, the same on every rank and of no other call; counted when None.

    Returns:
        one dialogue a request, in order; None where the rank that had it died first.

    Raises:
        ToolmemError: without a store, when there is no process group.
    """
    if rank is None or world_size is None:
        if not dist.is_initialized():
            raise ToolmemError(
                "generate_over_ranks: there is no process group; start one (torchrun, or a Lightning "
                "strategy), or give store, rank and world_size"
            )
        rank, world_size = dist.get_rank(), dist.get_world_size()
    if store is None:
        store = dist.distributed_c10d._get_default_store()
    prefix = f"toolmem/generate/{next(_calls) if name is None else name}"
    results: list[Generated | None] = [None] * len(requests)
    pulse = _Pulse(store, f"{prefix}/{rank}/pulse", min(1.0, patience_s / 4))
    try:
        own = [(place, requests[place]) for place in own_places(rank, world_size, len(requests))]
        parts = 0
        for part in parts_of(engine, own):
            for place, result in part:
                results[place] = result
            store.set(f"{prefix}/{rank}/{parts}", _packed(part))
            parts += 1
        store.set(f"{prefix}/{rank}/parts", str(parts))
        for other in range(world_size):
            if other != rank:
                _collect(store, f"{prefix}/{other}", results, patience_s)
    finally:
        pulse.stop()
    return results


def own_places(rank: int, n_ranks: int, n: int) -> range:
    """Which of ``n`` requests are a rank's: every ``n_ranks``-th, so that all come along evenly."""
    return range(rank, n, n_ranks)


def parts_of(
    engine: Engine, own: Sequence[tuple[int, Request]]
) -> Iterator[list[tuple[int, Generated]]]:
    """A rank's dialogues, in order, a few at a time: as they are handed over.

    Args:
        engine: the rank's.
        own: its requests, and the place of each among all.
    """
    part: list[tuple[int, Generated]] = []
    began = time.monotonic()
    results = engine.each([request for _, request in own])
    for (place, _), result in zip(own, results, strict=True):
        part.append((place, result))
        if len(part) == HANDED_OVER or time.monotonic() - began > HAND_OVER_S:
            yield part
            part, began = [], time.monotonic()
    if part:
        yield part


def _packed(part: list[tuple[int, Generated]]) -> str:
    """As a store's value: plain data, since whoever reaches the store's port may write to it."""
    return json.dumps([(place, asdict(result)) for place, result in part])


def _unpacked(text: str | bytes) -> Iterator[tuple[int, Generated]]:
    from toolmem.generation.reference import Generated
    from toolmem.tools.base import Answer

    for place, result in json.loads(text):
        calls = [(query, Answer(**answer)) for query, answer in result.pop("tool_calls")]
        yield place, Generated(**result, tool_calls=calls)


def _collect(
    store: dist.Store, prefix: str, results: list[Generated | None], patience_s: float
) -> None:
    """Take another rank's results until it has no more, or is dead."""
    taken, pulse, seen = 0, b"", time.monotonic()
    while True:
        if store.check([f"{prefix}/{taken}"]):
            for index, result in _unpacked(store.get(f"{prefix}/{taken}")):
                results[index] = result
            taken += 1
            continue
        if store.check([f"{prefix}/parts"]) and taken == int(store.get(f"{prefix}/parts")):
            return
        now = time.monotonic()
        if store.check([f"{prefix}/pulse"]):
            beat = store.get(f"{prefix}/pulse")
            if beat != pulse:
                pulse, seen = beat, now
        if now - seen > patience_s:
            return
        time.sleep(POLL_S)
