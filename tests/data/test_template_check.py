"""Templates can say things, and cannot run away: what would is refused before anything is filled in."""

from __future__ import annotations

import time

import pytest

from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import make_population
from toolmem.data.template_files import environment, read_template_file
from toolmem.errors import ToolmemError

PLAIN = [
    "{{ name }}", "{{ name|upper }}", "{{ birth_date.split()[2] }}", "{{ birth_date.split(' ')|last }}",
    "{% if occupation == 'spy' %}x{% elif occupation in ('a', 'b') %}y{% else %}z{% endif %}",
    "{% for word in name.split() %}{{ loop.index }}: {{ word|lower }}{% endfor %}",
    "{{ ('a' ~ name)[1:] }}", "{{ name[0] }}.", "{{ 'one' if name is defined else 'two' }}",
    "{{ birth_date.split()|length + 1 }}", "{{ query('birth_date', name) }}", "{# a comment #}x",
    "{{ name|default('nobody') }}", "{% for letter in name %}{{ letter }}{% endfor %}",
]  # fmt: skip
RUNAWAYS = {
    "{{ name * 99999999999 }}": r"\*",
    "{{ 10 ** 10 ** 10 }}": r"\*\*",
    "{{ '%999999999d' % 1 }}": "%",
    "{{ '{:>999999999}'.format(1) }}": r"the method format\(\)",
    "{{ '%999999999d'|format(1) }}": "the filter format",
    "{{ name.ljust(999999999) }}": r"the method ljust\(\)",
    "{{ name|center(999999999) }}": "the filter center",
    "{{ name.replace('', name) }}": r"the method replace\(\)",
    "{{ name|replace('', name) }}": "the filter replace",
    "{{ ','.join(name) }}": r"the method join\(\)",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}": (
        "the (call of|name) range"
    ),
    "{% for a in name %}{% for b in name %}x{% endfor %}{% endfor %}": "a loop within a loop",
    "{% for a in name recursive %}{{ loop(a) }}{% endfor %}": "a loop within a loop",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "macro",
    "{% set a = 'x' %}{% set a = a ~ a %}{{ a }}": "set",
    "{% set a %}x{% endset %}": "set",
    "{% filter upper %}x{% endfilter %}": "a filter block",
    "{% include 'x' %}": "include",
    "{% import 'x' as y %}": "import",
    "{% from 'x' import y %}": "import",
    "{% extends 'x' %}": "extends",
    "{% block x %}{% endblock %}": "block",
    "{% call query('a', name) %}{% endcall %}": "call",
    "{{ lipsum(n=100000) }}": "the (call of|name) lipsum",
    "{{ cycler('a') }}": "the (call of|name) cycler",
    "{{ namespace(a=1) }}": "the (call of|name) namespace",
    "{{ dict(a=1) }}": "the (call of|name) dict",
    "{{ {'a': 1} }}": "a mapping",
    "{{ (name.split() ~ '').split()[0] }}": "split",
    "{{ name.split()[:2] }}": "split",
    "{{ [[name] ~ ''] ~ '' }}": "a list",
    "{{ name|list }}": "the filter list",
    "{{ name|attr('__class__') }}": "the filter attr",
    "{{ name|map('upper') }}": "the filter map",
    "{{ name.__class__ }}": "the attribute __class__",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "the method __subclasses__",
    "{{ query.__globals__ }}": "the attribute __globals__",
    "{{ self._TemplateReference__context }}": "the attribute _TemplateReference__context",
    "{{ self }}": "the name self",
    "{{ range }}": "the name range",
    "{{ query }}": "the name query",
    "{{ name.encode() }}": r"the method encode\(\)",
    "{{ (query)('a', name)() }}": "the call of an expression",
    "{{ '{0.__class__}'.format(name) }}": r"the method format\(\)",
    "{{ name.split.__self__ }}": "the attribute __self__",
}


def write(folder, text):
    path = folder / "birth_date.jinja"
    path.write_text(f"user: When was {{{{ name }}}} born?\nassistant: {text}\n")
    return path


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_plain_is_said(text, tmp_path):
    write(tmp_path, text + " {{ birth_date }}")
    questions = TemplateSet.load(tmp_path).questions(make_population(3))
    context = {
        "name": "Ann Bo", "birth_date": "4 May 1980", "occupation": "spy", "query": lambda a, b: f"{a} {b}"
    }  # fmt: skip
    assert len(questions) == 3
    assert environment().from_string(text).render(context)


@pytest.mark.parametrize("text", RUNAWAYS)
def test_what_runs_away_is_refused_before_it_runs(text, tmp_path):
    start = time.perf_counter()
    words = rf"birth_date\.jinja, line 2: a template may not use .*{RUNAWAYS[text]}"
    with pytest.raises(ToolmemError, match=words):
        read_template_file(write(tmp_path, text + "{{ birth_date }}"))
    assert time.perf_counter() - start < 5


def test_size_and_depth(tmp_path):
    with pytest.raises(ToolmemError, match="is 20,016 characters long; at most 16,384"):
        read_template_file(write(tmp_path, "x" * 20_000 + "{{ birth_date }}"))
    for deep in (
        "{{ " + "(" * 5000 + "name" + ")" * 5000 + " }}",
        "{{ " + "not " * 3000 + "name }}",
    ):
        with pytest.raises(ToolmemError, match="line 2: nested too deeply"):
            read_template_file(write(tmp_path, deep))
