"""How the cost of decoding a token depends on how many came before it, on one core."""

from __future__ import annotations

import time

import torch

from toolmem.models import LanguageModel

SHORT, LONG, ROOM = 100, 10_000, 20_000
CHUNK = 1000  # tokens of a prefill at once


@torch.no_grad()
def flatness(model: LanguageModel, tokens: int, rounds: int) -> dict[str, float]:
    """Seconds a token after SHORT tokens and after LONG, the two taking many short turns.

    Args:
        model: one with a ``max_seq_len`` of ROOM.
        tokens: tokens decoded in a turn.
        rounds: turns of each.

    Returns:
        Milliseconds a token after both, ``flatness``, the second over the first, and ``cache_bytes``
        of a lane with room for LONG tokens.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    caches = {}
    for length in (SHORT, LONG):
        caches[length] = model.new_cache(1, ROOM)
        prompt = torch.randint(model.vocab_size, (1, length), generator=generator)
        for part in prompt.split(CHUNK, dim=1):
            model.hidden(part, cache=caches[length])
    one = torch.zeros(1, 1, dtype=torch.int64)
    times: dict[int, list[float]] = {length: [] for length in caches}
    for _ in range(rounds):
        for length, cache in caches.items():
            began = time.perf_counter()
            for _ in range(tokens):
                model(one, cache=cache)
            times[length].append((time.perf_counter() - began) / tokens)
    # The fastest turn of each: whatever else the machine does can only add to a time, and a short turn
    # has the better chance that it does nothing else.
    near, far = (min(seconds) for seconds in times.values())
    return {
        f"ms_per_token_after_{SHORT}": 1e3 * near,
        f"ms_per_token_after_{LONG}": 1e3 * far,
        "flatness": far / near,
        "cache_bytes": model.new_cache(1, LONG).size_in_bytes(),
    }
