"""Data for a population of models: each member has a DataModule, and so a stream, of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from toolmem.class_path import construct
from toolmem.data.batch import Batch
from toolmem.data.modules.base import STATE_FORMAT, StatefulDataModule
from toolmem.errors import ToolmemError


@dataclass
class PopulationBatch:
    """One batch a member.

    Args:
        members: each member's, by its number; members that are done with training have none.
    """

    members: dict[int, Batch]

    @property
    def n_tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(batch.n_tokens for batch in self.members.values())

    @property
    def state(self) -> dict[str, Any]:
        """Where each member's loader stands after this batch."""
        return {"members": {member: batch.state for member, batch in self.members.items()}}

    @property
    def parts(self) -> list[Batch]:
        """The members' batches."""
        return list(self.members.values())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PopulationBatch:
        """The same batches on ``device``."""
        return replace(
            self, members={m: batch.to(device, non_blocking) for m, batch in self.members.items()}
        )

    def pin_memory(self) -> PopulationBatch:
        """The same batches in page-locked memory."""
        return replace(self, members={m: batch.pin_memory() for m, batch in self.members.items()})

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.members.values())


class PopulationDataModule(StatefulDataModule):
    """Data for a population of models: a DataModule for each, of one class.

    Args:
        data: the DataModule that each member has, ``class_path`` and ``init_args``.
        members: one entry a member: which of those ``init_args`` are otherwise for it.

    Raises:
        ToolmemError: when there is no member, or members differ in what a batched model must share.
    """

    def __init__(self, data: dict[str, Any], members: list[dict[str, Any]]) -> None:
        super().__init__()
        if not members:
            raise ToolmemError(
                "data.init_args.members is empty: give one entry a member, {} or more"
            )
        if not isinstance(data.get("class_path"), str):
            raise ToolmemError("data.init_args.data must have a class_path")
        base = data.get("init_args") or {}
        self.members: list[StatefulDataModule] = []
        for number, changes in enumerate(members):
            key = f"data.init_args.members[{number}]"
            options = {**base, **changes}
            member = construct(data["class_path"], options, {}, key, StatefulDataModule)
            if getattr(member, "prefer_unknown", 0):
                raise ToolmemError(
                    f"{key}.prefer_unknown: members' losses are not told to their data: set it to 0, or "
                    "train it alone"
                )
            self.members.append(member)
        first = self._spec(self.members[0])
        for number, member in enumerate(self.members):
            if self._spec(member) != first:
                raise ToolmemError(
                    f"data.init_args.members[{number}] has another tokenizer than members[0], and the "
                    "members' models are of one shape: give them one"
                )
        self._done: set[int] = set()

    @staticmethod
    def _spec(member: Any) -> tuple[int, Any]:
        tokenizer = getattr(member, "tokenizer", None)
        return member.vocab_size, None if tokenizer is None else tokenizer.spec()

    # -- what there is

    @property
    def vocab_size(self) -> int:
        """Token ids there are."""
        return self.members[0].vocab_size  # type: ignore[attr-defined]

    @property
    def seq_len(self) -> int:
        """Tokens of the longest row that can come to any member."""
        return max(member.seq_len for member in self.members)  # type: ignore[attr-defined]

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Tools that any member's model may ask; None where all have the usual ones."""
        named = [tool for member in self.members for tool in getattr(member, "tools", None) or []]
        return named or None

    def check_model(self, model: Any) -> None:
        """Refuse a model that some member's data cannot train."""
        for member in self.members:
            member.check_model(model)

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a population's checkpoint keeps: the tokenizer, and each member's data."""
        infos = [member.checkpoint_info() for member in self.members]  # type: ignore[attr-defined]
        return {"tokenizer": infos[0].get("tokenizer"), "factbase": None, "members": infos}

    # -- batches

    def setup(self, stage: str | None = None) -> None:
        """Set every member's data up."""
        for member in self.members:
            member.trainer = self.trainer
            member.setup(stage)  # type: ignore[arg-type]

    def signature(self) -> dict[str, Any]:
        """What decides which batches are the n-th."""
        return {"members": [member.signature() for member in self.members]}

    def finish(self, member: int) -> None:
        """Give a member no more batches.

        Args:
            member: its number.
        """
        self._done.add(member)

    def train_dataloader(self) -> Iterable[PopulationBatch]:
        """The endless training streams side by side, each from where a loaded state says."""
        return _SideBySide([member.train_dataloader() for member in self.members], self._done)

    def val_dataloader(self) -> list[Any]:
        """Each member's."""
        return [member.val_dataloader() for member in self.members]

    # -- where it stands

    def consumed(self, state: dict[str, Any]) -> None:
        """Training is done with the batch that carried ``state``."""
        for member, of_member in state["members"].items():
            self.members[member].consumed(of_member)

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which training goes on after the last batch consumed."""
        return {
            "format": STATE_FORMAT,
            "members": [member.state_dict() for member in self.members],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next `train_dataloader` begin where ``state_dict`` was taken.

        Raises:
            ToolmemError: for a state that another version wrote, or of other members.
        """
        states = state_dict.get("members", [])
        if len(states) != len(self.members):
            raise ToolmemError(
                f"the checkpoint's data is of {len(states)} members, data.init_args.members has "
                f"{len(self.members)}: set it as it was, or start a new run"
            )
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)


class _SideBySide:
    """The next batch of every member that is not done, as long as there is one.

    Args:
        loaders: the members'.
        done: numbers of members that take no more; looked at before each batch.
    """

    def __init__(self, loaders: Sequence[Iterable[Batch]], done: set[int]) -> None:
        self.loaders = loaders
        self.done = done

    def __iter__(self) -> Iterator[PopulationBatch]:
        streams = {m: iter(each) for m, each in enumerate(self.loaders) if m not in self.done}
        while streams:
            yield PopulationBatch({m: next(stream) for m, stream in streams.items()})
            streams = {m: stream for m, stream in streams.items() if m not in self.done}
