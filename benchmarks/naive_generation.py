"""The naive side of benchmarks/generate.py: lockstep decoding, one tool call at a time.

How generation with tools is mostly written: a batch of dialogues takes every step together, over one
cache as wide as the longest; a lane that has finished, or that has nothing to read, is padding; when
lanes call their tool they are answered in turn, and everybody waits. It is no strawman: it has a cache,
it reads prompts and answers in one pass each, and it stops when all lanes have finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel
    from toolmem.tools import Toolbox


@torch.no_grad()
def generate_in_lockstep(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    toolbox: Toolbox,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy dialogues of one batch.

    Args:
        model: the same that the engine runs.
        tokenizer: has the role tokens.
        prompts: token ids of each.
        toolbox: asked once for each call, in turn.
        max_new_tokens: tokens that each may write.

    Returns:
        the tokens of each, prompt and answers among them.
    """
    roles = tokenizer.role_ids
    tokens = [list(prompt) for prompt in prompts]
    pending = [list(prompt) for prompt in prompts]
    written, done = [0] * len(prompts), [False] * len(prompts)
    cache = model.new_cache(len(prompts), model.max_seq_len)
    while not all(done):
        width = max(len(new) for new in pending)
        counts = [len(new) for new in pending]
        chunk = torch.tensor([new + [0] * (width - len(new)) for new in pending])
        hidden = model.hidden(chunk, cache=cache, counts=torch.tensor(counts))
        last = torch.tensor(counts).clamp(min=1) - 1
        chosen = model.logits(hidden[torch.arange(len(prompts)), last]).argmax(-1).tolist()
        for lane, token in enumerate(chosen):
            pending[lane] = []
            if done[lane]:
                continue
            tokens[lane].append(token)
            written[lane] += 1
            pending[lane] = [token]
            if token == roles["database"]:
                start = len(tokens[lane]) - 1
                while tokens[lane][start - 1] != roles["assistant"]:
                    start -= 1
                [answer] = toolbox.call_many([tokenizer.decode(tokens[lane][start:-1])])
                forced = [*tokenizer.encode(answer.text), roles["assistant"]]
                tokens[lane] += forced
                pending[lane] += forced
            full = len(tokens[lane]) >= model.max_seq_len or written[lane] >= max_new_tokens
            done[lane] = token == roles["end"] or full
            if done[lane]:
                pending[lane] = []
    return tokens
