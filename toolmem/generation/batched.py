"""Many dialogues at once, over a cache: ragged prompts, tools called for all that wait together.

Each dialogue is a lane of the batch. A step feeds every lane some of the tokens that the model has
not read yet (the prompt, one sampled token, a tool's answer), and lanes that have none left choose
their next token. The result equals ``reference.generate_naive``, where the rules stand.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.generation.reference import (
    ASSISTANT,
    DATABASE,
    FinishReason,
    Generated,
    check_prompt,
    evaluating,
    foreign_spans,
    token_roles,
    turn_text,
)
from toolmem.generation.sampling import Greedy, History, Sampler, choose, uniform_numbers
from toolmem.tools.base import Answer, extract_query

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models.cache import Cache
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.base import Toolbox

# What a step costs beside its tokens, in tokens: on a CPU a tiny model's step takes about as long
# as running this many tokens through it. Only speed hangs on it.
STEP_OVERHEAD = 128


class Event(NamedTuple):
    """One new token of a dialogue.

    Args:
        token: its id.
        role: its role code.
    """

    token: int
    role: int


@dataclass
class Lane:
    """A dialogue under way; ``fed`` of its tokens are in the cache."""

    index: int
    tokens: list[int]
    roles: list[int]
    log_probs: list[float]
    prompt_length: int
    generator: torch.Generator | None
    written: int = 0
    fed: int = 0
    calls: list[tuple[str, Answer]] = field(default_factory=list)
    reason: FinishReason | None = None

    def add(self, tokens: Sequence[int], role: int, log_prob: float = float("nan")) -> None:
        """Append tokens of one role."""
        self.tokens += tokens
        self.roles += [role] * len(tokens)
        self.log_probs += [log_prob] * len(tokens)

    def finished(self) -> Generated:
        """The dialogue as it is handed out."""
        assert self.reason is not None
        return Generated(
            self.tokens, self.roles, self.log_probs, self.reason, self.calls, self.prompt_length
        )


@dataclass
class _Engine:
    """What one call of ``generate`` needs to know."""

    model: LanguageModel
    tokenizer: Tokenizer
    toolbox: Toolbox | None
    max_new_tokens: int
    max_tool_calls: int
    sampler: Sampler

    def lane(self, index: int, prompt: Sequence[int], seed: int) -> Lane:
        """A dialogue that is to begin."""
        generator = torch.Generator().manual_seed(seed) if self.sampler.random else None
        roles = token_roles(prompt, self.tokenizer.role_ids)
        return Lane(
            index, list(prompt), roles, [float("nan")] * len(prompt), len(prompt), generator
        )

    def run(self, lanes: list[Lane]) -> Iterator[list[Lane]]:
        """Bring all lanes to their end; after each step yields the lanes that have new tokens."""
        for lane in lanes:
            self.check_limits(lane)
        lanes = [lane for lane in lanes if lane.reason is None]
        if not lanes:
            return
        longest = max(len(lane.tokens) for lane in lanes)
        room = min(self.model.max_seq_len, longest + self.max_new_tokens)
        cache = self.model.new_cache(len(lanes), room)
        while lanes:
            ready, hidden = self.feed(lanes, cache)
            if ready:
                self.choose([lanes[row] for row in ready], hidden)
                callers = [
                    lanes[row]
                    for row in ready
                    if lanes[row].tokens[-1] == self.tokenizer.role_ids["database"]
                ]
                if callers:
                    self.call_tools(callers)
                yield [lanes[row] for row in ready]
            alive = [row for row, lane in enumerate(lanes) if lane.reason is None]
            # A finished lane still costs its share of each step; letting it go copies the cache.
            if len(alive) <= 0.75 * len(lanes):
                lanes = [lanes[row] for row in alive]
                if lanes:
                    cache.gather(torch.tensor(alive, device=cache.lengths.device))

    def feed(self, lanes: list[Lane], cache: Cache) -> tuple[list[int], Tensor]:
        """Run a chunk of unread tokens through the model.

        Returns:
            the rows that have read all of theirs, and what the head reads there, (rows, dim).
        """
        waiting = [len(lane.tokens) - lane.fed if lane.reason is None else 0 for lane in lanes]
        both_ways = self.model.attention_mask == "prefix"
        # A model that looks both ways within a span must see the whole of it at once.
        width = max(waiting) if both_ways else chunk_width(waiting)
        counts = [min(n, width) for n in waiting]
        chunk = [
            lane.tokens[lane.fed : lane.fed + count] + [0] * (width - count)
            for lane, count in zip(lanes, counts, strict=True)
        ]
        needed = max(lane.fed + count for lane, count in zip(lanes, counts, strict=True))
        if needed > cache.max_len:  # tools answered at length
            cache.reserve(min(self.model.max_seq_len, max(needed, 2 * cache.max_len)))
        device = cache.lengths.device
        spans = None
        if both_ways:
            numbers = [
                foreign_spans(lane.roles)[lane.fed : lane.fed + count] + [-1] * (width - count)
                for lane, count in zip(lanes, counts, strict=True)
            ]
            spans = torch.tensor(numbers, device=device)
        uneven = min(counts) < width
        hidden = self.model.hidden(
            torch.tensor(chunk, device=device),
            cache=cache,
            counts=torch.tensor(counts, device=device) if uneven else None,
            spans=spans,
        )
        for lane, count in zip(lanes, counts, strict=True):
            lane.fed += count
        ready = [row for row, n in enumerate(waiting) if 0 < n <= width]
        last = [counts[row] - 1 for row in ready]
        return ready, hidden[ready, last]

    def choose(self, lanes: list[Lane], hidden: Tensor) -> None:
        """Let each lane write its next token.

        Args:
            lanes: those whose tokens have all been read.
            hidden: (lanes, dim), what the head reads at their last token.
        """
        logits = self.model.logits(hidden).float()
        uniform = None
        if self.sampler.random:
            generators = [lane.generator for lane in lanes if lane.generator is not None]
            uniform = uniform_numbers(generators)
        histories = [History(lane.tokens, lane.roles, lane.prompt_length) for lane in lanes]
        chosen = choose(self.sampler, logits, uniform, histories)
        log_probs = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
        end, database = self.tokenizer.role_ids["end"], self.tokenizer.role_ids["database"]
        for lane, token, log_prob in zip(lanes, chosen.tolist(), log_probs.tolist(), strict=True):
            lane.add([token], ASSISTANT, log_prob)
            lane.written += 1
            if token == end:
                lane.reason = "end"
            elif token != database:
                self.check_limits(lane)
            elif self.toolbox is None or len(lane.calls) >= self.max_tool_calls:
                lane.reason = "tool_calls"

    def call_tools(self, lanes: list[Lane]) -> None:
        """Answer the lanes that wait for a tool, all at once."""
        lanes = [lane for lane in lanes if lane.reason is None]
        if not lanes or self.toolbox is None:
            return
        texts = [turn_text(lane.tokens, self.tokenizer) for lane in lanes]
        answers = self.toolbox.call_many(texts)
        encoded = self.tokenizer.encode_batch([answer.text for answer in answers])
        for lane, text, answer, ids in zip(lanes, texts, answers, encoded, strict=True):
            lane.calls.append((extract_query(text), answer))
            forced = [*ids, self.tokenizer.role_ids["assistant"]]
            if len(lane.tokens) + len(forced) > self.model.max_seq_len:
                lane.reason = "length"
            else:
                lane.add(forced, DATABASE)
                self.check_limits(lane)

    def check_limits(self, lane: Lane) -> None:
        """Finish a lane that may not write another token."""
        full = len(lane.tokens) >= self.model.max_seq_len
        if full or lane.written >= self.max_new_tokens:
            lane.reason = "length"


def chunk_width(waiting: Sequence[int]) -> int:
    """How many tokens a lane may be fed in the next step: the most useful tokens for the cost.

    A wide chunk for the sake of one lane's tool answer makes all the others pay for padding; a
    narrow one takes many steps. Of the lanes' own numbers the best in useful tokens per cost is
    taken, a step costing its tokens (padding too) and ``STEP_OVERHEAD``.

    Args:
        waiting: unread tokens of each lane, not all 0.
    """
    widths = sorted({n for n in waiting if n})
    if len(widths) == 1:
        return widths[0]
    cost = {width: STEP_OVERHEAD + len(waiting) * width for width in widths}
    return max(widths, key=lambda width: sum(min(n, width) for n in waiting) / cost[width])


def _engine(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    toolbox: Toolbox | None,
    max_new_tokens: int,
    max_tool_calls: int,
    sampler: Sampler | None,
) -> _Engine:
    for prompt in prompts:
        check_prompt(model, prompt)
    return _Engine(model, tokenizer, toolbox, max_new_tokens, max_tool_calls, sampler or Greedy())


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    toolbox: Toolbox | None = None,
    max_new_tokens: int = 128,
    max_tool_calls: int = 4,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    batch_size: int = 128,
) -> list[Generated]:
    """Continue many dialogues.

    Args:
        model: on any device; its mode is put back.
        tokenizer: has the role tokens.
        prompts: token ids of each, of any lengths, ending where the assistant begins to speak.
        toolbox: answers tool calls.
        max_new_tokens: tokens that the model may write in each dialogue.
        max_tool_calls: calls that it may make in each.
        sampler: ``Greedy()`` when None.
        seed: dialogue i samples by seed + i; or one seed a dialogue.
        batch_size: dialogues held in the cache at once.

    Returns:
        one dialogue a prompt, in order.

    Raises:
        ToolmemError: for a prompt that the model cannot take.
    """
    if batch_size < 1:
        raise ToolmemError(f"batch_size is {batch_size}: it must be at least 1")
    engine = _engine(model, tokenizer, prompts, toolbox, max_new_tokens, max_tool_calls, sampler)
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ToolmemError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
    lanes = [
        engine.lane(index, prompt, one_seed)
        for index, (prompt, one_seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    with evaluating(model):
        for start in range(0, len(lanes), batch_size):
            for _ in engine.run(lanes[start : start + batch_size]):
                pass
    return [lane.finished() for lane in lanes]


@torch.no_grad()
def stream(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    toolbox: Toolbox | None = None,
    max_new_tokens: int = 128,
    max_tool_calls: int = 4,
    sampler: Sampler | None = None,
    seed: int = 0,
) -> Generator[Event, None, Generated]:
    """Continue one dialogue and yield its new tokens as they come, a tool's answer all at once.

    Arguments as ``generate``; the generator's return value is the finished dialogue.
    """
    engine = _engine(model, tokenizer, [prompt], toolbox, max_new_tokens, max_tool_calls, sampler)
    lane = engine.lane(0, prompt, seed)
    told = len(prompt)
    with evaluating(model):
        for _ in engine.run([lane]):
            for token, role in zip(lane.tokens[told:], lane.roles[told:], strict=True):
                yield Event(token, role)
            told = len(lane.tokens)
    return lane.finished()
