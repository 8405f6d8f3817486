"""Bits of knowledge: how much of a population's information a model's weights are shown to hold.

With a model at hand, the facts can be told in ``loss`` bits, each value by its probability given the
question; without it, given names and schema alone, in ``entropy`` bits (``data/information.py``). What
the model saves, its weights must hold, whatever they are and however they came about:

    bits = sum over attributes of max(0, entropy - loss) <= bits of the weights + one an attribute

(the lower bound of arXiv 2404.05405 on our population, derived in docs/capacity.md). The loss of a fact
is that of all tokens from its value's first to the end of the turn, so that no value is the beginning of
another, given the question and the turn's words before the value, which the question decides.

A dialogue with a tool is asked without it: the query and the tool's answer are left out, and the model
has to tell the value after the question, as one that keeps facts in its weights does. The bound holds
for any way of asking; that an in-tool model shows no bits so says that this way finds none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from toolmem.data.information import information_bits
from toolmem.data.questions import Dialogue, QuestionTable
from toolmem.data.text.dialog_tokens import DialogTokenGenerator
from toolmem.data.text.token_table import TokenTable
from toolmem.errors import ToolmemError
from toolmem.evaluation.forcing import forced

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel


@dataclass(frozen=True)
class AttributeKnowledge:
    """What a model knows of one attribute.

    Args:
        facts: people, each with one fact.
        entropy: bits of all these facts, given the names.
        loss: bits a fact costs with the model at hand, a mean.
        recall: share of facts whose every token, after the words before it, is the likeliest.
        variance: of the estimate of ``facts * loss``, in bits squared; 0 when all facts were asked.
    """

    facts: int
    entropy: float
    loss: float
    recall: float
    variance: float = 0.0

    @property
    def saved(self) -> float:
        """Bits that the model saves; below 0 when it is worse than knowing nothing but the schema."""
        return self.entropy - self.facts * self.loss

    @property
    def bits(self) -> float:
        """Bits learned."""
        return max(0.0, self.saved)


@dataclass(frozen=True)
class Knowledge:
    """What a model knows of a population.

    Args:
        attributes: by attribute.
    """

    attributes: dict[str, AttributeKnowledge]

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(one, name) for one in self.attributes.values())

    @property
    def bits(self) -> float:
        """Bits learned."""
        return self._sum("bits")

    @property
    def entropy(self) -> float:
        """Bits of the facts, given the names: what a model that knows them all has learned."""
        return self._sum("entropy")

    @property
    def facts(self) -> int:
        """Facts that there are."""
        return sum(one.facts for one in self.attributes.values())

    @property
    def loss(self) -> float:
        """Bits a fact costs with the model at hand, a mean over facts."""
        return math.fsum(one.facts * one.loss for one in self.attributes.values()) / self.facts

    @property
    def recall(self) -> float:
        """Share of facts whose every token is the likeliest, a mean over facts."""
        return math.fsum(one.facts * one.recall for one in self.attributes.values()) / self.facts

    @property
    def error(self) -> float:
        """Standard error of ``bits``, by sampling; 0 when all facts were asked."""
        return math.sqrt(math.fsum(one.variance for one in self.attributes.values() if one.bits))


class KnowledgeTest:
    """Questions about a population's facts, as batches to be measured again and again.

    Args:
        questions: what a template set asks about the population, each about one attribute of one person.
        tokenizer: the model's.
        n_questions: ask a sample of so many; all of them when None.
        seed: of the sample.
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for questions that are not about one fact each, or a sample that leaves an
            attribute with fewer than two.
    """

    def __init__(
        self,
        questions: QuestionTable,
        tokenizer: Tokenizer,
        *,
        n_questions: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
    ) -> None:
        information = information_bits(questions.population)
        self.entropy = {name: information.attributes.get(name) for name in questions.attributes}
        if unknown := [name for name, bits in self.entropy.items() if bits is None]:
            raise ToolmemError(
                f"templates: {unknown[0]} is no attribute of the people (they have "
                f"{', '.join(information.attributes)}): bits are measured of questions about one fact"
            )
        asked = questions.sample(len(questions) if n_questions is None else n_questions, seed)
        self.asked = asked
        self.complete = len(asked) == len(questions)
        self.people = len(questions.population)
        dialogues = [without_tool(dialogue) for dialogue in questions.dialogues(asked)]
        names = list(self.entropy)
        table = TokenTable.from_dialogues(dialogues, tokenizer)
        order = np.argsort(table.lengths, kind="stable")  # rows of a batch are of like length
        self._generators = {
            spans: DialogTokenGenerator(
                table, batch_size, rows=order, layout="rows", shuffle=False, with_spans=spans
            )
            for spans in (False, True)
        }
        lengths = [answer_length(dialogue, tokenizer) for dialogue in dialogues]
        self._starts = torch.from_numpy(table.lengths.astype(np.int64)) - torch.tensor(lengths)
        self.attribute = np.array([names.index(dialogue.attribute) for dialogue in dialogues])
        self.n_asked = np.bincount(self.attribute, minlength=len(names))
        self.n_there = np.zeros(len(names), np.int64)  # questions, a sample's or not
        for number, name in enumerate(names):
            rows = [block.rows for block in questions.blocks if block.attribute == name]
            self.n_there[number] = sum(map(len, rows))
            if len(np.unique(np.concatenate(rows))) < self.people:
                raise ToolmemError(
                    f"templates: not everybody is asked about {name}: bits are measured of all facts"
                )
        if not self.complete and self.n_asked.min() < 2:
            raise ToolmemError(
                f"n_questions is {n_questions}: ask so many that each attribute comes up twice"
            )

    def token_losses(self, model: LanguageModel) -> tuple[np.ndarray, np.ndarray]:
        """What each question's answer costs.

        Args:
            model: in evaluation mode.

        Returns:
            (questions,) float64 bits, and (questions,) bool, whether every token is the likeliest.
        """
        generator = self._generators[model.attention_mask == "prefix"]
        bits = torch.zeros(len(self._starts), dtype=torch.float64)
        right = torch.ones(len(self._starts), dtype=torch.bool)
        for index in range(generator.batches_per_epoch):
            rows = torch.from_numpy(generator.dialogues_at(index))
            batch = generator.batch_at(index)
            columns = torch.arange(batch.tokens.shape[1])
            # the target of column j is token j + 1
            batch.loss_mask &= columns >= self._starts[rows, None] - 1
            losses, hits = forced(model, batch)
            question = rows.repeat_interleave(batch.loss_mask.sum(1))
            bits.index_add_(0, question, losses / math.log(2))
            right[question[~hits]] = False
        return bits.numpy(), right.numpy()

    def measure(self, model: LanguageModel) -> Knowledge:
        """What a model knows.

        Args:
            model: of any architecture, in evaluation mode.
        """
        bits, right = self.token_losses(model)
        found = {}
        for number, (name, entropy) in enumerate(self.entropy.items()):
            assert entropy is not None
            mine = self.attribute == number
            n, there = int(self.n_asked[number]), int(self.n_there[number])
            variance = 0.0
            if n < there:
                variance = self.people**2 * bits[mine].var(ddof=1) / n * (1 - n / there)
            found[name] = AttributeKnowledge(
                self.people, entropy, float(bits[mine].mean()), float(right[mine].mean()), variance
            )
        return Knowledge(found)


def measure_knowledge(
    model: LanguageModel,
    tokenizer: Tokenizer,
    questions: QuestionTable,
    *,
    n_questions: int | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Knowledge:
    """Bits of a population's facts that a model's weights are shown to hold, by teacher forcing.

    Args:
        model: of any architecture, on any device, in evaluation mode.
        tokenizer: the one that it was trained with.
        questions: what a template set asks about the population (``FactsDataModule.question_table``).
        n_questions: ask a sample of so many; all of them when None.
        seed: of the sample.
        batch_size: dialogues scored at once.

    Raises:
        ToolmemError: for questions that are not about one fact each.
    """
    test = KnowledgeTest(
        questions, tokenizer, n_questions=n_questions, seed=seed, batch_size=batch_size
    )
    return test.measure(model)


def without_tool(dialogue: Dialogue) -> Dialogue:
    """The dialogue without what the database says and the queries that it answers."""
    turns = dialogue.turns
    kept = [
        turn
        for turn, after in zip(turns, [*turns[1:], None], strict=True)
        if turn.role != "database" and (after is None or after.role != "database")
    ]
    return Dialogue(tuple(kept), dialogue.answer, dialogue.attribute, dialogue.person)


def answer_length(dialogue: Dialogue, tokenizer: Tokenizer) -> int:
    """Tokens from a dialogue's answer to its end, the end's own token among them.

    Where the tokenizer joins the answer's first letters to what stands before them, that token is the
    answer's.

    Args:
        dialogue: whose last turn ends with its answer, then at most a full stop.
        tokenizer: the model's.
    """
    said = dialogue.conclusion
    words = tokenizer.encode(said)
    before = tokenizer.encode(said[: said.rindex(dialogue.answer.removesuffix("."))])
    pairs = zip(before, words, strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return len(words) - shared + 1
