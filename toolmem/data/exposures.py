"""How many optimizer steps show each fact a given number of times."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from toolmem.data.modules.facts import FactsDataModule
from toolmem.errors import ToolmemError


def steps_of_exposures(data: Any, exposures: int) -> int:
    """Steps after which training has shown each fact this often: an exposure is a fact seen once.

    An epoch of d dialogues about f facts, in batches as even as can be, is ceil(d / batch size) steps and
    shows each fact d / f times (once, unless template sets or paraphrases tell it several times).

    Args:
        data: a DataModule.
        exposures: of each fact, on the mean.

    Raises:
        ToolmemError: for data that is not facts, or leaves some out.
    """
    if exposures < 1:
        raise ToolmemError(f"exposures is {exposures}: it must be 1 or more")
    if not isinstance(data, FactsDataModule):
        raise ToolmemError(
            f"exposures: {type(data).__name__} has no facts to count; give trainer.max_steps instead"
        )
    if data.held_out:
        raise ToolmemError(
            "exposures: with data.init_args.held_out some facts are shown and some are not; give "
            "trainer.max_steps instead"
        )
    questions = data.question_table
    facts = sum(
        len(np.unique(np.concatenate([b.rows for b in questions.blocks if b.attribute == name])))
        for name in questions.attributes
    )
    dialogues = len(data.table)
    steps_of_epoch = math.ceil(dialogues / data.batch_size)
    return math.ceil(exposures * facts * steps_of_epoch / dialogues)
