"""What of Jinja a template may use: enough to say things, too little to run away with time or memory.

The sandbox keeps a template from Python's insides. What it lets through could still ask, in a dozen letters,
for a text of 10¹². So the syntax tree is held to a list: fields, a few methods and filters that make no text
longer, ``if``, and ``for`` without another inside; no multiplication, formatting, macros or assignments, and
no list but to take from it (written out and split again, it grows without bound). A turn then says at most
about the square of its own length and its fields'.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes

MAX_TURN_CHARS = 16_384


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HELPERS = frozenset(("query", "query_name"))
NODES: tuple[type[nodes.Node], ...] = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Const, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.Call, nodes.Keyword, nodes.Filter, nodes.Test, nodes.If,
    nodes.CondExpr, nodes.For, nodes.Compare, nodes.Operand, nodes.Not, nodes.And, nodes.Or, nodes.Concat,
    nodes.Add, nodes.Sub, nodes.Div, nodes.FloorDiv, nodes.Neg, nodes.Pos, nodes.Tuple, nodes.List,
)  # fmt: skip
METHODS = _words("split strip lstrip rstrip lower upper title capitalize startswith endswith")
TAKING = frozenset(("first", "last", "length", "count"))
FILTERS = TAKING | _words("upper lower title capitalize trim int abs round default d")
TESTS = _words(
    "defined undefined none string number even odd eq equalto ne lt le gt ge in true false"
)
# Names that Jinja knows of by itself.
OF_JINJA = _words("self super caller varargs kwargs range dict lipsum cycler joiner namespace")
WORDS = {
    "Mul": "*", "Pow": "**", "Mod": "%", "Assign": "set", "AssignBlock": "set", "Dict": "a mapping",
    "CallBlock": "call", "FilterBlock": "a filter block", "FromImport": "import",
}  # fmt: skip


def refused(tree: nodes.Template) -> tuple[int, str] | None:
    """The line and the name of the first thing that a template may not use; None when it is plain.

    Args:
        tree: of one turn, as Jinja parsed it.

    Raises:
        RecursionError: for a tree of some hundred levels.
    """
    return next(_refused(tree, tree, 0), None)


def _refused(node: nodes.Node, parent: nodes.Node, loops: int) -> Iterator[tuple[int, str]]:
    kind = type(node).__name__
    if not isinstance(node, NODES):
        yield node.lineno, WORDS.get(kind, kind.lower())
    elif isinstance(node, nodes.For) and (loops or node.recursive):
        yield node.lineno, "a loop within a loop"
    elif isinstance(node, nodes.Name):
        is_called = isinstance(parent, nodes.Call) and parent.node is node
        if node.name in OF_JINJA or (node.name in HELPERS and not is_called):
            yield node.lineno, f"the name {node.name}"
    elif isinstance(node, (nodes.Tuple, nodes.List)):
        if not isinstance(parent, nodes.Operand):
            yield node.lineno, "a list, but after `in`"
    elif isinstance(node, nodes.Filter) and node.name not in FILTERS:
        yield node.lineno, f"the filter {node.name}"
    elif isinstance(node, nodes.Test) and node.name not in TESTS:
        yield node.lineno, f"the test {node.name}"
    elif isinstance(node, nodes.Getattr) and node.attr.startswith("_"):
        yield node.lineno, f"the attribute {node.attr}"
    elif isinstance(node, nodes.Call):
        called = node.node
        if isinstance(called, nodes.Getattr):
            if called.attr not in METHODS:
                yield node.lineno, f"the method {called.attr}()"
            elif called.attr == "split" and not _takes(parent, node):
                yield node.lineno, "split(), but to take one of its parts or to loop over them"
        elif not isinstance(called, nodes.Name) or called.name not in HELPERS:
            yield node.lineno, f"the call of {getattr(called, 'name', 'an expression')}"
    for child in node.iter_child_nodes():
        yield from _refused(child, node, loops + isinstance(node, nodes.For))


def _takes(parent: nodes.Node, parts: nodes.Node) -> bool:
    """Does ``parent`` take one of the parts, their number, or each in turn?"""
    if isinstance(parent, nodes.Getitem):
        return parent.node is parts and not isinstance(parent.arg, nodes.Slice)
    if isinstance(parent, nodes.For):
        return parent.iter is parts
    return isinstance(parent, nodes.Filter) and parent.node is parts and parent.name in TAKING
