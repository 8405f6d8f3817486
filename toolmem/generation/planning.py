"""What one step of the engine runs through the model: how many tokens of which lanes, in which passes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from toolmem.generation.speculative import Drafter
    from toolmem.models.language_model import LanguageModel

# What is taken for granted of a machine, to weigh a pass against padding. Only speed hangs on it.
SECONDS_A_LAYER = 60e-6  # of a forward pass, beside its matmuls
BYTES_A_SECOND = 1.5e10  # read bandwidth
FLOPS_A_SECOND = 1e11
# And of this code, for what drafts are worth.
SECONDS_A_STEP = 150e-6  # beside its passes
SECONDS_A_ROW = 8e-6  # of a pass, beside its matmuls
SECONDS_A_DRAFT_CALL = 400e-6  # of a model that drafts, by torch's operations
SECONDS_A_DRAFT = 25e-6  # looking for one, and going along it

# A pass for prompts and answers alone pays when it has so many times its overhead in tokens; until then
# they are held back, for so many steps, while many times as many lanes can write.
WORTH_A_PASS = 4
HELD_STEPS = 4
WRITERS_A_READER = 8


class Pass(NamedTuple):
    """One forward pass.

    Args:
        lanes: (n,) int64.
        counts: (n,) int64, tokens of each.
    """

    lanes: np.ndarray
    counts: np.ndarray


def pass_seconds(layers: float, weights: int, rows: int, bytes_each: int = 4) -> float:
    """What a pass takes: the calls, reading the weights, and the tokens.

    Args:
        layers: that are called.
        weights: that a token is multiplied with.
        rows: tokens.
        bytes_each: of a weight.
    """
    fixed = layers * SECONDS_A_LAYER + weights * bytes_each / BYTES_A_SECOND
    return fixed + rows * 2 * weights / FLOPS_A_SECOND


def _weights(model: LanguageModel) -> int:
    return max(1, model.active_parameters() - model.embedding.weight.numel())


def model_seconds(model: LanguageModel, rows: int) -> float:
    """What a pass of so many tokens takes a model."""
    weight = model.embedding.weight
    return pass_seconds(len(model.blocks), _weights(model), rows, weight.element_size())


def token_seconds(model: LanguageModel) -> float:
    """What one token more takes in a pass."""
    return model_seconds(model, 1) - model_seconds(model, 0)


class DraftCosts(NamedTuple):
    """What drafting costs a lane, in passes: a pass's time over the lanes that share it is one.

    Args:
        token: of each token, drafted and checked.
        lane: of a draft, however long.
    """

    token: float
    lane: float


def draft_costs(model: LanguageModel, drafter: Drafter, lanes: int) -> DraftCosts:
    """What drafts cost each of some lanes that share a pass."""
    row = token_seconds(model) + SECONDS_A_ROW
    a_pass = SECONDS_A_STEP + model_seconds(model, lanes) + lanes * SECONDS_A_ROW
    draft, token = drafter.seconds(lanes)
    draft += SECONDS_A_DRAFT * lanes
    token += drafter.width * row * lanes
    return DraftCosts(max(token / a_pass, 1e-9), draft / a_pass)


def pass_overhead(model: LanguageModel) -> int:
    """What a forward pass costs beside its tokens, in tokens: reading the weights, and the calls."""
    return int(np.clip(model_seconds(model, 0) / token_seconds(model), 4, 256))


def hold_back(waiting: np.ndarray, overhead: int) -> bool:
    """Whether lanes with more than one unread token had better wait for others, to share a pass.

    Args:
        waiting: (n,) int64, unread tokens.
        overhead: of a pass, in tokens.
    """
    long = waiting > 1
    few = WRITERS_A_READER * int(long.sum()) < len(waiting)
    return few and int(waiting[long].sum()) < WORTH_A_PASS * overhead


def budgeted(waiting: np.ndarray, budget: int, whole: bool) -> np.ndarray:
    """How many of their unread tokens lanes read in this step.

    Those that only have one read it, whatever else there is, so that nobody's prompt keeps others from
    speaking; the rest share the budget, first come first served.

    Args:
        waiting: (n,) int64, unread tokens; the lane that came first stands first.
        budget: tokens of a step.
        whole: a lane reads all of its tokens at once or none, for models that look both ways.

    Returns:
        (n,) int64, 0 for lanes that have to wait.
    """
    long = waiting > 1
    if not long.any():
        return waiting
    left = max(budget - int((~long).sum()), 1)
    before = np.cumsum(np.where(long, waiting, 0)) - waiting
    counts = np.where(long, np.clip(left - before, 0, waiting), waiting)
    if whole:
        counts = np.where(counts < waiting, 0, waiting)
        if not counts.any():
            counts[0] = waiting[0]
    return counts


def passes(lanes: np.ndarray, counts: np.ndarray, overhead: int) -> list[Pass]:
    """Group lanes of about as many tokens, so that padding costs less than another pass would.

    Args:
        lanes: (n,) int64.
        counts: (n,) int64, above 0.
        overhead: of a pass, in tokens.
    """
    order = np.argsort(-counts, kind="stable")
    lanes, counts = lanes[order], counts[order]
    starts = np.flatnonzero(np.concatenate(([True], counts[1:] != counts[:-1])))
    groups = []
    begin, width, padding = 0, int(counts[0]), 0
    for start, stop in zip(starts, [*starts[1:], len(counts)], strict=True):
        more = int(stop - start) * (width - int(counts[start]))
        if padding + more > overhead:
            groups.append(Pass(lanes[begin:start], counts[begin:start]))
            begin, width, padding, more = int(start), int(counts[start]), 0, 0
        padding += more
    groups.append(Pass(lanes[begin:], counts[begin:]))
    return groups
