"""A function's signature and docstring are its command line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
import io
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args, get_origin, get_type_hints

from toolmem.class_path import TRUSTED, allowed_packages, refusal
from toolmem.errors import ToolmemError


def call(
    function: Callable[..., Any],
    argv: Sequence[str],
    *,
    prog: str,
    positional: Sequence[str] = (),
    example: str = "",
) -> Any:
    """Parse ``argv`` by a function's signature and call it.

    Args:
        function: its parameters become options, their docstring lines the help.
        argv: the words after the command.
        prog: the command as the user typed it, for usage and messages.
        positional: parameters that are given by place instead of by ``--name``.
        example: one line shown under the help.

    Raises:
        ToolmemError: when the words do not fit the signature.
    """
    from docstring_parser import parse as parse_docstring
    from jsonargparse import ArgumentError, ArgumentParser

    limit_imports()
    doc = parse_docstring(inspect.getdoc(function) or "")
    parser = ArgumentParser(
        prog=prog,
        description=doc.short_description,
        epilog=f"example: {example}" if example else None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    texts = {entry.arg_name: entry.description for entry in doc.params}
    for name in positional:
        optional = parameters[name].default is not inspect.Parameter.empty
        extra: dict[str, Any] = (
            {"nargs": "?", "default": parameters[name].default} if optional else {}
        )
        kind = hints[name]
        if get_origin(kind) is list:  # several words: `train a.txt b.txt`
            kind, extra = get_args(kind)[0], {"nargs": "*" if optional else "+"}
        parser.add_argument(name, type=kind, help=texts.get(name), **extra)
    parser.add_function_arguments(function, skip=set(positional), as_positional=False)
    try:
        config = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ToolmemError(f"{plain(error)}\n`{prog} --help` shows the options") from error
    values = parser.instantiate_classes(config).as_dict()
    return function(**{name: values[name] for name in parameters})


def limit_imports() -> None:
    """Have jsonargparse import only what `toolmem.class_path` trusts, and read YAML of bounded size.

    Its settings are the process's: what was allowed before, and is not any more, is refused again.
    """
    from jsonargparse import set_parsing_settings

    from toolmem.recipe_files import use_bounded_yaml

    use_bounded_yaml()
    allowed = {*TRUSTED, *allowed_packages()}
    set_parsing_settings(
        import_path_denylist=["*", *sorted(_allowed_before - allowed)],
        import_path_allowlist=sorted(allowed),
        # a key of any type is data: a class_path in it is made by who knows what it must be
        instantiate_subclass_spec_in_any=False,
    )
    _allowed_before.update(allowed)


_allowed_before: set[str] = set()


def choose(
    functions: Mapping[str, tuple[Callable[..., Any], Sequence[str], str]],
    argv: Sequence[str],
    *,
    prog: str,
) -> Any:
    """Run one of several functions: the first word names it.

    Args:
        functions: name -> (function, its positional parameters, an example).
        argv: the words after the command.
        prog: the command as the user typed it.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} {{{','.join(functions)}}} [options]\n")
        for name, (function, _, example) in functions.items():
            summary = (inspect.getdoc(function) or "").splitlines()[0]
            print(f"  {name:<8} {summary}\n{'':11}example: {example}")
        return None
    if argv[0] not in functions:
        raise ToolmemError(
            f"unknown {prog} command {argv[0]!r}: choose from {', '.join(functions)}"
        )
    function, positional, example = functions[argv[0]]
    return call(
        function, argv[1:], prog=f"{prog} {argv[0]}", positional=positional, example=example
    )


def plain(error: BaseException, words: Sequence[str] = ()) -> str:
    """A jsonargparse error as one plain line: the key, and what is wrong with its value.

    A key that the user typed without ``init_args`` is named as it was typed.

    jsonargparse nests a line for every level it went down, and lists every type of a union that the
    value failed to be; what helps is the whole key and the innermost reason.
    """
    text = str(error).strip()
    if denied := DENIED.search(text):  # whatever else the value might have been
        keys = KEY_ANYWHERE.findall(text)
        return _as_typed(f"{keys[0] if keys else 'a value'}: {refusal(denied['path'])}", words)
    reasons = dict.fromkeys(_reasons(text.splitlines(), ""))
    return "; ".join(_as_typed(reason, words) for reason in reasons)


def _as_typed(reason: str, words: Sequence[str]) -> str:
    key, colon, rest = reason.partition(": ")
    short = key.replace("init_args.", "")
    typed = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    return f"{short}: {rest}" if colon and short in typed else reason


KEY_ANYWHERE = re.compile(r"""Parser key "([^"]*)":""")
KEY = re.compile(r"""Parser key "(?P<key>.*)":$""")
CLASS = re.compile(r"Problem with given class_path '(?P<path>.*)':$")
EXPECTED = re.compile(r"Expected a (?P<type>.*?)(?:\. Got value: (?P<value>.*))?$", re.DOTALL)
NO_OPTION = re.compile(r"(?:Option|Key) '(?P<key>.*)' is not (?:accepted|expected).*")
DENIED = re.compile(r"Importing '(?P<path>[\w.]+)' is not allowed, denied by the ")
NO_CLASS = re.compile(r"module '(?P<module>[\w.]+)' has no attribute '(?P<name>\w+)'$")


def _reasons(lines: list[str], key: str) -> list[str]:
    """The innermost reasons of a nested message, each with its whole key."""
    first, rest = lines[0], _dedent(lines[1:])
    if rest and (match := KEY.match(first)):
        return _reasons(rest, _join(key, match["key"]))
    if rest and (match := CLASS.match(first)):
        missing = NO_CLASS.match(rest[0])
        if missing:
            return [f"{_join(key, 'class_path')}: {_no_such_class(missing)}"]
        return _reasons(rest, _join(key, "init_args"))
    if first.startswith("Does not validate against any of the Union subtypes"):
        return _union(lines, key)
    if match := NO_OPTION.match(first):
        return [f"{_join(key, match['key'])}: there is no such key"]
    if match := EXPECTED.match("\n".join(lines)):
        got = "" if match["value"] is None else f", not {match['value']}"
        return [f"{key}: expected {_type_name(match['type'])}{got}".removeprefix(": ")]
    text = "\n".join(line.rstrip() for line in lines)
    return [f"{key}: {text}" if key and not text.startswith(key) else text]


def _union(lines: list[str], key: str) -> list[str]:
    """Of the types that a value could have been, the reason of the one it was meant for."""
    begin = next((i for i, line in enumerate(lines) if line.strip() == "Errors:"), 0)
    end = next((i for i, line in enumerate(lines) if line.startswith("Given value type:")), None)
    value = next((line for line in lines if line.startswith("Given value: ")), "")
    items: list[list[str]] = []
    for line in lines[begin + 1 : end]:
        if line.startswith("  - "):
            items.append([line[4:]])
        elif items:
            items[-1].append(line[4:])
    deeper = [item for item in items if not EXPECTED.match(item[0])]
    if deeper:
        return [reason for item in deeper for reason in _reasons(item, key)]
    types = [match["type"] for item in items if (match := EXPECTED.match(item[0]))]
    wanted = " or ".join(dict.fromkeys(_type_name(name) for name in types))
    given = value.removeprefix("Given value: ")[:200]
    return [f"{key}: expected {wanted}, not {given}".removeprefix(": ")]


def _dedent(lines: list[str]) -> list[str]:
    return textwrap.dedent("\n".join(lines)).splitlines()


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _type_name(text: str) -> str:
    if match := re.match(r"<class '(?:.*\.)?(\w+)'>", text):
        return {"NoneType": "null"}.get(match[1], match[1])
    if match := re.match(r"typing\.Literal\[(.*)\]", text):
        return f"one of {match[1]}" if "," in match[1] else match[1]
    return text


def _no_such_class(match: re.Match[str]) -> str:
    names = [n for n in dir(importlib.import_module(match["module"])) if not n.startswith("_")]
    near = difflib.get_close_matches(match["name"], names, n=1)
    hint = f": did you mean {match['module']}.{near[0]}?" if near else ""
    return f"{match['module']} has no {match['name']}{hint}"


@contextlib.contextmanager
def quiet() -> Any:
    """Swallow what a library prints on its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
