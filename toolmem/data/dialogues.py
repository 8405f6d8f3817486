"""Facts told as dialogues: template set + population = questions; a question = one dialogue.

A template set is a folder of Jinja files (``template_files.py`` says how one is written). With a
population it gives a `QuestionTable`: every dialogue that the set can tell, addressed by number,
whatever its shape (one person and one attribute, two hops, two calls). Everything downstream
(tokenising all of them, sampling some) treats all sets alike:

    templates = TemplateSet.load("in_tool", query="short")     # a built-in set, or your own folder
    questions = templates.questions(population)
    len(questions)                      # number of dialogues
    questions.dialogue(17)              # slow and obvious: Jinja renders the template's turns
    questions.sample(100, seed=0)       # (100,) int64 numbers of distinct questions

The fast path never renders. The table is a sequence of blocks, one per template; question ``i`` is
question ``q = i - block.start`` of its block:

    for block in questions.blocks:
        for turn in block.turns:                    # tuple[TurnSegments, ...]
            for segment in turn.segments:           # each a str or a Field
                if isinstance(segment, str):        # the same text for every question of the block
                    ...
                else:                               # a text of its own for every question
                    column = block.columns[segment.key]     # Column(key, values, index)
                    column.values[column.index[q]]          # what question q says here

Within one table equal ``Column.key`` means the same ``values`` list, so it is encoded once and then
gathered by ``index``. Concatenating a turn's segments gives exactly the text that Jinja renders (a
test holds this for every built-in set). A template that uses more of Jinja than plain fields and
``query(...)`` is rendered when the table is built, and appears as turns of one `Field` each:
nothing downstream needs to know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolmem.data.cast import Column, Facts, choose_variants
from toolmem.data.people import Population
from toolmem.data.queries import LANGUAGES, QueryLanguage
from toolmem.data.questions import (
    Block,
    Dialogue,
    QuestionTable,
    Turn,
)
from toolmem.data.template_fields import Field, TurnSegments, UnknownFieldError
from toolmem.data.template_files import Template, read_template_file
from toolmem.errors import ToolmemError

__all__ = [
    "Block",
    "Column",
    "Dialogue",
    "Field",
    "QuestionTable",
    "TemplateSet",
    "Turn",
    "TurnSegments",
    "builtin_sets",
]

BUILTIN = Path(__file__).parent / "templates"
SETTINGS = ("in_weight", "in_tool")
DEFAULT = "default"


def builtin_sets() -> tuple[str, ...]:
    """Names of the sets that come with toolmem."""
    folders = {path.parent for path in BUILTIN.rglob("*.jinja")}
    return tuple(sorted(folder.relative_to(BUILTIN).as_posix() for folder in folders))


@dataclass(frozen=True)
class TemplateSet:
    """A folder of templates.

    Args:
        name: a built-in set's name, or the folder as the user gave it.
        query: the language that queries are written in.
        templates: all variants of all files, but for ``default.jinja``.
        defaults: the variants of ``default.jinja``.
        builtin: a built-in set; it leaves out what a table has no columns for.
    """

    name: str
    query: QueryLanguage
    templates: tuple[Template, ...]
    defaults: tuple[Template, ...]
    builtin: bool

    @classmethod
    def load(
        cls, name: str | Path, query: QueryLanguage = "short", *, setting: str | None = None
    ) -> TemplateSet:
        """Read a set.

        Args:
            name: a built-in set (``in_tool``, ``biographies``, …), or a folder of ``.jinja`` files.
            query: ``short`` or ``sql``.
            setting: ``in_weight`` or ``in_tool``: which subfolder to take of a set that has both.

        Raises:
            ToolmemError: no such set, or a file that is not a template (naming file and line).
        """
        if query not in LANGUAGES:
            raise ToolmemError(
                f"query: {query!r} is no query language; use {' or '.join(LANGUAGES)}"
            )
        folder = BUILTIN / name
        builtin = str(name) not in ("", ".") and not Path(name).is_absolute() and folder.is_dir()
        if not builtin:
            folder = Path(name)
        if not folder.is_dir():
            raise ToolmemError(
                f"templates: there is no folder {name}; give one, or a built-in set: "
                f"{', '.join(builtin_sets())}"
            )
        if not any(folder.glob("*.jinja")):
            both = [part for part in SETTINGS if any((folder / part).glob("*.jinja"))]
            if setting not in both:
                raise ToolmemError(
                    f"templates: no .jinja files in {name}"
                    + (
                        f"; it has {' and '.join(f'{name}/{part}' for part in both)}"
                        if both
                        else ""
                    )
                    + "; a template is named after what it asks: birth_date.jinja"
                )
            folder, name = folder / str(setting), f"{name}/{setting}"
        files = sorted(folder.glob("*.jinja"), key=_file_order)
        return cls._numbered(str(name), query, files, builtin)

    @classmethod
    def _numbered(
        cls, name: str, query: QueryLanguage, files: Iterable[Path], builtin: bool
    ) -> TemplateSet:
        counts: dict[str, int] = {}
        templates = []
        for path in files:
            for template in read_template_file(path):
                variant = counts.get(template.name, 0)
                counts[template.name] = variant + 1
                templates.append(replace(template, variant=variant))
        return cls(
            name,
            query,
            tuple(template for template in templates if template.name != DEFAULT),
            tuple(template for template in templates if template.name == DEFAULT),
            builtin,
        )

    @cached_property
    def uses_tool(self) -> bool:
        """True when the database speaks in some template: a tool is needed to answer."""
        return any(template.uses_tool for template in (*self.templates, *self.defaults))

    def spec(self) -> dict[str, Any]:
        """What a checkpoint keeps of the set: name, query language and a digest of its texts."""
        digest = hashlib.sha256()
        for template in (*self.templates, *self.defaults):
            for turn in template.turns:
                digest.update(f"{template.name}\x1f{turn.role}\x1f{turn.text}\x1e".encode())
        return {"name": self.name, "query": self.query, "digest": digest.hexdigest()}

    def questions(
        self,
        population: Population,
        *,
        attributes: Iterable[str] | None = None,
        variants: int | None = None,
        seed: int = 0,
    ) -> QuestionTable:
        """Every dialogue that the set tells about a population.

        Args:
            population: the people.
            attributes: ask only these questions (a template's name); None asks all.
            variants: tell each person each question in this many of its variants, chosen at random
                (knowledge augmentation: arXiv 2309.14316 calls it multiplicity); None tells all.
            seed: of that choice.

        Raises:
            ToolmemError: a field that the population does not have (naming file and line), or no
                question at all.
        """
        if variants is not None and variants < 1:
            raise ToolmemError(f"variants: {variants} leaves nothing to say; use 1 or more")
        facts = Facts(population)
        chosen = self._fitting(facts)
        if attributes is not None:
            wanted = list(attributes)
            names = {template.name for template in chosen}
            if missing := [attribute for attribute in wanted if attribute not in names]:
                raise ToolmemError(
                    f"attributes: the set {self.name} does not ask for {', '.join(missing)}; it "
                    f"asks for {', '.join(sorted(names))}"
                )
            chosen = [template for template in chosen if template.name in wanted]
        groups: dict[str, int] = {}
        for template in chosen:
            groups[template.name] = groups.get(template.name, 0) + 1
        blocks = []
        for template in chosen:
            keep = None
            total = groups[template.name]
            if variants is not None and variants < total:
                people = facts.cast(template).rows[""]
                keep = choose_variants(
                    people, template.variant, total, variants, seed, template.name
                )
            blocks.append(Block(template, facts, self.query, keep))
        table = QuestionTable(population, blocks)
        if not len(table):
            raise ToolmemError(
                f"templates: the set {self.name} finds nobody to ask about among "
                f"{len(population)} people; use more people or another set"
            )
        return table

    def _fitting(self, facts: Facts) -> list[Template]:
        """The templates that fit a population's columns, columns in order, then other questions."""
        chosen: list[Template] = []
        refused: ToolmemError | None = None
        for template in self.templates:
            try:
                facts.check(template)
            except UnknownFieldError as error:
                # A set of one's own must fit; a built-in one serves any table as far as it can.
                if not self.builtin:
                    raise
                refused = refused or error
            else:
                chosen.append(template)
        asked = {template.name for template in chosen}
        for attribute in facts.population.attributes:
            if attribute not in asked:
                chosen += [template.bind(attribute) for template in self.defaults]
        if not chosen:
            raise refused or ToolmemError(
                f"templates: the set {self.name} asks for none of the columns "
                f"{', '.join(facts.population.attributes)}"
            )
        order = {attribute: row for row, attribute in enumerate(facts.population.attributes)}
        return sorted(chosen, key=lambda template: order.get(template.name, len(order)))

    def render(
        self,
        population: Population,
        indices: Iterable[int] | None = None,
        attributes: Iterable[str] | None = None,
    ) -> Iterator[Dialogue]:
        """Dialogues rendered one by one by Jinja: slow and obvious.

        Args:
            population: the people.
            indices: rows of the people to ask about; None is everybody.
            attributes: the questions to ask; None is all.
        """
        table = self.questions(population, attributes=attributes)
        wanted = None if indices is None else set(indices)
        for index, person in enumerate(table.person_index.tolist()):
            if wanted is None or person in wanted:
                yield table.dialogue(index)


def _file_order(path: Path) -> tuple[str, int]:
    name, _, number = path.stem.partition(".")
    return name, int(number) if number.isdigit() else 0
