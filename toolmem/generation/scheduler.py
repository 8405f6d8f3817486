"""What happens in a step of the engine: lanes are let in, read, write, call tools, and leave.

    queue -> running -> (calling -> ready -> running)* -> finished

A lane runs while it has a row in the pager's tables. It reads what it has not read yet (its prompt, a
tool's answer, the token that it wrote last), and when nothing is left it writes a token. One that calls
a tool leaves its row to others until the answer is there. Where memory is short the youngest lane pauses.
"""

from __future__ import annotations

import torch

from toolmem.generation.reading import Read
from toolmem.generation.writing import Writing


class Scheduler(Writing):
    """All lanes of an engine, step by step. Arguments as ``Lifecycle``."""

    @torch.no_grad()
    def step(self) -> bool:
        """Move every lane on that can move; whether there was one."""
        self.expire()
        self._take_answers()
        self._admit()
        if not self.running:
            return False
        self.counts.steps += 1
        written: list[Read] = []
        known = [lane for lane in self.running if lane.hidden is not None]
        if known:
            states = [lane.hidden for lane in known if lane.hidden is not None]
            written.append(Read(known, [1] * len(known), torch.stack(states)))
            for lane in known:
                lane.hidden = None
        # room for all passes first: making it may cost lanes their place
        for group in [self._make_room(*group) for group in list(self._plan())]:
            written.append(self._read(group))
        self._write(written)
        for lane in list(self._listened):
            try:
                self._tell(lane)
            except Exception as error:
                self.fail(lane, error)
        return True
