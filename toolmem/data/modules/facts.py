"""People's facts told as dialogues, in-weight or in-tool."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolmem.data.dialogues import Dialogue, QuestionTable, TemplateSet
from toolmem.data.factbase import build_factbase
from toolmem.data.modules.base import StatefulDataModule
from toolmem.data.people import Population, make_population, unseen_population
from toolmem.data.tables import load_population
from toolmem.data.text.dialog_tokens import DialogTokenGenerator, Layout, Mask
from toolmem.data.text.token_table import TokenTable
from toolmem.data.tokenizers import make_tokenizer
from toolmem.errors import ToolmemError

Setting = Literal["in_weight", "in_tool"]


class FactsDataModule(StatefulDataModule):
    """Dialogues about a population; validation asks about people of unseen names.

    In-weight, unseen people's facts cannot be known, so validation asks about the people of training.

    Args:
        people: how many to make, or the path of your own table (CSV, Parquet, JSONL, DuckDB).
        setting: ``in_weight`` (the assistant answers) or ``in_tool`` (it asks the database first).
        templates: a built-in set or a folder of your own; the setting's plain set when None.
        query: the language of queries, ``short`` or ``sql``.
        seed: of people, their facts and the order of dialogues.
        alpha: independence of attributes, 0 (all of a last name alike) to 1 (independent).
        relations: give people friends, for two-hop questions.
        variants: tell each person each question in this many of a set's variants; None tells all.
        batch_size: dialogues a batch, over all ranks.
        mask: loss on what the ``assistant`` writes, or on ``all`` tokens.
        layout: ``bucketed`` (dialogues of a length meet), ``rows`` or ``packed``.
        seq_len: ``packed`` only: tokens a row.
        tokenizer: ``byte`` or the path of a ``tokenizer.json``.
        unseen_people: people whose names nobody in training has; 0 for none.
        n_val_questions: held-out questions that validation loss is measured on.
        num_workers: processes that make batches.

    Raises:
        ToolmemError: settings that do not go together, or a table that cannot be read.
    """

    def __init__(
        self,
        people: int | str = 64,
        setting: Setting = "in_weight",
        templates: str | None = None,
        query: Literal["short", "sql"] = "short",
        seed: int = 0,
        alpha: float = 1.0,
        relations: bool = False,
        variants: int | None = None,
        batch_size: int = 128,
        mask: Mask = "assistant",
        layout: Layout = "bucketed",
        seq_len: int | None = None,
        tokenizer: str = "byte",
        unseen_people: int = 256,
        n_val_questions: int = 512,
        num_workers: int = 0,
    ) -> None:
        super().__init__(make_tokenizer(tokenizer), batch_size, num_workers)
        if unseen_people < 0:
            raise ToolmemError(f"data: unseen_people is {unseen_people}: it must be 0 or more")
        if n_val_questions < 1:
            raise ToolmemError(f"data: n_val_questions is {n_val_questions}: it must be at least 1")
        self.people = people
        self.setting = setting
        self.seed, self.alpha, self.relations = seed, alpha, relations
        self.variants = variants
        self.mask, self.layout, self.packed_len = mask, layout, seq_len
        self.unseen_people = unseen_people
        self.n_val_questions = n_val_questions
        self.templates = TemplateSet.load(templates or setting, query, setting=setting)
        if self.templates.uses_tool != (setting == "in_tool"):
            does = "ask the database" if self.templates.uses_tool else "never ask the database"
            raise ToolmemError(
                f"data: the templates {self.templates.name} {does}, and setting is {setting}: change "
                "data.init_args.setting or data.init_args.templates"
            )
        if layout == "packed" and seq_len is None:
            raise ToolmemError("data: layout packed needs seq_len, the tokens of a row")

    @cached_property
    def population(self) -> Population:
        """The people of training."""
        if isinstance(self.people, str) and not self.people.isdigit():
            return load_population(self.people)
        return make_population(
            int(self.people), seed=self.seed, alpha=self.alpha, relations=self.relations
        )

    @cached_property
    def unseen_population(self) -> Population | None:
        """People whose first and last names nobody in training has."""
        if not self.unseen_people:
            return None
        return unseen_population(self.unseen_people, training=self.population, seed=self.seed)

    @cached_property
    def known_questions(self) -> QuestionTable:
        """Every question about the people of training."""
        return self.templates.questions(self.population, variants=self.variants, seed=self.seed)

    @cached_property
    def unseen_questions(self) -> QuestionTable | None:
        """Every question about unseen people."""
        if self.unseen_population is None:
            return None
        return self.templates.questions(self.unseen_population)

    def questions(self, split: str, n: int) -> list[Dialogue]:
        """``n`` questions of a split, the same ones each time; fewer when there are no more.

        Args:
            split: ``known`` or ``unseen``.
            n: how many.
        """
        table = self.known_questions if split == "known" else self.unseen_questions
        if table is None:
            return []
        return [table.dialogue(int(index)) for index in table.sample(n, seed=self.seed)]

    def write_factbase(self, path: str | Path) -> str:
        """Write known and unseen people as one factbase, for the tool; returns its fingerprint."""
        return build_factbase(self.population, path, unseen=self.unseen_population)

    @cached_property
    def table(self) -> TokenTable:
        """Every dialogue of training, tokenised."""
        return TokenTable.build(self.known_questions, self.tokenizer)

    @cached_property
    def val_table(self) -> TokenTable:
        """The dialogues of validation, tokenised."""
        table = self.known_questions
        if self.setting == "in_tool" and self.unseen_questions is not None:
            table = self.unseen_questions
        numbers = table.sample(self.n_val_questions, seed=self.seed + 1)
        return TokenTable.from_dialogues((table.dialogue(int(i)) for i in numbers), self.tokenizer)

    @property
    def seq_len(self) -> int:  # type: ignore[override]
        """Longest row that a batch can have."""
        longest = max(int(self.table.lengths.max()), int(self.val_table.lengths.max())) - 1
        return longest if self.packed_len is None else max(longest, self.packed_len)

    def train_batches(self, rank: int = 0, world_size: int = 1) -> DialogTokenGenerator:
        """The endless training stream of one rank."""
        return DialogTokenGenerator(
            self.table,
            self.batch_size,
            mask=self.mask,
            layout=self.layout,
            seq_len=self.packed_len,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def val_batches(self, rank: int = 0, world_size: int = 1) -> DialogTokenGenerator:
        """Held-out questions, sorted by length so that hardly anything is padding."""
        batches = DialogTokenGenerator(
            self.val_table,
            self.batch_size,
            mask=self.mask,
            layout="rows",
            rows=np.argsort(self.val_table.lengths, kind="stable"),
            shuffle=False,
            rank=rank,
            world_size=world_size,
        )
        batches.stop = batches.batches_per_epoch
        return batches

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps."""
        return {
            "tokenizer": self.tokenizer.spec(),
            "setting": self.setting,
            "templates": self.templates.spec(),
            "variants": self.variants,
            "factbase": {
                "fingerprint": self.fingerprint,
                "people": len(self.population),
                "unseen_people": self.unseen_people,
                "seed": self.seed,
                "alpha": self.alpha,
            },
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of the training people's facts."""
        return self.population.fingerprint()
