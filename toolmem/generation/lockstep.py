"""Generation by ranks that share every layer (tensor parallelism): all run the same engine, step by step.

A model that is split over ranks keeps its heads' share of keys, values and states on each, and its sums
are the same numbers on all of them. So engines with the same requests decide the same at every step, if
nothing that they see differs. Two things would: when a tool answers, and the clock. Here the first rank
asks the tools and tells the others what they said, and limits of time are refused.

    parallelize(model, mesh)                          # on every rank
    toolbox = SharedToolbox(toolbox, group)           # None but on the first
    with Engine(model, tokenizer, toolbox) as engine:
        dialogues = generate_in_lockstep(engine, requests)

Tools are waited for, with nothing going on beside.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from toolmem.errors import ToolmemError
from toolmem.tools.base import Answer

if TYPE_CHECKING:
    from toolmem.generation.engine import Engine
    from toolmem.generation.reference import Generated
    from toolmem.generation.requests import Request
    from toolmem.tools import Toolbox


class SharedToolbox:
    """A toolbox that the first rank of a group asks, for all of them.

    Args:
        toolbox: the first rank's; None on the others.
        group: of the ranks; all of them when None.

    Raises:
        ToolmemError: for a first rank without a toolbox.
    """

    def __init__(self, toolbox: Toolbox | None, group: dist.ProcessGroup | None = None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.first = dist.get_process_group_ranks(self.group)[0]
        self.asks = dist.get_rank() == self.first
        if self.asks and toolbox is None:
            raise ToolmemError("SharedToolbox: the first rank asks the tools, and has no toolbox")
        self.toolbox = toolbox
        nccl = dist.get_backend(self.group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def ask_now(self, texts: Sequence[str]) -> list[Answer]:
        """What the tools say to each text, once they have said it; every rank must call it.

        Args:
            texts: one assistant's turn each, the same on every rank.

        Raises:
            ToolmemError: when the first rank failed.
        """
        told: bytes | None = None
        error: Exception | None = None
        if self.asks:
            assert self.toolbox is not None
            try:
                answers = [asdict(answer) for answer in self.toolbox.call_many(texts)]
                told = json.dumps({"answers": answers}).encode()
            except Exception as raised:  # the others wait for an answer, whatever it is
                error = raised
                told = json.dumps({"error": f"{type(raised).__name__}: {raised}"}).encode()
        found = json.loads(self._broadcast(told))
        if error is not None:
            raise error
        if "error" in found:
            raise ToolmemError(f"the rank that asks the tools failed: {found['error']}")
        return [Answer(**each) for each in found["answers"]]

    def question(self, text: str) -> None:
        """Nothing is left to be asked later."""

    def call_many(self, texts: Sequence[str]) -> list[Answer]:
        """As ``ask_now``."""
        return self.ask_now(texts)

    def _broadcast(self, told: bytes | None) -> bytes:
        length = torch.tensor([len(told or b"")], device=self._device)
        dist.broadcast(length, self.first, group=self.group)
        if told is None:
            buffer = torch.empty(int(length), dtype=torch.uint8, device=self._device)
        else:
            buffer = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(self._device)
        dist.broadcast(buffer, self.first, group=self.group)
        return bytes(buffer.cpu().tolist())


def generate_in_lockstep(engine: Engine, requests: Sequence[Request]) -> list[Generated]:
    """Bring requests to their end on ranks that share a model; every rank gets all dialogues, in order.

    Args:
        engine: this rank's, of the same options as the others', with a ``SharedToolbox`` or none.
        requests: the same on every rank.

    Raises:
        ToolmemError: for requests or engines that would part the ranks.
    """
    toolbox = None if engine.calls is None else engine.calls.toolbox
    if toolbox is not None and not isinstance(toolbox, SharedToolbox):
        raise ToolmemError(
            "generate_in_lockstep: each rank's engine would ask its own toolbox, whose answers come at "
            "different times: give it a SharedToolbox"
        )
    for number, request in enumerate(requests):
        if request.max_seconds is not None:
            raise ToolmemError(
                f"generate_in_lockstep: request {number} has max_seconds {request.max_seconds}, and ranks' "
                "clocks differ: limit max_new_tokens in its place"
            )
    return list(engine.run(requests))
