r"""How the rows of a task's file become questions: a small YAML file a task, ``recipes/evaluation/``.

    kind: multiple_choice                  or cloze, or generation
    prompt: "{{ query }}\nAnswer:"         Jinja over the row's fields
    choices: choices                       Jinja expressions: the texts to choose from,
    gold: gold                             and the number (from 0) of the right one, or several
    delimiter: " "                         between prompt and answer
    metric: accuracy_norm                  the number to look at first

A cloze has ``continuation``, generation has ``answers`` (a text, or a list of them), ``stop`` and
``max_new_tokens``. ``prompts`` in the place of ``prompt`` gives each choice a prompt of its own, and
``continuation`` what is scored behind it (Winograd schemas). ``preamble`` stands before everything;
``n_shots`` examples, of ``shots_file`` or of the file itself, stand before each question, parted by
``separator``. A file without a recipe is known by its fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.evaluation.tasks.items import KINDS, Choice, Cloze, Item, Option, Question
from toolmem.jsonl import read_rows
from toolmem.recipe_files import read_mapping

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment

SUFFIX = ".yaml"
FORMS = (
    "multiple choice has query, choices and gold; a cloze has context and continuation; a question has "
    "context, answer and, if any, aliases"
)
NEEDED: dict[str, tuple[str, ...]] = {
    "multiple_choice": ("gold",),
    "cloze": ("prompt", "continuation"),
    "generation": ("prompt", "answers"),
}


@dataclass(frozen=True)
class TaskRecipe:
    r"""How a task asks.

    Args:
        kind: ``multiple_choice``, ``cloze`` or ``generation``.
        prompt: Jinja over a row's fields: what stands before the answer.
        choices: Jinja expression: the texts to choose from.
        gold: Jinja expression: the number of the right choice from 0, or a list of such.
        prompts: Jinja expression: a prompt for each choice, in the place of ``prompt`` and ``choices``.
        continuation: Jinja: what is scored, of a cloze, or behind each of ``prompts``.
        answers: Jinja expression: what is right, a text or a list of them.
        delimiter: between a prompt and what follows it.
        preamble: Jinja: what stands before everything.
        separator: between examples.
        n_shots: examples before each question.
        shots_file: JSONL that they are drawn from; the task's own file when None, whose rows that are
            shown are not asked.
        seed: of the draw.
        chat: ask in the model's chat format, examples as turns before.
        stop: texts that end an answer.
        max_new_tokens: of an answer.
        metric: the number to look at first; the kind's own when None.
        source: where it was read, for messages.

    Raises:
        ToolmemError: for what no task can be made of.
    """

    kind: str
    prompt: str | None = None
    choices: str | None = None
    gold: str | None = None
    prompts: str | None = None
    continuation: str | None = None
    answers: str | None = None
    delimiter: str = " "
    preamble: str = ""
    separator: str = "\n\n"
    n_shots: int = 0
    shots_file: str | None = None
    seed: int = 0
    chat: bool = False
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = 32
    metric: str | None = None
    source: str = field(default="the task's recipe", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ToolmemError(f"{self.source}: kind is {self.kind!r}: choose {', '.join(KINDS)}")
        needed = NEEDED[self.kind]
        if self.kind == "multiple_choice":
            needed += ("prompts", "continuation") if self.prompts else ("prompt", "choices")
        for key in needed:
            if getattr(self, key) is None:
                raise ToolmemError(f"{self.source}: {key} is missing, which {self.kind} needs")
        if self.n_shots < 0 or self.max_new_tokens < 1 or not all(self.stop):
            raise ToolmemError(
                f"{self.source}: n_shots must be 0 or more, max_new_tokens 1 or more, no text of stop empty"
            )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> TaskRecipe:
        """Out of plain data.

        Raises:
            ToolmemError: naming the key that is unknown, missing or of another type.
        """
        known = {one.name: one for one in fields(cls) if one.name != "source"}
        for key, value in values.items():
            if key not in known:
                raise ToolmemError(
                    f"{source}: {key}: there is no such key; choose from {', '.join(known)}"
                )
            wanted = known[key].type
            if key == "stop":
                good = isinstance(value, str) or (
                    isinstance(value, list) and all(isinstance(one, str) for one in value)
                )
            elif wanted in ("int", "bool"):
                good = type(value) is {"int": int, "bool": bool}[str(wanted)]
            else:
                good = isinstance(value, str) or (value is None and "None" in str(wanted))
            if not good:
                raise ToolmemError(f"{source}: {key}: expected {wanted}, not {value!r:.80}")
        if "kind" not in values:
            raise ToolmemError(f"{source}: kind is missing: choose {', '.join(KINDS)}")
        given = dict(values)
        if "stop" in given:
            given["stop"] = (
                (given["stop"],) if isinstance(given["stop"], str) else tuple(given["stop"])
            )
        return cls(**given, source=source)

    def asking(self, *, n_shots: int | None = None, chat: bool | None = None) -> TaskRecipe:
        """The same with other circumstances; those that are None stay."""
        return replace(
            self,
            n_shots=self.n_shots if n_shots is None else n_shots,
            chat=self.chat if chat is None else chat,
        )

    def items(self, path: str | Path) -> list[Item]:
        """The questions of a file.

        Raises:
            ToolmemError: for a file that is empty or cannot be read, naming row and field.
        """
        path = Path(path)
        found = [self.item(row, line, str(path)) for line, row in read_rows(path, "{...} rows")]
        if not found:
            raise ToolmemError(f"{path} is empty: a task needs a row of JSON a question ({FORMS})")
        return found

    def item(self, row: Mapping[str, Any], line: int, path: str) -> Item:
        """The question that a row asks.

        Args:
            row: its fields.
            line: of the file, from 1.
            path: the file, for messages.

        Raises:
            ToolmemError: naming row and field.
        """
        read = _Row(self, row, f"{path}, line {line}")
        preamble = read.text("preamble", empty=True)
        if self.kind == "cloze":
            return Cloze(line, read.text("prompt", empty=True), read.text("continuation"), preamble)
        if self.kind == "generation":
            return Question(line, read.text("prompt"), tuple(read.texts("answers")), preamble)
        if self.prompts:
            text = read.text("continuation")
            options = tuple(Option(prompt, text) for prompt in read.texts("prompts"))
        else:
            prompt = read.text("prompt", empty=True)
            options = tuple(Option(prompt, text) for text in read.texts("choices"))
        if len(options) < 2:
            raise ToolmemError(
                f"{read.where}: {len(options)} choices: a choice is between two at least"
            )
        return Choice(line, options, read.numbers("gold", len(options)), preamble)

    @cached_property
    def _environment(self) -> SandboxedEnvironment:
        from jinja2 import StrictUndefined
        from jinja2.sandbox import SandboxedEnvironment

        found = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        found.filters["remove"] = lambda text, pattern: re.sub(pattern, "", text)
        return found

    @cached_property
    def _compiled(self) -> dict[str, Callable[..., Any]]:
        """Key -> what it gives for a row's fields."""
        from jinja2 import TemplateSyntaxError

        found: dict[str, Callable[..., Any]] = {}
        for key in ("prompt", "continuation", "preamble", "choices", "gold", "prompts", "answers"):
            source = getattr(self, key)
            if source is None:
                continue
            try:
                if key in ("prompt", "continuation", "preamble"):
                    found[key] = self._environment.from_string(source).render
                else:
                    found[key] = self._environment.compile_expression(
                        source, undefined_to_none=False
                    )
            except TemplateSyntaxError as error:
                raise ToolmemError(f"{self.source}: {key}: not Jinja: {error.message}") from error
        return found


class _Row:
    """A row's fields as a recipe reads them."""

    def __init__(self, recipe: TaskRecipe, row: Mapping[str, Any], where: str) -> None:
        self.recipe = recipe
        self.row = row
        self.where = where

    def value(self, key: str) -> Any:
        from jinja2 import TemplateError, Undefined, UndefinedError
        from jinja2.runtime import StrictUndefined

        make = self.recipe._compiled.get(key)
        if make is None:
            return ""
        try:
            found = make(dict(self.row))
            if isinstance(found, Undefined | StrictUndefined):
                found._fail_with_undefined_error()
        except UndefinedError as error:
            raise ToolmemError(
                f"{self.where}: {key} ({self.recipe.source}) wants a field that the row lacks: "
                f"{error.message}; it has {', '.join(self.row) or 'none'}"
            ) from error
        except (
            TemplateError,
            TypeError,
            ValueError,
            AttributeError,
            ArithmeticError,
            LookupError,
            re.error,
        ) as error:
            raise ToolmemError(
                f"{self.where}: {key} ({self.recipe.source}) cannot be made of its fields: {error}"
            ) from error
        return found

    def text(self, key: str, empty: bool = False) -> str:
        found = self.value(key)
        if not isinstance(found, str) or not (empty or found.strip()):
            raise ToolmemError(f"{self.where}: {key} is {found!r:.80}, and must be a text")
        return found

    def texts(self, key: str) -> list[str]:
        found = self.value(key)
        if isinstance(found, str):
            found = [found] if key == "answers" else found
        if not isinstance(found, Sequence) or isinstance(found, str) or not found:
            raise ToolmemError(f"{self.where}: {key} is {found!r:.80}, and must be a list of texts")
        for number, one in enumerate(found):
            if not isinstance(one, str) or not one.strip():
                raise ToolmemError(
                    f"{self.where}: {key}[{number}] is {one!r:.80}, and must be a text that says something"
                )
        return list(dict.fromkeys(found)) if key == "answers" else list(found)

    def numbers(self, key: str, below: int) -> tuple[int, ...]:
        found = self.value(key)
        several = found if isinstance(found, list | tuple) else [found]
        numbers = []
        for one in several:
            if isinstance(one, str) and one.strip().isdigit():
                one = int(one)
            if isinstance(one, bool):
                one = int(one)
            if not isinstance(one, int) or not 0 <= one < below:
                raise ToolmemError(
                    f"{self.where}: {key} is {found!r:.80}, and must be the number of a choice, from 0 to "
                    f"{below - 1}"
                )
            numbers.append(one)
        if not numbers:
            raise ToolmemError(f"{self.where}: {key} is empty: one choice at least is right")
        return tuple(dict.fromkeys(numbers))


BY_FIELDS = (
    TaskRecipe(
        "multiple_choice",
        prompt="{{ query }}",
        choices="choices",
        gold="gold",
        source="by its fields",
    ),
    TaskRecipe(
        "cloze", prompt="{{ context }}", continuation="{{ continuation }}", source="by its fields"
    ),
    TaskRecipe(
        "generation",
        prompt="{{ context }}",
        answers="[answer] + (aliases if aliases is defined else [])",
        source="by its fields",
    ),
)
SIGNS = ({"query", "choices", "gold"}, {"context", "continuation"}, {"context", "answer"})


def recipe_by_fields(path: str | Path) -> TaskRecipe:
    """The plain recipe for a file whose first row has the fields of one of the three kinds.

    Raises:
        ToolmemError: when it has not.
    """
    path = Path(path)
    for line, row in read_rows(path, "{...} rows"):
        for signs, recipe in zip(SIGNS, BY_FIELDS, strict=True):
            if signs <= row.keys():
                return recipe
        raise ToolmemError(
            f"{path}, line {line}: its fields ({', '.join(row) or 'none'}) are of no kind of task: {FORMS}. "
            f"For other fields name a recipe, RECIPE.yaml=FILE, or one of {', '.join(recipe_names())}"
        )
    raise ToolmemError(f"{path} is empty: a task needs a row of JSON a question ({FORMS})")


def recipe_folder() -> Path:
    """Where the recipes that come with the library are: in the package, or beside it in a checkout."""
    here = Path(__file__).resolve()
    packed = here.parents[1] / "task_recipes"  # in wheels: see pyproject.toml
    return packed if packed.is_dir() else here.parents[3] / "recipes" / "evaluation"


def recipe_names() -> list[str]:
    """The recipes that come with the library."""
    return sorted(path.stem for path in recipe_folder().glob(f"*{SUFFIX}"))


def read_recipe(path: str | Path) -> TaskRecipe:
    """A recipe of a file.

    Raises:
        ToolmemError: when it is missing or is none.
    """
    return TaskRecipe.from_mapping(read_mapping(path), str(path))


def find_recipe(name: str, path: str | Path) -> TaskRecipe:
    """The recipe that a task's name means: a YAML file, one of the library's, or what its fields say.

    Args:
        name: of the task.
        path: its JSONL file.

    Raises:
        ToolmemError: when nothing fits.
    """
    if name.endswith((SUFFIX, ".yml")):
        return read_recipe(name)
    file = recipe_folder() / f"{name}{SUFFIX}"
    if re.fullmatch(r"\w+", name) and file.is_file():
        return replace(read_recipe(file), source=f"recipe {name}")
    return recipe_by_fields(path)
