r"""Reading template files: turns, the fields in them, and which people a question is about.

    people: friend                                        optional directives, before the first turn
    user: Where was the friend of {{ name }} born?        a turn: who speaks, then what is said
    assistant: {{ query("friend", name) }}
    database: {{ friend.name }}
    assistant: {{ query("birth_place", friend.name) }}
    database: {{ friend.birth_place }}
    assistant: The friend of {{ name }} was born in {{ friend.birth_place }}.
    ---                                                   the next variant of the same question

A line that does not open a turn goes on with the one before. Turns are split before anything is
filled in, so no value can inject a role. Each turn is a sandboxed Jinja template, of what
`toolmem.data.template_check` lists alone.

Directives: ``people`` says whom a question is about, and so which fields there are:

| ``people:`` | a question for | fields beside the person's own |
|---|---|---|
| ``each`` (default) | every person | |
| a column of names | every person | ``COLUMN.name``, … of the person that it names |
| ``unique COLUMN, COLUMN`` | everyone whom these values single out | |
| ``older`` | pairs, the first born in an earlier year | ``other.name``, …, ``difference`` (years) |

``birth_year`` is the year in ``birth_date``. ``answer: FIELD`` is needed only where the last turn
does not plainly end with a field. ``permute: sentences`` makes a variant of every order of the last
turn's lines. A file ``default.jinja`` serves every column that has no file of its own; its fields
are ``attribute`` (the column), ``label`` (the same in words) and ``value``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path

from jinja2 import StrictUndefined, TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment

from toolmem.data.template_check import MAX_TURN_CHARS, refused
from toolmem.errors import ToolmemError

ROLES = ("user", "assistant", "database")
DIRECTIVES = ("people", "answer", "permute")
MAX_PERMUTED = 5  # lines; 120 orders
_TURN = re.compile(rf"^({'|'.join(ROLES)}):[ \t]?(.*)$")
_DIRECTIVE = re.compile(r"^([a-z_]+):[ \t]*(.*?)\s*$")


@dataclass(frozen=True)
class TurnSource:
    """One turn as written.

    Args:
        role: ``user``, ``assistant`` or ``database``.
        text: Jinja source.
        line: where in the file the turn opens, from 1.
    """

    role: str
    text: str
    line: int


@dataclass(frozen=True)
class Template:
    """One way of asking one question.

    Args:
        path: the file, for messages.
        name: the question: the file's stem up to a full stop; variants share it.
        variant: number among the variants of ``name``, from 0.
        line: where in the file this variant begins.
        turns: the turns' sources, the user's first, the assistant's last.
        people: the directive ``people``.
        answer: the directive ``answer``, or "" to take the field that the last turn ends with.
        permuted: True when made by ``permute: sentences``.
        constants: fields that are the same for every question (those of ``default.jinja``), and
            ``value``, which stands for the field that it names.
    """

    path: Path
    name: str
    variant: int
    line: int
    turns: tuple[TurnSource, ...]
    people: str = "each"
    answer: str = ""
    permuted: bool = False
    constants: tuple[tuple[str, str], ...] = ()

    @property
    def uses_tool(self) -> bool:
        """True when a turn of the database is among the turns."""
        return any(turn.role == "database" for turn in self.turns)

    def bind(self, attribute: str) -> Template:
        """A template of ``default.jinja``, for one column."""
        label = attribute.replace("_", " ")
        constants = (("attribute", attribute), ("label", label), ("value", attribute))
        return replace(self, name=attribute, constants=constants)

    def where(self, turn: TurnSource | None = None, line: int = 1) -> str:
        """File and line, for messages; ``line`` counts within the turn from 1."""
        return f"{self.path}, line {self.line if turn is None else turn.line + line - 1}"


@cache
def environment() -> SandboxedEnvironment:
    """The sandbox that every turn is parsed and rendered in."""
    return SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


def read_template_file(path: Path) -> list[Template]:
    """All variants that a file holds.

    Raises:
        ToolmemError: naming file and line, when it is not a template.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolmemError(f"templates: cannot read {path}: {error}") from error
    name, _, number = path.stem.partition(".")
    if number and not number.isdigit():
        raise ToolmemError(f"templates: {path}: name variants {name}.2.jinja, {name}.3.jinja, …")
    variants: list[Template] = []
    lines: list[tuple[int, str]] = []
    for line_number, line in [*enumerate(text.splitlines(), start=1), (0, "---")]:
        if line.rstrip() != "---":
            lines.append((line_number, line))
        elif any(content.strip() for _, content in lines):
            variants += _read_variant(path, name, lines)
            lines = []
    if not variants:
        raise ToolmemError(f"templates: {path} is empty; write turns: user: …, assistant: …")
    return variants


def _read_variant(path: Path, name: str, lines: list[tuple[int, str]]) -> list[Template]:
    directives = {"people": "each", "answer": "", "permute": ""}
    turns: list[tuple[str, int, list[str]]] = []
    for number, line in lines:
        if match := _TURN.match(line):
            turns.append((match[1], number, [match[2]]))
        elif turns:
            turns[-1][2].append(line)
        elif (match := _DIRECTIVE.match(line)) and match[1] in directives:
            directives[match[1]] = match[2]
        elif line.strip():
            raise ToolmemError(
                f"templates: {path}, line {number}: {line.strip()!r} belongs to no turn; begin it "
                f"with {', '.join(f'{role}:' for role in ROLES)} or one of "
                f"{', '.join(f'{key}:' for key in DIRECTIVES)}"
            )
    sources = tuple(
        TurnSource(role, "\n".join(text).rstrip(), number) for role, number, text in turns
    )
    template = Template(
        path,
        name,
        0,
        next(number for number, content in lines if content.strip()),
        sources,
        people=directives["people"],
        answer=directives["answer"],
    )
    _check_turns(template)
    if not directives["permute"]:
        return [template]
    if directives["permute"] != "sentences":
        raise ToolmemError(f"templates: {template.where()}: `permute:` can only be `sentences`")
    last = sources[-1]
    sentences = [line.strip() for line in last.text.splitlines() if line.strip()]
    if len(sentences) > MAX_PERMUTED:
        raise ToolmemError(
            f"templates: {template.where(last)}: {len(sentences)} sentences have too many orders; "
            f"permute at most {MAX_PERMUTED}"
        )
    return [
        replace(template, turns=(*sources[:-1], replace(last, text=" ".join(order))), permuted=True)
        for order in permutations(sentences)
    ]


def _check_turns(template: Template) -> None:
    follows = {
        "": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "database"),
        "database": ("assistant",),
    }
    before = ""
    for turn in template.turns:
        if turn.role not in follows[before]:
            expected = " or ".join(f"{role}:" for role in follows[before])
            place = f"after {before}:" if before else "at the start"
            raise ToolmemError(
                f"templates: {template.where(turn)}: {turn.role}: stands {place}, where {expected} "
                "is expected"
            )
        if not turn.text.strip():
            raise ToolmemError(f"templates: {template.where(turn)}: {turn.role}: says nothing")
        if len(turn.text) > MAX_TURN_CHARS:
            raise ToolmemError(
                f"templates: {template.where(turn)}: {turn.role}: is {len(turn.text):,} characters long; at "
                f"most {MAX_TURN_CHARS:,}"
            )
        try:
            found = refused(environment().parse(turn.text))
        except TemplateSyntaxError as error:
            where = template.where(turn, error.lineno)
            raise ToolmemError(
                f"templates: {where}: not a Jinja template: {error.message}"
            ) from error
        except RecursionError as error:
            raise ToolmemError(f"templates: {template.where(turn)}: nested too deeply") from error
        if found:
            raise ToolmemError(
                f"templates: {template.where(turn, found[0])}: a template may not use {found[1]}; fields, "
                "query(), `if`, one `for`, and methods and filters that make no text longer are all there is"
            )
        before = turn.role
    if before != "assistant":
        raise ToolmemError(f"templates: {template.where()}: the last turn must be the assistant's")
