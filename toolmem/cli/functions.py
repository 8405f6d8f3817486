"""A function's signature and docstring are its command line."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_type_hints

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

    doc = parse_docstring(inspect.getdoc(function) or "")
    parser = ArgumentParser(
        prog=prog,
        description=doc.short_description,
        epilog=f"example: {example}" if example else None,
        exit_on_error=False,
    )
    hints = get_type_hints(function)
    parameters = inspect.signature(function).parameters
    texts = {entry.arg_name: entry.description for entry in doc.params}
    for name in positional:
        optional = parameters[name].default is not inspect.Parameter.empty
        extra: dict[str, Any] = (
            {"nargs": "?", "default": parameters[name].default} if optional else {}
        )
        parser.add_argument(name, type=hints[name], help=texts.get(name), **extra)
    parser.add_function_arguments(function, skip=set(positional), as_positional=False)
    try:
        config = parser.parse_args(list(argv))
    except ArgumentError as error:
        raise ToolmemError(f"{plain(error)}\n`{prog} --help` shows the options") from error
    values = parser.instantiate_classes(config).as_dict()
    values.pop("config", None)
    return function(**values)


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


def plain(error: BaseException) -> str:
    """A jsonargparse error as one plain message, without the repeats of its nested causes."""
    return str(error).strip()


@contextlib.contextmanager
def quiet() -> Any:
    """Swallow what a library prints on its own."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
