"""``toolmem.load`` and ``Run.ask``: the three lines of Python."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import toolmem
from toolmem import ToolmemError, checkpoints
from toolmem.data import FactsDataModule
from toolmem.data.factbase import Factbase, build_factbase
from toolmem.data.people import make_population
from toolmem.models import Transformer


def make_run(folder: Path, setting: str = "in_tool", facts: bool = True) -> Path:
    """A run's folder as training leaves it, of a model that knows nothing."""
    data = FactsDataModule(people=6, setting=setting, unseen_people=3)
    torch.manual_seed(0)
    model = Transformer(data.vocab_size, dim=8, n_layers=1, n_heads=2, max_seq_len=256)
    weights = {checkpoints.WEIGHTS_PREFIX + key: value for key, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "global_step": 7}
    checkpoint[checkpoints.KEY] = checkpoints.describe(model, data.checkpoint_info())
    checkpoints.write(checkpoint, folder / "checkpoints" / "last.ckpt")
    if facts:
        data.write_factbase(folder / "facts.duckdb")
    return folder


@pytest.fixture
def run(tmp_path):
    return toolmem.load(make_run(tmp_path / "run"))


def test_what_is_loaded(run, tmp_path):
    assert run.checkpoint.step == 7
    assert not run.model.training
    assert run.factbase == tmp_path / "run" / "facts.duckdb"
    assert {tool.name for tool in run.toolbox.tools} == {"sql", "calculator"}
    with Factbase.open(run.factbase) as facts:
        assert run.checkpoint.data["factbase"]["fingerprint"] == facts.fingerprint


@pytest.mark.parametrize("place", ["", "checkpoints", "checkpoints/last.ckpt"])
def test_folder_or_file(place, tmp_path):
    folder = make_run(tmp_path / "run")
    assert toolmem.load(folder / place).factbase == folder / "facts.duckdb"
    assert toolmem.load(str(folder / place)).checkpoint.path.name == "last.ckpt"


def test_ask_answers_with_the_whole_dialogue(run):
    question = run.questions("known", 1)[0].question
    reply = run.ask(question, max_new_tokens=12)
    assert reply.dialogue[0] == ("user", question)
    assert reply.dialogue[-1] == ("assistant", reply.answer)
    answer, dialogue = reply
    assert (answer, dialogue) == (reply.answer, reply.dialogue)


def test_many_are_asked_as_each_alone(run):
    questions = [dialogue.question for dialogue in run.questions("known", 5)]
    together = run.ask_many(questions, max_new_tokens=10)
    alone = [run.ask(question, max_new_tokens=10) for question in questions]
    assert [run.reply(generated) for generated in together] == alone
    for ahead in (1, 3, 100):
        each = run.ask_each(questions, max_new_tokens=10, ahead=ahead)
        assert [run.reply(generated) for generated in each] == alone


def test_stream_is_what_ask_says(run):
    question = run.questions("known", 1)[0].question
    events = list(run.stream(question, max_new_tokens=10))
    [generated] = run.ask_many([question], max_new_tokens=10)
    assert [token for token, _ in events] == generated.tokens[generated.prompt_length :]
    assert [role for _, role in events] == generated.roles[generated.prompt_length :]


def test_questions_are_those_of_training(run):
    data = FactsDataModule(people=6, setting="in_tool", unseen_people=3)
    for split, population in (("known", data.population), ("unseen", data.unseen_population)):
        questions = run.questions(split, 1000)
        assert len(questions) == 4 * len(population)
        assert {question.person for question in questions} == set(population.names)
    assert run.questions("known", 3) == run.questions("known", 3)
    assert run.questions("known", 9, seed=1) != run.questions("known", 9)


def test_in_weight_has_no_tools(tmp_path):
    run = toolmem.load(make_run(tmp_path, "in_weight", facts=False))
    assert run.toolbox is None
    assert run.ask("When?", max_new_tokens=3).dialogue[0] == ("user", "When?")


def test_in_tool_without_facts_says_what_to_do(tmp_path):
    run = toolmem.load(make_run(tmp_path, facts=False))
    with pytest.raises(ToolmemError, match=r"facts\.duckdb.*--factbase"):
        run.ask("When?")
    with pytest.raises(ToolmemError, match="--factbase"):
        run.questions("known", 1)


def test_other_facts_only_when_allowed(tmp_path):
    folder = make_run(tmp_path / "run")
    other = tmp_path / "other.duckdb"
    build_factbase(make_population(9, seed=5), other)
    with pytest.raises(ToolmemError, match=r"other\.duckdb holds other facts"):
        toolmem.load(folder, factbase=other)
    run = toolmem.load(folder, factbase=other, allow_other_factbase=True)
    assert len(run.questions("known", 100)) == 36
    other.replace(folder / "facts.duckdb")
    with pytest.raises(ToolmemError, match=r"facts\.duckdb holds other facts"):
        toolmem.load(folder)


def test_the_package_shows_its_three_names():
    assert {"load", "Run", "ToolmemError", "__version__"} <= set(dir(toolmem))
    with pytest.raises(AttributeError, match="nothing"):
        _ = toolmem.nothing
