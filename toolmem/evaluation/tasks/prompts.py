"""A question as tokens: examples before it, plain or in the model's chat format."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError
from toolmem.evaluation.scoring import Pair, encode_pair, first_token, fitted, prefix_of
from toolmem.evaluation.tasks.items import Item, shown

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.evaluation.tasks.recipes import TaskRecipe


def drawn_shots(recipe: TaskRecipe, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """The examples that stand before each question, and what is asked.

    Args:
        recipe: of the task.
        items: of its file.

    Returns:
        the same examples for all questions, so that they are read once; and the questions, without the
        examples where these are of the same file.

    Raises:
        ToolmemError: when there are not as many.
    """
    if not recipe.n_shots:
        return [], list(items)
    pool = list(items) if recipe.shots_file is None else recipe.items(recipe.shots_file)
    own = recipe.shots_file is None
    if len(pool) < recipe.n_shots + own:
        where = "the task's file" if own else recipe.shots_file
        raise ToolmemError(
            f"{recipe.source}: n_shots is {recipe.n_shots}, and {where} has {len(pool)} rows: ask for fewer"
        )
    chosen = random.Random(recipe.seed).sample(range(len(pool)), recipe.n_shots)
    shots = [pool[number] for number in chosen]
    if not own:
        return shots, list(items)
    return shots, [item for number, item in enumerate(items) if number not in set(chosen)]


class Prompter:
    """Makes tokens of questions.

    Args:
        recipe: of the task.
        tokenizer: the model's.
        shots: examples before each question.

    Raises:
        ToolmemError: for a chat format that the tokenizer has not.
    """

    def __init__(self, recipe: TaskRecipe, tokenizer: Tokenizer, shots: Sequence[Item]) -> None:
        self.recipe = recipe
        self.tokenizer = tokenizer
        self._shown = [shown(shot) for shot in shots]
        self._first = first_token(tokenizer)
        self._turns = None
        if recipe.chat:
            from toolmem.data.turn_format import turn_format

            self._turns = turn_format(tokenizer)

    def pair(self, preamble: str, prompt: str, text: str, longest: int) -> Pair:
        """What is scored.

        Args:
            preamble: before everything.
            prompt: the question.
            text: the answer that is scored.
            longest: tokens that the model takes; of longer ones the beginning is left out.

        Raises:
            ToolmemError: when there is nothing to score, or no room for it.
        """
        if self._turns is None:
            before = self._plainly(preamble, prompt)
            found = encode_pair(self.tokenizer, before, self.recipe.delimiter + text, self._first)
        else:
            after = self.tokenizer.encode(text)
            found = Pair(tuple(self._as_chat(preamble, prompt)), tuple(after))
        return fitted(found, longest)

    def prompt(self, preamble: str, prompt: str, longest: int) -> list[int]:
        """Tokens up to where the model begins to answer.

        Args:
            preamble: before everything.
            prompt: the question.
            longest: of longer ones the beginning is left out.
        """
        if self._turns is not None:
            tokens = self._as_chat(preamble, prompt)
        else:
            tokens = self.tokenizer.encode(self._plainly(preamble, prompt).rstrip())
            if tokens:
                tokens = [*prefix_of(self.tokenizer), *tokens]
            elif self._first is not None:
                tokens = [self._first]
        return tokens[-longest:]

    def _plainly(self, preamble: str, prompt: str) -> str:
        joined = [
            f"{question}{self.recipe.delimiter}{answer}{self.recipe.separator}"
            for question, answer in self._shown
        ]
        return preamble + "".join(joined) + prompt

    def _as_chat(self, preamble: str, prompt: str) -> list[int]:
        assert self._turns is not None
        said = [*self._shown, (prompt, "")]
        said[0] = (preamble + said[0][0], said[0][1])
        tokens: list[int] = []
        before = ""
        for question, answer in said:
            for role, text in (("user", question), ("assistant", answer)):
                tokens += [token for token, _ in self._turns.marks(before, role)]
                tokens += self.tokenizer.encode(text) if text else []
                before = role
        return tokens
