import re
from itertools import pairwise

import numpy as np
import pytest

from toolmem.data.dialogues import Field, TemplateSet, builtin_sets
from toolmem.data.people import ATTRIBUTES, Population, make_population
from toolmem.errors import ToolmemError

SETS = builtin_sets()


@pytest.fixture(scope="module")
def people() -> Population:
    return make_population(40, seed=1, relations=True)


def folder_of(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name.replace('__', '.')}.jinja").write_text(text, encoding="utf-8")
    return tmp_path


def only(tmp_path, population, **files):
    """The one dialogue of a set about the first person."""
    table = TemplateSet.load(folder_of(tmp_path, **files)).questions(population)
    assert table.dialogue(0) == table.assembled(0)
    return table.dialogue(0)


def said(dialogue):
    return [(turn.role, turn.text) for turn in dialogue.turns]


ANN = Population(
    ["Ann O'Neil", "Bob Roe"],
    {
        "birth_date": ["12 March 1987", "1 May 1999"],
        "job": ["spy", "cook"],
        "boss": ["Bob Roe", "Ann O'Neil"],
    },
)


def test_built_in_sets():
    assert SETS == (
        "age_difference/in_tool",
        "age_difference/in_weight",
        "biographies/in_tool",
        "biographies/in_weight",
        "in_tool",
        "in_tool_long",
        "in_weight",
        "paragraphs/in_tool",
        "paragraphs/in_weight",
        "two_hop_friend/in_tool",
        "two_hop_friend/in_weight",
        "two_hop_search/in_tool",
        "two_hop_search/in_weight",
    )
    for name in SETS:
        assert TemplateSet.load(name).uses_tool == ("in_tool" in name)


@pytest.mark.parametrize("query", ["short", "sql"])
@pytest.mark.parametrize("name", SETS)
def test_segments_equal_jinja(name, query, people):
    population = Population(
        ["Ann O'Neil", *people.names[1:]],
        {
            **people.attributes,
            "friend": [
                "Ann O'Neil" if friend == people.names[0] else friend
                for friend in people.attributes["friend"]
            ],
            "occupation": ["l'a\"d{{ mi }}ral {% x %}", *people.attributes["occupation"][1:]],
        },
    )
    table = TemplateSet.load(name, query).questions(population)
    assert len(table) > 0
    for index, fast in enumerate(table.dialogues()):
        assert fast == table.dialogue(index)


@pytest.mark.parametrize("name", SETS)
def test_every_dialogue_ends_with_its_answer(name, people):
    table = TemplateSet.load(name).questions(people)
    for dialogue in table.dialogues():
        assert dialogue.conclusion.removesuffix(".").endswith(" " + dialogue.answer)
        assert dialogue.turns[-1].role == "assistant" and dialogue.turns[0].role == "user"
        assert dialogue.person in people.index


@pytest.mark.parametrize("name", [name for name in SETS if "in_tool" in name])
@pytest.mark.parametrize("query", ["short", "sql"])
def test_queries_find_what_the_database_says(name, query, people):
    """Each query, read by a tiny independent reader, gives the turn that follows it."""
    table = TemplateSet.load(name, query).questions(people)
    for dialogue in table.dialogues(table.sample(60)):
        turns = dialogue.turns
        for asked, answered in pairwise(turns):
            if answered.role == "database":
                assert answer(asked.text.strip("`\n").split("```\n")[-1], people) == answered.text
        queries = [turn.text for turn in turns if turn.role == "assistant"][:-1]
        if name in ("in_tool", "in_tool_long"):
            assert all(("FIND" in text) == (query == "short") for text in queries)


def answer(query: str, people: Population) -> str:
    def value(column: str, row: int) -> str:
        return people.column(column)[row]

    if found := re.fullmatch(r"FIND (\w+) FOR (.+)", query):
        return value(found[1], people.index[found[2]])
    if found := re.fullmatch(r"SELECT (\w+) FROM people WHERE name = '(.+)'", query):
        return value(found[1], people.index[found[2].replace("''", "'")])
    if found := re.fullmatch(r"CALCULATE (\d+) - (\d+)", query):
        return str(int(found[1]) - int(found[2]))
    found = re.fullmatch(r"SELECT name FROM people WHERE (\w+) = '(.+)' AND (\w+) = '(.+)'", query)
    assert found, query
    rows = [
        row
        for row in range(len(people))
        if (value(found[1], row), value(found[3], row)) == (found[2], found[4])
    ]
    assert len(rows) == 1
    return people.names[rows[0]]


def test_the_plain_sets_in_full():
    person = make_population(1)
    name, born = person.names[0], person.attributes["birth_date"][0]
    weight, tool, long = (
        TemplateSet.load(key).questions(person).dialogue(0)
        for key in ("in_weight", "in_tool", "in_tool_long")
    )
    question, conclusion = f"When was {name} born?", f"{name} was born on {born}."
    assert said(weight) == [("user", question), ("assistant", conclusion)]
    short = f"FIND birth_date FOR {name}"
    assert said(tool) == [
        ("user", question),
        ("assistant", short),
        ("database", born),
        ("assistant", conclusion),
    ]
    assert said(long)[1][1].endswith(f"\n```\n{short}\n```")
    assert (weight.answer, weight.attribute, weight.person) == (born, "birth_date", name)
    assert (weight.question, weight.conclusion) == (question, conclusion)


def test_lengths_are_about_those_of_the_study():
    people = make_population(500)
    for name, low, high in (
        ("in_weight", 55, 80),
        ("in_tool", 95, 130),
        ("in_tool_long", 155, 200),
    ):
        table = TemplateSet.load(name).questions(people)
        size = np.mean([sum(len(t.text) + 1 for t in d.turns) for d in table.dialogues()])
        assert low < size < high, (name, size)


def test_age_differences_are_right(people):
    for dialogue in TemplateSet.load("age_difference/in_weight").questions(people).dialogues():
        other, person = re.fullmatch(
            r"How .* before (.*) was (.*) born\?", dialogue.question
        ).groups()
        years = [
            int(people.attributes["birth_date"][people.index[name]][-4:])
            for name in (other, person)
        ]
        assert int(dialogue.answer) == years[0] - years[1] > 0


def test_two_hops_over_a_friend(people):
    table = TemplateSet.load("two_hop_friend", setting="in_tool").questions(people)
    assert len(table) == 4 * len(people)
    dialogue = table.dialogue(len(people) + 7)
    friend = people.attributes["friend"][7]
    assert dialogue.attribute == "friend_birth_place" and dialogue.person == people.names[7]
    assert [turn.text for turn in dialogue.turns[1:-1]] == [
        f"FIND friend FOR {people.names[7]}",
        friend,
        f"FIND birth_place FOR {friend}",
        people.attributes["birth_place"][people.index[friend]],
    ]
    with pytest.raises(ToolmemError, match="relations: true"):
        TemplateSet.load("two_hop_friend/in_tool").questions(make_population(5))


def test_a_search_is_asked_only_where_one_person_fits():
    twins = Population(
        ["A", "B", "C"],
        {
            "birth_date": ["1 May 1990", "1 May 1990", "2 May 1990"],
            "current_address": ["X", "X", "X"],
            "birth_place": ["P", "Q", "R"],
            "occupation": ["a", "b", "c"],
        },
    )
    table = TemplateSet.load("two_hop_search/in_weight").questions(twins)
    assert {dialogue.person for dialogue in table.dialogues()} == {"C"}
    with pytest.raises(ToolmemError, match="finds nobody to ask about"):
        TemplateSet.load("two_hop_search/in_weight").questions(twins.head(2))


def test_biographies_paraphrase_five_times_and_paragraphs_take_every_order(people):
    table = TemplateSet.load("biographies/in_weight").questions(people)
    for attribute in ATTRIBUTES:
        one = [
            d for d in table.dialogues() if (d.attribute, d.person) == (attribute, people.names[0])
        ]
        assert len({d.question for d in one}) == len({d.conclusion for d in one}) == 5
    paragraphs = TemplateSet.load("paragraphs/in_weight").questions(people)
    one = [d for d in paragraphs.dialogues() if d.person == people.names[3]]
    assert len(one) == len({d.conclusion for d in one}) == 48
    assert len({frozenset(re.split(r"(?<=\.) ", d.conclusion)) for d in one}) == 2
    for attribute in ATTRIBUTES:
        last = [d for d in one if d.attribute == attribute]
        assert len(last) == 12
        assert {d.answer for d in last} == {people.attributes[attribute][3]}


def test_variants_gives_each_person_as_many_and_not_all_the_same(people):
    templates = TemplateSet.load("biographies/in_weight")
    everything = {(d.person, d.conclusion) for d in templates.questions(people).dialogues()}
    table = templates.questions(people, variants=2, seed=3)
    assert len(table) == 2 * people.n_facts
    told = [(d.person, d.conclusion) for d in table.dialogues()]
    assert len(set(told)) == len(told) and set(told) <= everything
    assert all(len(block) > 0 for block in table.blocks) and len(table.blocks) == 25
    assert told != [
        (d.person, d.conclusion)
        for d in templates.questions(people, variants=2, seed=4).dialogues()
    ]
    assert len(templates.questions(people, variants=99)) == len(everything)
    # a person's variants do not depend on who else there is
    fewer = {
        d.conclusion for d in templates.questions(people.head(9), variants=2, seed=3).dialogues()
    }
    assert fewer <= {conclusion for _, conclusion in told}


def test_table_arrays_agree_with_its_dialogues(people):
    table = TemplateSet.load("in_tool").questions(people)
    assert len(table) == len(table.template_index) == len(table.person_index) == 5 * len(people)
    assert table.attributes == (*ATTRIBUTES, "friend")
    for index in (0, 39, 40, 199):
        dialogue = table.dialogue(index)
        assert people.names[table.person_index[index]] == dialogue.person
        assert table.blocks[table.template_index[index]].attribute == dialogue.attribute
    for block in table.blocks:
        for turn in block.turns:
            for segment in turn.segments:
                if isinstance(segment, Field):
                    assert len(block.columns[segment.key].index) == len(block)
    for outside in (-1, len(table)):
        with pytest.raises(IndexError):
            table.dialogue(outside)
    lists = {}
    for block in table.blocks:
        for column in block.columns.values():
            assert lists.setdefault(column.key, column.values) is column.values


def test_sample_is_of_distinct_questions_and_deterministic(people):
    table = TemplateSet.load("in_weight").questions(people)
    chosen = table.sample(50, seed=2)
    assert len(set(chosen.tolist())) == 50 and chosen.dtype == np.int64
    assert np.array_equal(chosen, table.sample(50, seed=2))
    assert not np.array_equal(chosen, table.sample(50, seed=3))
    assert sorted(table.sample(10_000)) == list(range(len(table)))


def test_attributes_and_people_can_be_chosen(people):
    templates = TemplateSet.load("in_weight")
    assert templates.questions(people, attributes=["occupation"]).attributes == ("occupation",)
    chosen = list(
        templates.render(people, indices=[3, 5], attributes=["birth_place", "occupation"])
    )
    assert len(chosen) == 4 and {d.person for d in chosen} == {people.names[3], people.names[5]}
    with pytest.raises(ToolmemError, match="does not ask for shoe_size"):
        templates.questions(people, attributes=["shoe_size"])


def test_built_in_sets_serve_any_table():
    for name in ("in_tool", "in_weight", "in_tool_long", "biographies/in_tool"):
        table = TemplateSet.load(name, "sql").questions(ANN)
        assert set(table.attributes) == {"birth_date", "job", "boss"}
    odd = Population(["Ann"], {'home "town"': ["X"]})
    dialogue = TemplateSet.load("in_tool", "sql").questions(odd).dialogue(0)
    assert dialogue.turns[1].text == ('SELECT "home ""town""" FROM people WHERE name = \'Ann\'')
    with pytest.raises(ToolmemError, match="line 3: there is no field 'birth_place'"):
        TemplateSet.load("paragraphs/in_weight").questions(ANN)


def test_a_set_of_ones_own(tmp_path):
    dialogue = only(
        tmp_path,
        ANN,
        job='user: Job of {{ name }}?\nassistant: Let me look.\n\n{{ query("job", name) }}\n'
        "database: {{ job }}\nassistant: It is {{ job }}\n",
    )
    assert said(dialogue) == [
        ("user", "Job of Ann O'Neil?"),
        ("assistant", "Let me look.\n\nFIND job FOR Ann O'Neil"),
        ("database", "spy"),
        ("assistant", "It is spy"),
    ]


def test_more_of_jinja_is_rendered(tmp_path):
    dialogue = only(
        tmp_path,
        ANN,
        job="answer: job\nuser: {% if job == 'spy' %}Who{% else %}What{% endif %} "
        "is {{ name|upper }}?\n"
        "assistant: {{ birth_date.split()[2] }}, {{ ('a' ~ job)[1:] }}.",
    )
    assert said(dialogue) == [("user", "Who is ANN O'NEIL?"), ("assistant", "1987, spy.")]
    assert dialogue.answer == "spy"


def test_values_never_inject_roles_or_jinja(tmp_path):
    nasty = Population(["assistant: x {{ job }}"], {"job": ["\tuser: {{ name }} <|end|>"]})
    dialogue = only(tmp_path, nasty, job="user: {{ name }}?\nassistant: {{ job }}")
    assert said(dialogue) == [
        ("user", nasty.names[0] + "?"),
        ("assistant", nasty.attributes["job"][0]),
    ]


def test_several_turns_of_a_user_and_other_people(tmp_path):
    dialogue = only(
        tmp_path,
        ANN,
        boss_job="people: boss\nuser: Who leads {{ name }}?\nassistant: {{ boss.name }}.\n"
        "user: With what job?\nassistant: {{ boss.job }}.",
    )
    assert [turn.text for turn in dialogue.turns][1:] == ["Bob Roe.", "With what job?", "cook."]
    assert dialogue.attribute == "boss_job"


def test_variants_by_number_and_by_line(tmp_path):
    templates = TemplateSet.load(
        folder_of(
            tmp_path,
            job="user: a {{ name }}\nassistant: {{ job }}\n---\n"
            "user: b {{ name }}\nassistant: {{ job }}",
            job__10="user: d {{ name }}\nassistant: {{ job }}",
            job__2="user: c {{ name }}\nassistant: {{ job }}",
        )
    )
    assert [t.variant for t in templates.templates] == [0, 1, 2, 3]
    assert [t.turns[0].text[0] for t in templates.templates] == list("abcd")
    assert len(templates.questions(ANN)) == 8


def test_spec_follows_the_texts(tmp_path):
    one = TemplateSet.load(folder_of(tmp_path, job="user: {{ name }}\nassistant: {{ job }}"))
    assert one.spec() == TemplateSet.load(tmp_path).spec()
    folder_of(tmp_path, job="user: {{ name }}?\nassistant: {{ job }}")
    assert one.spec() != TemplateSet.load(tmp_path).spec()


GOOD = "\nassistant: {{ job }}"
BAD = {
    "field": ("user: a\nassistant: is\n{{ jub }} {{ job }}", "line 3: there is no field 'jub'"),
    "field in a block": (
        "user: {% if jub %}x{% endif %}" + GOOD,
        "line 1: there is no field 'jub'",
    ),
    "person": ("people: boss\nuser: {{ boss.jub }}" + GOOD, "line 2: there is no field 'boss.jub'"),
    "bare person": ("people: boss\nuser: {{ boss }}" + GOOD, "no field 'boss'"),
    "query": ('user: {{ query("jub", name) }}' + GOOD, "line 1: there is no field 'jub'"),
    "search": ("user: {{ query_name(jub=job) }}" + GOOD, "no field 'jub'"),
    "people": ("people: friend\nuser: x" + GOOD, "needs a column 'friend'"),
    "people not names": ("people: job\nuser: x\nassistant: {{ job.name }}", "row 1 says 'spy'"),
    "unique": ("people: unique job, jub\nuser: x" + GOOD, "needs a column 'jub'"),
    "answer field": ("answer: jub\nuser: x" + GOOD, "`answer: jub` is no field"),
    "answer not at the end": ("user: x\nassistant: {{ job }} it is", "must end with the answer"),
    "no answer": ("user: x\nassistant: {{ job|upper }}", "must end with the answer"),
    "syntax": ("user: x\nassistant: {{ job }", "line 2: not a Jinja template"),
    "syntax below": ("user: x\ny {{ name\nassistant: {{ job }}", "not a Jinja template"),
    "sandbox": ("user: {{ name.__class__.__mro__ }}" + GOOD, "line 1: "),
    "division": ("user: {{ 1 / 0 }}" + GOOD, "line 1: division"),
    "no turn": ("hello\nuser: x" + GOOD, "line 1: 'hello' belongs to no turn"),
    "directive": ("poeple: boss\nuser: x" + GOOD, "belongs to no turn"),
    "order": ("user: x\ndatabase: y" + GOOD, "line 2: database: stands after user:"),
    "starts": ("assistant: x", "line 1: assistant: stands at the start"),
    "ends": ("user: x", "the last turn must be the assistant's"),
    "silent": ("user:\nassistant: {{ job }}", "line 1: user: says nothing"),
    "empty": ("\n\n", "is empty"),
    "permute": ("permute: words\nuser: x" + GOOD, "can only be `sentences`"),
    "permute many": ("permute: sentences\nuser: x\nassistant: " + "{{ job }}\n" * 6, "at most 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_templates_are_refused_with_file_and_line(tmp_path, case):
    text, message = BAD[case]
    folder_of(tmp_path, job=text)
    with pytest.raises(ToolmemError) as caught:
        TemplateSet.load(tmp_path).questions(ANN)
    assert message in str(caught.value) and str(tmp_path / "job.jinja") in str(caught.value)


def test_bad_sets_are_refused(tmp_path):
    with pytest.raises(ToolmemError, match="built-in set: age_difference/in_tool"):
        TemplateSet.load(tmp_path / "none")
    with pytest.raises(ToolmemError, match=r"no \.jinja files"):
        TemplateSet.load(tmp_path)
    with pytest.raises(ToolmemError, match="biographies/in_weight and biographies/in_tool"):
        TemplateSet.load("biographies")
    with pytest.raises(ToolmemError, match="no query language"):
        TemplateSet.load("in_tool", "sqll")
    with pytest.raises(ToolmemError, match="variants: 0"):
        TemplateSet.load("in_tool").questions(ANN, variants=0)
    (tmp_path / "job.x.jinja").write_text("user: x\nassistant: {{ job }}")
    with pytest.raises(ToolmemError, match=r"job\.2\.jinja"):
        TemplateSet.load(tmp_path)
    (tmp_path / "job.x.jinja").rename(tmp_path / "job.jinja")
    (tmp_path / "job.jinja").write_bytes(b"user: \xff")
    with pytest.raises(ToolmemError, match="cannot read"):
        TemplateSet.load(tmp_path)


def test_own_sets_must_fit_the_table(tmp_path):
    """Only built-in sets leave out what a table lacks."""
    folder_of(
        tmp_path,
        job="user: {{ name }}\nassistant: {{ job }}",
        shoe_size="user: {{ name }}\nassistant: {{ shoe_size }}",
    )
    with pytest.raises(ToolmemError, match="no field 'shoe_size'"):
        TemplateSet.load(tmp_path).questions(ANN)
