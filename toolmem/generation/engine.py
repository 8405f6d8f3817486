"""The engine: many dialogues at once, tools off the critical path, state in pages.

Each dialogue is a lane: it reads its prompt, writes, waits for a tool, reads the answer, writes on. A
step runs the unread tokens of all running lanes through the model (prompts in chunks, under a budget),
lets those that have read all of theirs write a token, and hands tool calls to ``ToolCalls``. A lane that
waits for its tool takes part in no step: its place goes to the next one, and its pages may leave memory.
Lanes come and go at any step (``scheduler.py``). The rules of a dialogue are those of
``reference.generate_naive``, which every result equals.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from toolmem.data.turn_format import turn_format
from toolmem.errors import ToolmemError
from toolmem.generation.invariance import check_invariant, row_independent
from toolmem.generation.lanes import Lane
from toolmem.generation.lifecycle import Stats
from toolmem.generation.paging import Branch, Pager
from toolmem.generation.reference import Generated, check_prompt, evaluating
from toolmem.generation.requests import EngineFull, Handle, Request
from toolmem.generation.scheduler import Scheduler
from toolmem.generation.speculative import Drafter
from toolmem.generation.tree import Node
from toolmem.models import kernels
from toolmem.tools.dispatch import ToolCalls

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models.language_model import LanguageModel
    from toolmem.tools.base import Toolbox

IDLE_S = 0.05  # how often an engine with nothing to do looks at its lanes' time limits


class Engine:
    """Generates dialogues with tools.

    Args:
        model: on any device.
        tokenizer: has the role tokens.
        toolbox: answers tool calls; it stays the caller's, who closes it.
        max_lanes: dialogues in a step; those that wait for a tool do not count.
        max_queued: requests that may wait for a place, beyond which ``submit`` raises; None for any.
        step_tokens: tokens that a step reads at most, beside one a lane.
        page_size: tokens of a page.
        memory_limit: bytes of decoding state where the model is; never passed.
        host_limit: bytes of it in host memory besides, of lanes that wait; beyond it goes to a file.
        spill_folder: where that file is; the system's folder for temporary files when None.
        prefix_sharing: let dialogues that begin alike read their beginning once.
        invariant: results do not hang on the batch, bit for bit (float32 on a CPU; slower). The model's
            kernel of attention is chosen before.
        max_calls: tool calls under way at once.
        drafter: proposes tokens that the model checks several at a time, with the same results
            (``speculative.py``); not in invariant mode.
        compile: decode by ``torch.compile`` (``models/compiled.py``), which takes from some seconds to
            minutes before the first token (``warm_up``); not in invariant mode.

    Raises:
        ToolmemError: for limits that make no sense, or a model that the engine cannot run.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        toolbox: Toolbox | None = None,
        *,
        max_lanes: int = 128,
        max_queued: int | None = None,
        step_tokens: int = 1024,
        page_size: int = 16,
        memory_limit: int = 2 * 2**30,
        host_limit: int = 2 * 2**30,
        spill_folder: str | Path | None = None,
        prefix_sharing: bool = True,
        invariant: bool = False,
        max_calls: int = 64,
        drafter: Drafter | None = None,
        compile: bool = False,
    ) -> None:
        if max_lanes < 1 or step_tokens < 1:
            raise ToolmemError("max_lanes and step_tokens must be at least 1")
        if drafter is not None and invariant:
            raise ToolmemError("invariant: passes with drafts have no fixed shape; leave one out")
        if compile and invariant:
            raise ToolmemError("invariant: compiled sums have an order of their own; leave one out")
        if invariant:
            check_invariant(model)
        self.model = model
        self.tokenizer = tokenizer
        self.max_queued = max_queued
        self.invariant = invariant
        self.pager = Pager(
            model,
            max_active=max_lanes,
            page_size=page_size,
            memory_limit=memory_limit,
            host_limit=host_limit,
            folder=spill_folder,
        )
        self.calls = None if toolbox is None else ToolCalls(toolbox, max_concurrent=max_calls)
        self._work = threading.Event()  # something has changed for lanes that wait
        self._submitted = threading.Event()  # there is something to do in the background
        self._kernels = kernels.accelerate(model, invariant=invariant)
        self.scheduler = Scheduler(
            model,
            tokenizer,
            self.calls,
            max_lanes=max_lanes,
            step_tokens=step_tokens,
            pager=self.pager,
            prefix_sharing=prefix_sharing,
            invariant=invariant,
            drafter=drafter,
            compile=compile,
            row_independent=row_independent(model),
            wake=self._work.set,
        )
        self._entered = 0
        self._seeds = 0
        self.weights = 0  # how many times they have been changed
        self._lanes: dict[Handle, Lane] = {}
        self._cancelled: SimpleQueue[Handle] = SimpleQueue()
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def submit(self, request: Request) -> Handle:
        """Begin a dialogue in the background; from any thread.

        Args:
            request: what is asked.

        Returns:
            its handle: iterate over it, or wait for its result.

        Raises:
            EngineFull: when ``max_queued`` requests wait.
            ToolmemError: for a prompt that the model cannot take.
        """
        handle = Handle(request, self._cancel)
        with self._lock:
            waiting = len(self.scheduler.queue)
            if self.max_queued is not None and waiting >= self.max_queued:
                raise EngineFull(
                    f"{waiting} requests wait already (max_queued {self.max_queued}): ask again later"
                )
            self._enter([handle])
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="toolmem-engine", daemon=True
                )
                self._thread.start()
        self._submitted.set()
        return handle

    def stream(self, request: Request) -> Handle:
        """The same as ``submit``: the events come by iterating over the handle."""
        return self.submit(request)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, seed: int | Sequence[int] = 0, **options: Any
    ) -> list[Generated]:
        """Go on with many dialogues, in the caller's thread.

        Args:
            prompts: token ids of each, of any lengths, ending where the assistant begins to speak.
            seed: dialogue i samples by seed + i; or one seed a dialogue.
            options: of ``Request``, for all of them.

        Returns:
            one dialogue a prompt, in order.

        Raises:
            ToolmemError: for a prompt that the model cannot take.
        """
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ToolmemError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one for each")
        return self.run(
            [Request(prompt, seed=s, **options) for prompt, s in zip(prompts, seeds, strict=True)]
        )

    def run(self, requests: Sequence[Request]) -> list[Generated]:
        """Bring requests to their end, in the caller's thread; results in order.

        A dialogue of which something of its own failed (its sampler, a tool's answer that cannot be
        encoded) has ``error`` as its reason to finish; what failed is in words in its ``error``.
        """
        return [handle.dialogue() for handle in self.finish(requests)]

    def finish(
        self,
        requests: Sequence[Request],
        branches: Sequence[Branch | None] | None = None,
        keep: bool = False,
    ) -> list[Handle]:
        """``run``, with the decoding state of each: where it goes on from, and what it ends with.

        Args:
            requests: what is asked.
            branches: state of the first tokens of each prompt, which is used up; None to read them all.
            keep: leave the state of each in ``handle.branch``, for the caller to free.
        """
        changed = threading.Condition()
        handles = [Handle(request, self._cancel, False, changed) for request in requests]
        with self._lock:
            self._enter(handles, branches, keep)
        with evaluating(self.model):
            try:
                for handle in handles:
                    while not handle.done:
                        self._turn()
            except BaseException:
                for handle in handles:
                    handle.cancel()
                self._sweep()
                raise
        return handles

    def each(self, requests: Iterable[Request], *, ahead: int = 1024) -> Iterator[Generated]:
        """Bring requests to their end, in the caller's thread, and yield the results in order.

        Args:
            requests: what is asked; taken up as there is room.
            ahead: requests taken up from the first on that is not at its end, so that one that waits
                for a slow tool does not hold up the others.
        """
        source = iter(requests)
        handles: deque[Handle] = deque()
        changed = threading.Condition()
        try:
            while True:
                fresh = islice(source, ahead - len(handles))
                entering = [Handle(request, self._cancel, False, changed) for request in fresh]
                with self._lock:
                    self._enter(entering)
                handles += entering
                if not handles:
                    return
                with evaluating(self.model):
                    while not handles[0].done:
                        self._turn()
                while handles and handles[0].done:
                    yield handles.popleft().dialogue()
        finally:
            for handle in handles:
                handle.cancel()
            self._sweep()

    def root(self, prompt: Sequence[int]) -> Node:
        """The root of a tree of dialogues (``tree.py``); prune it when it is done with.

        Args:
            prompt: token ids, ending where the assistant begins to speak.
        """
        check_prompt(self.model, prompt)
        tokens = list(prompt)
        roles = turn_format(self.tokenizer).codes(tokens)
        dialogue = Generated(tokens, roles, [math.nan] * len(tokens), "length", [], len(tokens))
        with self._lock:
            return Node(self, dialogue, self.pager.new())

    def fork_branch(self, branch: Branch) -> Branch:
        """Another owner of the same decoding state, for ``finish`` to go on from."""
        with self._lock:
            return self.pager.fork(branch)

    def free_branch(self, branch: Branch) -> None:
        """Give up decoding state that ``finish`` left to the caller."""
        with self._lock:
            self.pager.free(branch)

    def next_seeds(self, n: int) -> int:
        """The first of ``n`` seeds that no fork of this engine has had."""
        with self._lock:
            first, self._seeds = self._seeds, self._seeds + n
            return first

    def update_weights(self, model: LanguageModel | None = None) -> None:
        """Go on with other weights; what was made with the old ones is dropped, and read again.

        Args:
            model: its weights are taken over; None when the engine's own model was changed in place.

        Raises:
            ToolmemError: when it has other parameters.
        """
        with self._lock:
            if model is not None and model is not self.model:
                try:
                    self.model.load_state_dict(model.state_dict())
                except RuntimeError as error:
                    raise ToolmemError(
                        f"update_weights: not the engine's model with other weights: {error}"
                    ) from error
            self.scheduler.forget()
            self.weights += 1

    def warm_up(self, told: Callable[[int, int], None] | None = None) -> float:
        """Compile what an engine made with ``compile`` needs, before it is needed.

        Args:
            told: called with how many shapes of a pass are done, and how many there are.

        Returns:
            seconds that compiling has taken so far; 0 for an engine that compiles nothing.

        Raises:
            ToolmemError: for a model that cannot be compiled, naming it.
        """
        compiled = self.scheduler.compiled
        if compiled is None:
            return 0.0
        with self._lock, evaluating(self.model):
            compiled.warm_up(told)
        return compiled.seconds

    def stats(self) -> Stats:
        """Counts so far, and what is held now."""
        with self._lock:
            scheduler, pager, counts = self.scheduler, self.pager, self.scheduler.counts
            counts.lanes_running = len(scheduler.running)
            counts.lanes_calling = len(scheduler.calling)
            counts.lanes_waiting = (
                len(scheduler.alive) - len(scheduler.running) - len(scheduler.calling)
            )
            counts.pages_used = pager.used("page")
            counts.pages_free = pager.capacity["page"] - counts.pages_used
            counts.bytes_used, counts.bytes_peak = pager.bytes_used(), pager.bytes_peak()
            counts.pieces_paged_out, counts.pieces_paged_in = pager.paged_out, pager.paged_in
            if (compiled := scheduler.compiled) is not None:
                counts.compilations, counts.compile_seconds = compiled.graphs, compiled.seconds
            return Stats(**vars(counts))

    def acceptance(self) -> dict[str, object]:
        """How drafts fared: passes by the draft's length and the tokens accepted, as plain data."""
        with self._lock:
            return self.scheduler.acceptance.histogram()

    def close(self) -> None:
        """Stop: requests under way fail, threads end, memory is given back."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for lane in list(self.scheduler.alive):
                self.scheduler.drop(lane, ToolmemError("the engine was closed"))
            self._lanes.clear()
            if self.scheduler.tree is not None:
                self.scheduler.tree.clear()
            self._kernels.close()
        self._submitted.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self.calls is not None:
            self.calls.close()
        self.pager.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(
        self,
        handles: Sequence[Handle],
        branches: Sequence[Branch | None] | None = None,
        keep: bool = False,
    ) -> None:
        if self._closed:
            raise ToolmemError("the engine is closed")
        for handle in handles:
            check_prompt(self.model, handle.request.prompt)
            need = len(handle.request.prompt) + handle.request.max_new_tokens
            need = min(need, self.model.max_seq_len)
            if not self.pager.fits(need):
                raise ToolmemError(
                    f"a dialogue of {need} tokens does not fit memory_limit "
                    f"({self.pager.memory_limit:,} bytes): raise it, or ask for fewer tokens"
                )
        entered: list[Lane] = []
        for number, handle in enumerate(handles):
            lane = Lane(handle, self._entered, keep)
            self._entered += 1
            branch = branches[number] if branches is not None else None
            lane.branch = branch or self.pager.new()
            try:
                self.scheduler.enter(lane)
            except Exception as error:  # such as a seed that is none: nothing of the call goes on
                self.pager.free(lane.branch)
                for other in entered:
                    self.scheduler.drop(other, error)
                raise
            self._lanes[handle] = lane
            entered.append(lane)

    def _cancel(self, handle: Handle) -> None:
        self._cancelled.put(handle)
        self._work.set()

    def _sweep(self) -> None:
        """Finish what was cancelled."""
        with self._lock:
            while True:
                try:
                    lane = self._lanes.get(self._cancelled.get_nowait())
                except Empty:
                    break
                if lane in self.scheduler.alive:
                    self.scheduler.finish(lane, "cancelled")
            if len(self._lanes) > 2 * len(self.scheduler.alive) + 1024:
                self._lanes = {lane.handle: lane for lane in self.scheduler.alive}

    def _turn(self) -> None:
        """One step, or a wait for what it takes to make one."""
        with self._lock:
            if self._closed:
                raise ToolmemError("the engine was closed")
            self._work.clear()
            self._sweep()
            moved = self.scheduler.step()
        if not moved:
            self._work.wait(IDLE_S)

    def _serve(self) -> None:
        """The background thread: steps while there is anything to do."""
        while not self._closed:
            try:
                with evaluating(self.model):
                    while self.scheduler.alive and not self._closed:
                        self._turn()
            except BaseException as error:  # a step failed: nobody may wait for ever
                with self._lock:
                    for lane in list(self.scheduler.alive):
                        self.scheduler.drop(lane, error)
            self._submitted.wait()
            self._submitted.clear()
