"""What a template says: fields checked, turns as segments (fast) or rendered by Jinja (slow)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from jinja2 import Template as JinjaTemplate
from jinja2 import TemplateError, meta, nodes

from toolmem.data import queries
from toolmem.data.queries import QueryLanguage
from toolmem.data.template_files import Template, TurnSource, environment
from toolmem.errors import ToolmemError


@dataclass(frozen=True)
class Field:
    """A place in a turn that says something else for every question.

    Args:
        key: which of the block's columns is said here.
    """

    key: str


@dataclass(frozen=True)
class TurnSegments:
    """One turn of a template, as what stays and what changes.

    Args:
        role: ``user``, ``assistant`` or ``database``.
        segments: literal text and fields in order.
    """

    role: str
    segments: tuple[str | Field, ...]


class UnknownFieldError(ToolmemError):
    """A template names a field that the population does not have."""


def check_fields(
    template: Template, columns: set[str], people: Mapping[str, set[str]], helpers: set[str]
) -> None:
    """Refuse a template that names a field that there is not.

    Args:
        template: what to check.
        columns: the person's own fields.
        people: other people's names in the template -> their fields.
        helpers: functions a template can call.

    Raises:
        UnknownFieldError: naming file, line and field.
    """
    constants = dict(template.constants)
    known = columns | people.keys() | helpers | constants.keys() | environment().globals.keys()
    for turn in template.turns:
        tree = environment().parse(turn.text)
        unknown = meta.find_undeclared_variables(tree) - known
        for node in tree.find_all(nodes.Name):
            if node.name in unknown:
                _refuse(template, turn, node, node.name, columns | people.keys())
        owners = {id(access.node) for access in tree.find_all(nodes.Getattr)}
        for node in tree.find_all(nodes.Name):
            if node.name in people and id(node) not in owners:
                fields = {f"{node.name}.{field}" for field in people[node.name]}
                _refuse(template, turn, node, node.name, fields)
        for access in tree.find_all(nodes.Getattr):
            owner = access.node
            if isinstance(owner, nodes.Name) and access.attr not in people.get(
                owner.name, {access.attr}
            ):
                fields = people[owner.name]
                _refuse(template, turn, access, f"{owner.name}.{access.attr}", fields)
        for call in tree.find_all(nodes.Call):
            _check_query(template, turn, call, columns, constants)


def _check_query(
    template: Template,
    turn: TurnSource,
    call: nodes.Call,
    columns: set[str],
    constants: dict[str, str],
) -> None:
    """A query must ask for a column that the table has."""
    if not isinstance(call.node, nodes.Name):
        return
    asked: list[str] = []
    if call.node.name == "query" and call.args and isinstance(call.args[0], nodes.Const):
        asked = [str(call.args[0].value)]
    elif call.node.name == "query_name":
        asked = [argument.key for argument in call.kwargs]
    for attribute in asked:
        if attribute not in columns or attribute == "birth_year":
            _refuse(template, turn, call, attribute, columns)


def _refuse(
    template: Template, turn: TurnSource, node: nodes.Node, field: str, fields: set[str]
) -> None:
    raise UnknownFieldError(
        f"templates: {template.where(turn, node.lineno)}: there is no field '{field}'; there are "
        f"{', '.join(sorted(fields))}"
    )


def turn_segments(
    template: Template, turn: TurnSource, language: QueryLanguage
) -> TurnSegments | None:
    """A turn as literals and fields, or None when it uses more of Jinja than that."""
    constants = dict(template.constants)
    segments: list[str | Field] = []
    for statement in environment().parse(turn.text).body:
        if not isinstance(statement, nodes.Output):
            return None
        for node in statement.nodes:
            found = _node_segments(node, constants, language)
            if found is None:
                return None
            segments += found
    return TurnSegments(turn.role, _merged(segments))


def _merged(segments: list[str | Field]) -> tuple[str | Field, ...]:
    """Neighbouring literals joined, empty ones dropped."""
    merged: list[str | Field] = []
    for segment in segments:
        if isinstance(segment, str) and merged and isinstance(merged[-1], str):
            merged[-1] += segment
        elif segment != "":
            merged.append(segment)
    return tuple(merged)


def _field(node: nodes.Node, constants: dict[str, str]) -> str | Field | None:
    if isinstance(node, nodes.Const):
        return str(node.value)
    if isinstance(node, nodes.Name):
        if node.name == "value" and "value" in constants:
            return Field(constants["value"])
        return constants.get(node.name, Field(node.name))
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return Field(f"{node.node.name}.{node.attr}")
    return None


def _node_segments(
    node: nodes.Node, constants: dict[str, str], language: QueryLanguage
) -> list[str | Field] | None:
    if isinstance(node, nodes.TemplateData):
        return [node.data]
    if not isinstance(node, nodes.Call):
        field = _field(node, constants)
        return None if field is None else [field]
    if not isinstance(node.node, nodes.Name) or node.dyn_args or node.dyn_kwargs:
        return None
    if node.node.name == "query" and len(node.args) == 2 and not node.kwargs:
        attribute, name = (_field(argument, constants) for argument in node.args)
        if not isinstance(attribute, str) or not isinstance(name, Field):
            return None
        return _around(queries.find(language, attribute, "\0"), [name], language == "sql")
    if node.node.name == "query_name" and node.kwargs and not node.args:
        fields = [_field(argument.value, constants) for argument in node.kwargs]
        if not all(isinstance(field, Field) for field in fields):
            return None
        text = queries.find_name({argument.key: "\0" for argument in node.kwargs})
        return _around(text, [field for field in fields if isinstance(field, Field)], True)
    return None


def _around(text: str, fields: list[Field], quoted: bool) -> list[str | Field]:
    """``text`` with each NUL in it replaced by a field."""
    literals = text.split("\0")
    segments: list[str | Field] = [literals[0]]
    for field, literal in zip(fields, literals[1:], strict=True):
        segments += [Field(f"{field.key}|sql") if quoted else field, literal]
    return segments


@cache
def compiled(source: str) -> JinjaTemplate:
    """A turn's source, compiled once."""
    return environment().from_string(source)


def render_turn(template: Template, turn: TurnSource, context: dict[str, Any]) -> str:
    """A turn's text for one question.

    Raises:
        ToolmemError: naming file and line, when Jinja cannot fill it in.
    """
    try:
        return compiled(turn.text).render(context)
    except (TemplateError, ArithmeticError, TypeError, ValueError, LookupError) as error:
        raise ToolmemError(f"templates: {template.where(turn)}: {error}") from error


def helper_functions(language: QueryLanguage) -> dict[str, Callable[..., str]]:
    """What a template can call: ``query(attribute, name)`` and ``query_name(column=value, …)``."""

    def query(attribute: str, name: str) -> str:
        return queries.find(language, attribute, name)

    def query_name(**values: str) -> str:
        return queries.find_name(values)

    return {"query": query, "query_name": query_name}
