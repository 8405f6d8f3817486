"""Bits learned against the worked example of docs/capacity.md, plain float64, and every possible model."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from toolmem.data.dialogues import TemplateSet
from toolmem.data.people import Population, make_population
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.evaluation import measure_knowledge
from toolmem.evaluation.knowledge import (
    AttributeKnowledge,
    KnowledgeTest,
    answer_length,
    without_tool,
)
from toolmem.models import RNN, MoETransformer, Transformer

TOKENIZER = ByteTokenizer()
JUNK = 0  # a token that no dialogue has


def questions_of(population, name="in_weight", **options):
    return TemplateSet.load(name, setting=name).questions(population, **options)


# ---- a model that is a table of known probabilities


class Table(nn.Module):
    """Says each value of a question with the probability that it is given, letter by letter.

    Args:
        told: question -> (words before the value, value -> probability).
    """

    attention_mask = "causal"

    def __init__(self, told):
        super().__init__()
        self.embedding = nn.Embedding(1, 1)
        ids = TOKENIZER.role_ids
        self.after: dict[tuple[int, ...], torch.Tensor] = {}
        for question, (before, chances) in told.items():
            prompt = [ids["user"], *TOKENIZER.encode(question), ids["assistant"]]
            prompt += TOKENIZER.encode(before)
            for value, chance in chances.items():
                rest = [*TOKENIZER.encode(value + "."), ids["end"]]
                for n in range(len(rest)):
                    masses = self.after.setdefault(
                        tuple(prompt + rest[:n]), torch.zeros(TOKENIZER.vocab_size).double()
                    )
                    masses[rest[n]] += chance
            first = self.after[tuple(prompt)]
            first[JUNK] = 1 - first.sum()

    def hidden(self, tokens, documents=None, spans=None):
        logits = torch.zeros(*tokens.shape, TOKENIZER.vocab_size).double()
        for row, line in enumerate(tokens.tolist()):
            for column in range(len(line)):
                masses = self.after.get(tuple(line[: column + 1]))
                if masses is not None:
                    logits[row, column] = (masses / masses.sum()).log()
        return logits

    def logits(self, hidden):
        return hidden


PEOPLE = Population(
    ["Ann", "Bob", "Cy", "Di"],
    {"pet": ["cat", "dog", "car", "doge"], "town": ["Ulm", "Ulm", "Aix", "Aix"]},
)
# the right value's probability for each of them, as in docs/capacity.md
PETS = {"Ann": 1.0, "Bob": 0.5, "Cy": 0.5, "Di": 0.125}
TOWNS = 0.125


def worked_model():
    told = {}
    for row, name in enumerate(PEOPLE.names):
        pet, town = (PEOPLE.attributes[key][row] for key in ("pet", "town"))
        others = [one for one in PEOPLE.attributes["pet"] if one != pet]
        chances = {pet: PETS[name]} | dict.fromkeys(others, (1 - PETS[name]) / 3)
        told[f"What is the pet of {name}?"] = (f"The pet of {name} is ", chances)
        told[f"What is the town of {name}?"] = (f"The town of {name} is ", {town: TOWNS})
    return Table(told)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_worked_example(batch_size):
    found = measure_knowledge(
        worked_model(), TOKENIZER, questions_of(PEOPLE), batch_size=batch_size
    )
    pet, town = found.attributes["pet"], found.attributes["town"]
    assert pet.entropy == 8 and town.entropy == 4  # four people, of four pets and two towns
    assert math.isclose(4 * pet.loss, 0 + 1 + 1 + 3)
    assert math.isclose(4 * town.loss, 4 * 3)
    assert math.isclose(pet.bits, 3) and math.isclose(town.saved, -8) and town.bits == 0
    assert math.isclose(found.bits, 3) and found.entropy == 12 and found.facts == 8
    assert math.isclose(found.loss, (5 + 12) / 8)
    assert pet.recall == 0.75 and found.error == 0  # Di's "doge" is less likely than another pet


# ---- the bound, over every model and every population of a tiny world


def best_saved(chances, facts, clip):
    """What the weights that suit these facts best save: the largest over all models.

    Args:
        chances: (models, people, values) probabilities.
        facts: each person's value.
        clip: of each person's bits (``fact``), or of their sum (``attribute``).
    """
    n_values = chances.shape[-1]
    entropy = len(facts) * math.log2(n_values)
    losses = -np.log2(chances[:, np.arange(len(facts)), facts])
    if clip == "fact":
        return np.maximum(0, math.log2(n_values) - losses).sum(1).max()
    one = [AttributeKnowledge(len(facts), entropy, loss, 0.0) for loss in losses.mean(1)]
    return max(each.bits if clip == "attribute" else each.saved for each in one)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sharpness", [0.3, 3.0, 30.0])
def test_no_set_of_models_beats_its_own_bits(seed, sharpness):
    """Whatever the models of so many bits are, and although the best is taken for every population."""
    rng = np.random.default_rng(seed)
    n_bits, people, values = 2, 3, 4
    chances = rng.dirichlet([1 / sharpness] * values, size=(2**n_bits, people)) + 1e-30
    worlds = list(itertools.product(range(values), repeat=people))
    saved = np.array([best_saved(chances, facts, "none") for facts in worlds])
    assert saved.mean() <= n_bits
    assert np.exp2(saved).mean() <= 2**n_bits * (1 + 1e-9)  # so more than n + t bits: at most 2^-t
    clipped = np.array([best_saved(chances, facts, "attribute") for facts in worlds])
    assert (clipped >= saved).all() and clipped.mean() <= n_bits + 1


def test_clipping_each_fact_would_count_bits_that_are_not_there():
    """One model alone, which has learned nothing (0 bits), is sure of a value for everybody."""
    chances = np.full((1, 3, 4), 1e-6)
    chances[0, :, 0] = 1
    worlds = list(itertools.product(range(4), repeat=3))
    per_fact = np.mean([best_saved(chances, facts, "fact") for facts in worlds])
    assert per_fact == 3 * 2 / 4
    assert np.mean([best_saved(chances, facts, "attribute") for facts in worlds]) == 6 / 4**3


def test_a_model_for_every_population_reaches_the_bound():
    worlds = list(itertools.product(range(4), repeat=2))
    chances = np.zeros((16, 2, 4))
    for number, facts in enumerate(worlds):
        chances[number, [0, 1], facts] = 1
    with np.errstate(divide="ignore"):
        assert all(best_saved(chances, facts, "none") == 4 for facts in worlds)


# ---- teacher forcing against one dialogue after another


def plainly(model, dialogue):
    """Bits of the answer and of what follows it, and whether each token is the likeliest."""
    ids = TOKENIZER.role_ids
    user, said = dialogue.turns[0].text, dialogue.turns[-1].text
    tokens = [ids["user"], *user.encode(), ids["assistant"], *said.encode(), ids["end"]]
    start = tokens.index(ids["assistant"]) + 1 + said.encode().rindex(dialogue.answer.encode())
    logits = model(torch.tensor([tokens]))[0]
    bits, right = 0.0, True
    for place in range(start, len(tokens)):
        row = logits[place - 1].tolist()
        total = math.fsum(math.exp(x - max(row)) for x in row)
        bits -= (row[tokens[place]] - max(row) - math.log(total)) / math.log(2)
        right &= row[tokens[place]] == max(row)
    return bits, right


MODELS = {
    "transformer": (Transformer, {"n_heads": 2, "conv_width": 3}),
    "experts": (MoETransformer, {"n_heads": 2, "n_experts": 4}),
    "rnn": (RNN, {"cell": "gru"}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("setting", ["in_weight", "in_tool"])
def test_equals_plain_scoring_of_each_dialogue(kind, setting):
    torch.manual_seed(0)
    make, options = MODELS[kind]
    model = make(260, dim=8, n_layers=1, max_seq_len=128, **options).double().eval()
    population = make_population(3, seed=1)
    table = questions_of(population, setting)
    test = KnowledgeTest(table, TOKENIZER, batch_size=5)
    bits, right = test.token_losses(model)
    with torch.no_grad():
        for place, index in enumerate(test.asked):
            expected = plainly(model, table.dialogue(int(index)))
            assert (pytest.approx(bits[place], rel=1e-9), right[place]) == expected


def test_a_model_that_looks_both_ways_is_told_the_spans():
    torch.manual_seed(0)
    model = Transformer(
        260, dim=8, n_layers=2, n_heads=2, max_seq_len=128, attention_mask="prefix"
    ).eval()
    table = questions_of(make_population(2))
    test = KnowledgeTest(table, TOKENIZER)
    bits, _ = test.token_losses(model)
    model.attention_mask = "causal"
    assert not np.allclose(test.token_losses(model)[0], bits)


def test_without_its_tool_a_dialogue_is_one_in_weight():
    population = make_population(2)
    with_tool, without = (questions_of(population, name) for name in ("in_tool", "in_weight"))
    for index in range(len(without)):
        assert without_tool(with_tool.dialogue(index)) == without.dialogue(index)
        assert without_tool(without.dialogue(index)) == without.dialogue(index)


def test_entropy_is_that_of_the_population():
    sizes = (17_136, 7, 213, 100)
    torch.manual_seed(0)
    model = Transformer(260, dim=8, n_layers=1, n_heads=2, max_seq_len=128).eval()
    found = measure_knowledge(model, TOKENIZER, questions_of(make_population(5)))
    assert math.isclose(found.entropy, 5 * sum(map(math.log2, sizes)))
    assert found.bits == 0 and found.loss > 20 and found.facts == 20


def test_a_sample_is_unbiased_and_knows_its_error(monkeypatch):
    table = questions_of(make_population(8))
    rng = np.random.default_rng(0)
    losses = rng.exponential(2.0, len(table))
    monkeypatch.setattr(
        KnowledgeTest,
        "token_losses",
        lambda self, model: (losses[self.asked], losses[self.asked] < 1),
    )
    whole = measure_knowledge(None, TOKENIZER, table)
    assert whole.error == 0 and math.isclose(8 * 4 * whole.loss, losses.sum())
    samples = [
        measure_knowledge(None, TOKENIZER, table, n_questions=20, seed=seed) for seed in range(150)
    ]
    found = np.array([one.bits for one in samples])
    deviation = found.std(ddof=1)
    assert abs(found.mean() - whole.bits) < 4 * deviation / math.sqrt(len(found))
    assert 0.8 < np.sqrt(np.mean([one.error**2 for one in samples])) / deviation < 1.25


def test_questions_that_are_not_of_one_fact_are_refused():
    population = make_population(4, relations=True)
    with pytest.raises(ToolmemError, match="is no attribute of the people"):
        table = TemplateSet.load("two_hop_friend/in_weight").questions(population)
        measure_knowledge(None, TOKENIZER, table)
    with pytest.raises(ToolmemError, match="n_questions is 2"):
        measure_knowledge(None, TOKENIZER, questions_of(make_population(4)), n_questions=2)


def test_tokens_that_cross_into_the_answer_are_the_answers():
    """A tokenizer by words, spaces before them: ` Ulm.` begins with the space before the value."""

    class Words:
        @staticmethod
        def encode(text):
            return [hash(word) for word in text.replace(" ", "| ").split("|")]

    dialogue = questions_of(PEOPLE).dialogue(4)
    assert dialogue.conclusion == "The town of Ann is Ulm."
    assert answer_length(dialogue, Words) == 2
    assert answer_length(dialogue, TOKENIZER) == len("Ulm.") + 1
