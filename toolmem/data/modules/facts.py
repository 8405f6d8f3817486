"""Dialogues about a population, in-weight or in-tool."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from toolmem.data.batch import Batch
from toolmem.data.dialogues import Dialogue, QuestionTable, TemplateSet
from toolmem.data.modules.base import HeldOut, StatefulDataModule
from toolmem.data.people import Population, make_population, unseen_population
from toolmem.data.queries import QueryLanguage
from toolmem.data.stream import make_loader
from toolmem.data.tables import load_population
from toolmem.data.text.dialog_tokens import DialogTokenGenerator, Layout, Mask
from toolmem.data.text.token_table import TokenTable
from toolmem.data.text.unknown_first import LatestLosses, UnknownFirst, check_share
from toolmem.data.tokenizers import Tokenizer, make_tokenizer, with_system
from toolmem.data.turn_format import turn_format
from toolmem.errors import ToolmemError

Setting = Literal["in_weight", "in_tool"]
QuestionSplit = Literal["known", "unseen", "held_out"]

DEFAULT_UNSEEN = 512


class FactsDataModule(StatefulDataModule):
    """Facts about people, told as dialogues.

    Args:
        people: how many synthetic people, or a table of your own (CSV, Parquet, JSONL, DuckDB).
        setting: in_weight (the model answers itself) or in_tool (it asks the database).
        templates: a built-in template set, a folder of your own, or a list of them; validation and
            recall ask the first's questions. None takes the set named like the setting.
        query: the language of queries, short (FIND ... FOR ...) or sql.
        seed: of the people, the order and what is held out.
        alpha: independence of a person's attributes, from 0 (fixed by the last name) to 1.
        relations: give people friends (what the two_hop sets ask about).
        attributes: ask only about these; None asks about all.
        variants: tell each fact in this many of a set's paraphrases; None tells it in all.
        held_out: share of the first set's questions never trained on (other sets tell their facts).
        batch_size: dialogues in a batch, over all devices.
        mask: loss on what the assistant says (assistant) or on every token (all).
        layout: bucketed (rows of like length), rows, or packed (several dialogues in a row).
        seq_len: tokens in a row of layout packed; None is 256, or the longest dialogue if longer.
        window: batches among which bucketed sorts dialogues by length.
        prefer_unknown: share of each batch drawn by the model's latest loss on each dialogue, 0 for none;
            on one device, with num_workers 0.
        tokenizer: byte, the path of a tokenizer.json, or a run's folder or a checkpoint whose tokenizer it
            is; None takes that of model.init_from, else byte. Of a pretrained model, dialogues are written
            as its chat template has them.
        system: with a chat template, what the system says first ("" for nothing); None for what the template
            says by itself.
        unseen_people: people whose names training never has, for validation; None is 512, or none
            where no names are left.
        n_val_questions: questions in validation.
        val_split: validate on known, unseen or held_out questions; None takes held_out ones if
            there are any, else unseen people in_tool (the rule) and known ones in_weight.
        tools: what the model may ask, as ``class_path`` and ``init_args`` each (``toolmem.tools.SqlTool``
            or your own); None is the database and the calculator. Training, evaluation and generation
            open the same.
        num_workers: processes that make batches; making them here is fast enough for most.

    Raises:
        ToolmemError: for options that do not go together.
    """

    def __init__(
        self,
        people: int | str = 1000,
        setting: Setting = "in_weight",
        templates: str | list[str] | None = None,
        query: QueryLanguage = "short",
        seed: int = 0,
        alpha: float = 1.0,
        relations: bool = False,
        attributes: list[str] | None = None,
        variants: int | None = None,
        held_out: float = 0.0,
        batch_size: int = 128,
        mask: Mask = "assistant",
        layout: Layout = "bucketed",
        seq_len: int | None = None,
        window: int = 32,
        prefer_unknown: float = 0.0,
        tokenizer: str | None = None,
        system: str | None = None,
        unseen_people: int | None = None,
        n_val_questions: int = 512,
        val_split: QuestionSplit | None = None,
        tools: list[dict[str, Any]] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= held_out < 1:
            raise ToolmemError(
                f"data.init_args.held_out is {held_out}, but it is a share from 0 to below 1"
            )
        if val_split == "held_out" and held_out == 0:
            raise ToolmemError(
                "data.init_args.val_split is held_out, but data.init_args.held_out is 0: nothing is"
            )
        if batch_size < 1 or n_val_questions < 1:
            raise ToolmemError(
                "data.init_args.batch_size and data.init_args.n_val_questions must be at least 1"
            )
        check_share(prefer_unknown, num_workers)
        self.people = people
        self.setting = setting
        self.query: QueryLanguage = query
        self.seed = seed
        self.alpha = alpha
        self.with_relations = relations
        self.attributes = attributes
        self.variants = variants
        self.held_out = held_out
        self.batch_size = batch_size
        self.mask: Mask = mask
        self.layout: Layout = layout
        self.row_len = seq_len
        self.window = window
        self.prefer_unknown = prefer_unknown
        self.unseen_people = unseen_people
        self.n_val_questions = n_val_questions
        self.val_split = val_split
        self.tools = tools
        self.num_workers = num_workers
        self.tokenizer: Tokenizer = make_tokenizer(tokenizer)
        if system is not None:
            self.tokenizer = with_system(self.tokenizer, system)
        try:
            turn_format(self.tokenizer)
        except ToolmemError as error:
            raise ToolmemError(f"data.init_args.tokenizer: {error}") from error
        names = [templates] if isinstance(templates, str) else templates or [setting]
        self.template_sets = [TemplateSet.load(name, query, setting=setting) for name in names]
        self._check_setting()

    def _check_setting(self) -> None:
        for templates in self.template_sets:
            if self.setting == "in_weight" and templates.uses_tool:
                raise ToolmemError(
                    f"data.init_args.templates: in {templates.name} the database speaks, but "
                    "data.init_args.setting is in_weight: set it to in_tool, or take templates "
                    "without a database"
                )
        if self.setting == "in_tool" and not any(t.uses_tool for t in self.template_sets):
            raise ToolmemError(
                f"data.init_args.setting is in_tool, but in {self.template_sets[0].name} the database never "
                "speaks: set it to in_weight, or take templates with a database"
            )

    # -- what there is

    @property
    def vocab_size(self) -> int:
        """Token ids there are."""
        return self.tokenizer.vocab_size

    @property
    def seq_len(self) -> int:
        """Tokens of the longest row that can come."""
        tables = [self.table] if self.unseen_table is None else [self.table, self.unseen_table]
        longest = max(table.longest for table in tables) - 1
        if self.layout != "packed":
            return longest
        return max(self.row_len or max(256, longest), longest)

    @cached_property
    def population(self) -> Population:
        """The people trained on."""
        if isinstance(self.people, str) and not self.people.isdigit():
            return load_population(self.people)
        return make_population(
            int(self.people), seed=self.seed, alpha=self.alpha, relations=self.with_relations
        )

    @cached_property
    def unseen_population(self) -> Population | None:
        """People whose first and last names nobody in training has."""
        if self.unseen_people == 0:
            return None
        try:
            return unseen_population(
                self.unseen_people or DEFAULT_UNSEEN, training=self.population, seed=self.seed
            )
        except ToolmemError:
            if self.unseen_people is not None:
                raise
            return None  # all names are taken: nobody asked for unseen people by number

    def _ask(self, templates: TemplateSet, population: Population) -> QuestionTable:
        return templates.questions(
            population, attributes=self.attributes, variants=self.variants, seed=self.seed
        )

    @cached_property
    def question_table(self) -> QuestionTable:
        """The first template set's questions about the people trained on."""
        return self._ask(self.template_sets[0], self.population)

    @cached_property
    def unseen_questions(self) -> QuestionTable | None:
        """The same about unseen people."""
        if self.unseen_population is None:
            return None
        return self._ask(self.template_sets[0], self.unseen_population)

    @cached_property
    def _question_tables(self) -> list[QuestionTable]:
        """What each template set asks about the people trained on."""
        others = [self._ask(templates, self.population) for templates in self.template_sets[1:]]
        return [self.question_table, *others]

    @cached_property
    def table(self) -> TokenTable:
        """All dialogues of all template sets about the people trained on, the first set's first."""
        built = [TokenTable.build(table, self.tokenizer) for table in self._question_tables]
        return TokenTable.concatenate(built)

    @cached_property
    def unseen_table(self) -> TokenTable | None:
        """The first set's dialogues about unseen people."""
        if self.unseen_questions is None:
            return None
        return TokenTable.build(self.unseen_questions, self.tokenizer)

    @cached_property
    def _held_out_rows(self) -> np.ndarray:
        """(questions,) bool: which of the first set's are held out, a fact in all variants."""
        questions = self.question_table
        attributes = list(questions.attributes)
        asked = np.array([attributes.index(block.attribute) for block in questions.blocks])
        facts = questions.person_index * len(attributes) + asked[questions.template_index]
        distinct = np.unique(facts)
        n = round(self.held_out * len(distinct))
        chosen = np.random.default_rng([self.seed, len(distinct)]).permutation(distinct)[:n]
        return np.isin(facts, chosen)

    def _rows_of(self, split: QuestionSplit, n: int) -> np.ndarray:
        """Numbers of ``n`` questions of a split, in its own table, chosen once and for all."""
        if split == "unseen":
            questions = self.unseen_questions
            return np.empty(0, np.int64) if questions is None else questions.sample(n, self.seed)
        everything = self.question_table.sample(len(self.question_table), self.seed)
        return everything[self._held_out_rows[everything] == (split == "held_out")][:n]

    def questions(self, split: QuestionSplit = "known", n: int = 512) -> list[Dialogue]:
        """A fixed sample of questions with the dialogues expected.

        Args:
            split: about people (facts) trained on, people never seen, or facts held out.
            n: how many; fewer when there are fewer.
        """
        table = self.unseen_questions if split == "unseen" else self.question_table
        rows = self._rows_of(split, n)
        return [] if table is None else list(table.dialogues(rows))

    def write_factbase(self, path: str | Path) -> str:
        """Write the people, unseen ones too, as a DuckDB file; return its fingerprint."""
        from toolmem.data.factbase import build_factbase

        return build_factbase(self.population, path, unseen=self.unseen_population)

    def checkpoint_info(self) -> dict[str, Any]:
        """Plain data that a checkpoint keeps: tokenizer, facts, setting, templates."""
        population = self.population
        return {
            "tokenizer": self.tokenizer.spec(),
            "factbase": {
                "fingerprint": self._fingerprint,
                "people": len(population),
                "kind": population.kind,
                "seed": population.seed,
                "alpha": population.alpha,
                "relations": population.relations,
                "source": population.source,
            },
            "setting": self.setting,
            "tools": self.tools,
            "templates": [templates.spec() for templates in self.template_sets],
        }

    @cached_property
    def _fingerprint(self) -> str:
        return self.population.fingerprint()

    # -- batches

    def setup(self, stage: str | None = None) -> None:
        """Make the people and tokenise what is said about them."""
        _ = self.table

    def signature(self) -> dict[str, Any]:
        """What decides which batch is the n-th."""
        return {
            "people": self._fingerprint,
            "templates": [templates.spec()["digest"] for templates in self.template_sets],
            "tokenizer": self.vocab_size,
            "seed": self.seed,
            "attributes": self.attributes,
            "variants": self.variants,
            "held_out": self.held_out,
            "batch_size": self.batch_size,
            "mask": self.mask,
            "layout": self.layout,
            "window": self.window,
            "prefer_unknown": self.prefer_unknown or None,
        }

    def state_dict(self) -> dict[str, Any]:
        """Plain data from which training goes on after the last batch consumed."""
        state = super().state_dict()
        if self.prefer_unknown:
            state["latest_losses"] = self._latest_losses.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next `train_dataloader` begin where ``state_dict`` was taken."""
        super().load_state_dict(state_dict)
        if self.prefer_unknown and "latest_losses" in state_dict:
            self._latest_losses.load_state_dict(state_dict["latest_losses"])

    @cached_property
    def _latest_losses(self) -> LatestLosses:
        return LatestLosses(len(self.table))

    def learned(self, batch: Batch, losses: Tensor) -> None:
        """Training tells the losses of a batch that names its dialogues.

        Args:
            batch: from the latest `train_dataloader`.
            losses: (dialogues,) the summed loss of each in nats, on any device.
        """
        assert batch.dialogues is not None
        self._latest_losses.report(batch.state["batch"] - 1, batch.dialogues, losses)

    def _generator(
        self, table: TokenTable, rows: np.ndarray | None, training: bool
    ) -> DialogTokenGenerator:
        rank, world = self.rank_and_world
        options: dict[str, Any] = {
            "mask": self.mask,
            "layout": self.layout,
            "seq_len": self.seq_len if self.layout == "packed" else None,
            "rows": rows,
            "window": self.window,
            "shuffle": training,
            "with_spans": self.model_looks_both_ways,
            "seed": self.seed,
            "rank": rank,
            "world_size": world,
        }
        if training and self.prefer_unknown:
            share, latest = self.prefer_unknown, self._latest_losses
            return UnknownFirst(table, self.batch_size, share=share, latest=latest, **options)
        return DialogTokenGenerator(table, self.batch_size, **options)

    def train_dataloader(self) -> Any:
        """The endless training stream, from where a loaded state says."""
        rows = None
        if self.held_out:
            keep = np.ones(len(self.table), bool)
            keep[: len(self._held_out_rows)] = ~self._held_out_rows
            rows = np.flatnonzero(keep)
        generator = self._generator(self.table, rows, training=True)
        state = self.resume_state()
        if state is not None:
            generator.load_state_dict(state)
        self._stream = generator
        return make_loader(generator, self.num_workers)

    def dialogues(self, batch: Batch) -> list[Dialogue]:
        """What a batch of the training stream tells: this process's dialogues, in the batch's order.

        Args:
            batch: from the latest `train_dataloader`.
        """
        stream = self._stream
        if batch.dialogues is not None:
            chosen = batch.dialogues.numpy()
        else:
            chosen = stream.share(stream.dialogues_at(batch.state["batch"] - 1))
        ends = np.cumsum([len(table) for table in self._question_tables])
        numbers = np.searchsorted(ends, chosen, side="right")  # the set of each
        starts = ends - np.diff(ends, prepend=0)
        return [
            self._question_tables[number].assembled(int(row - starts[number]))
            for number, row in zip(numbers, chosen, strict=True)
        ]

    def val_dataloader(self) -> Any:
        """A fixed sample of questions, in order of length."""
        split = self.val_split
        if split is None:
            split = "unseen" if self.setting == "in_tool" and self.unseen_table else "known"
            split = "held_out" if self.held_out else split
        table = self.unseen_table if split == "unseen" else self.table
        if table is None:
            raise ToolmemError(
                "data.init_args.val_split is unseen, but there are no unseen people: raise "
                "data.init_args.unseen_people, or validate on known ones"
            )
        rows = self._rows_of(split, self.n_val_questions)
        rows = rows[np.argsort(table.lengths[rows], kind="stable")]
        generator = self._generator(table, rows, training=False)
        return HeldOut(generator, generator.batches_per_epoch)
