"""A run's circuits at each of its checkpoints: everything of this package, measured on the same dialogues."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolmem.analysis.circuits.ablation import (
    exactness,
    exactness_without,
    mean_activations,
    recall_without,
)
from toolmem.analysis.circuits.dialogues import Told, kinds_of_copies, tell
from toolmem.analysis.circuits.lens import lens_readings
from toolmem.analysis.circuits.nodes import Node, branches, neurons
from toolmem.analysis.circuits.patching import Contrast, contrast_copies, patch_effects
from toolmem.analysis.circuits.points import attention_layers
from toolmem.analysis.circuits.probes import Probed, probe_answers
from toolmem.analysis.circuits.scores import (
    attention_weights,
    copy_scores,
    induction_scores,
    logit_effects,
    ov_copying,
    previous_token_scores,
    repeated_tokens,
)
from toolmem.errors import ToolmemError
from toolmem.evaluation.recall import RecallResult, measure_recall

if TYPE_CHECKING:
    from toolmem.checkpoints import LoadedCheckpoint
    from toolmem.data.dialogues import Dialogue
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models import LanguageModel
    from toolmem.tools import Toolbox

FEWEST_TO_PROBE = 20
MOST_NEURONS = 512
N_FOLDS = 5
COPIES = {
    "name in query": "copies the name into the query",
    "name": "copies the name into the last turn",
    "answer": "copies the answer",
}


@dataclass(frozen=True)
class Material:
    """What every checkpoint is measured on.

    Args:
        told: dialogues about which it is asked, the shortest first, which is the one that is shown.
        probed: dialogues that ask for one attribute of many people.
        copies: kinds of copies in ``told``.
        contrasts: rows that patching compares, by kind of copy.
        vocabulary: (k,) int64, tokens of which random rows are made.
    """

    told: list[Told]
    probed: list[Told]
    copies: list[str]
    contrasts: dict[str, Contrast]
    vocabulary: Tensor


@dataclass(frozen=True)
class Snapshot:
    """A model at one checkpoint.

    Args:
        step: optimizer steps taken.
        scores: of attention's heads, by what they score (``previous token``, ``induction``, ...).
        effects: of all heads, direct effects on the logits of what is copied, by kind of copy.
        weights: (s, s) uint8 by head, attention in the dialogue shown, 255 for all.
        lens: (s,) by point, the probability of the right next token in the dialogue shown.
        exact: ``exactness`` of the whole model.
        without: the same with each branch replaced by its mean over the dialogues.
        patched: effects of each branch, by kind of copy; none where it tells clean and corrupted alike.
        probed: where the answer's first token is readable, by (point, place).
    """

    step: int
    scores: dict[str, dict[Node, float]]
    effects: dict[str, dict[Node, float]]
    weights: dict[Node, Tensor]
    lens: dict[str, Tensor]
    exact: dict[str, float]
    without: dict[Node, dict[str, float]]
    patched: dict[str, dict[Node, float]]
    probed: dict[tuple[str, str], Probed]


def material(
    dialogues: Sequence[Dialogue], tokenizer: Tokenizer, probed: Sequence[Dialogue] = ()
) -> Material:
    """Dialogues made ready.

    Args:
        dialogues: what a model is asked, with the expected turns.
        tokenizer: the model's.
        probed: dialogues that ask for one attribute of many people; too few of them are left out.

    Raises:
        ToolmemError: without any dialogue.
    """
    told = sorted((tell(d, tokenizer) for d in dialogues), key=lambda one: len(one.tokens))
    if not told:
        raise ToolmemError("there is no dialogue to look at: the factbase has no such people")
    copies = kinds_of_copies(told)
    contrasts = {}
    for what in copies:
        try:
            contrasts[what] = contrast_copies(told, what)
        except ToolmemError:  # too few dialogues: the others are still to be seen
            continue
    roles = torch.tensor(list(tokenizer.role_ids.values()))
    words = torch.cat([one.tokens for one in told]).unique()
    people = {dialogue.person for dialogue in probed}
    return Material(
        told,
        [tell(d, tokenizer) for d in probed] if len(people) >= FEWEST_TO_PROBE else [],
        copies,
        contrasts,
        words[~torch.isin(words, roles)],
    )


def snapshot(model: LanguageModel, given: Material, step: int) -> Snapshot:
    """Measure a model.

    Args:
        model: one with attention.
        given: dialogues.
        step: optimizer steps taken.

    Raises:
        ToolmemError: for a model without attention.
    """
    attention_layers(model)
    tokens = repeated_tokens(model, vocabulary=given.vocabulary)
    scores = {
        "previous token": previous_token_scores(model, tokens),
        "induction": induction_scores(model, tokens),
    }
    scores |= {COPIES[what]: copy_scores(model, given.told, what) for what in given.copies}
    if eigenvalues := ov_copying(model):
        scores["OV eigenvalues"] = eigenvalues
    shown = given.told[0].tokens[None].to(model.embedding.weight.device)
    weights = attention_weights(model, shown)
    readings = lens_readings(model, shown)
    nodes = branches(model)
    patched = {}
    for what, contrast in given.contrasts.items():
        try:
            patched[what] = patch_effects(model, contrast, nodes)
        except ToolmemError:  # it tells them alike, as it does early in training
            continue
    return Snapshot(
        step,
        scores,
        {what: logit_effects(model, given.told, what) for what in given.copies},
        {node: (255 * w[0]).round().to(torch.uint8).cpu() for node, w in weights.items()},
        {point: reading.log_probs[0].exp().cpu() for point, reading in readings.items()},
        exactness(model, given.told),
        exactness_without(model, given.told, nodes, mean_activations(model, given.told, nodes)),
        patched,
        probe_answers(model, given.probed, n_folds=N_FOLDS) if given.probed else {},
    )


@dataclass(frozen=True)
class Removed:
    """What a model recalls without its parts, each replaced by its mean over the dialogues.

    Args:
        whole: with all parts.
        recall: without each branch, in generated dialogues.
        neurons: ``exactness`` without each neuron; empty where there are too many to try.
    """

    whole: RecallResult
    recall: dict[Node, RecallResult]
    neurons: dict[Node, dict[str, float]]


def removed(
    model: LanguageModel,
    tokenizer: Tokenizer,
    given: Material,
    toolbox: Toolbox | None = None,
) -> Removed:
    """Recall without each part of a model, and exactness without each neuron.

    Args:
        model: any architecture.
        tokenizer: the model's.
        given: dialogues.
        toolbox: answers its queries; None when it has no tool.
    """
    nodes, units = branches(model), neurons(model)
    units = units if len(units) <= MOST_NEURONS else []
    means = mean_activations(model, given.told, [*nodes, *units])
    asked = [one.dialogue for one in given.told]
    return Removed(
        measure_recall(model, tokenizer, asked, toolbox=toolbox),
        recall_without(model, tokenizer, asked, nodes, means, toolbox=toolbox),
        exactness_without(model, given.told, units, means),
    )


def evolution(
    checkpoints: Iterable[LoadedCheckpoint],
    dialogues: Sequence[Dialogue],
    probed: Sequence[Dialogue] = (),
) -> tuple[Material, list[Snapshot]]:
    """Measure a run's checkpoints, one after the other, by step.

    Args:
        checkpoints: of one run; each is let go before the next is loaded, if it comes from a generator.
        dialogues: what the models are asked.
        probed: dialogues that ask for one attribute of many people.

    Returns:
        the dialogues made ready, and the measurements.

    Raises:
        ToolmemError: without a checkpoint, or for a model without attention.
    """
    found: dict[int, Snapshot] = {}
    given: Material | None = None
    for checkpoint in checkpoints:
        if given is None:
            given = material(dialogues, checkpoint.tokenizer, probed)
        found[checkpoint.step] = snapshot(checkpoint.model, given, checkpoint.step)
    if given is None:
        raise ToolmemError("there is no checkpoint to look at")
    return given, [found[step] for step in sorted(found)]


def one_attribute(dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """Of some dialogues those that ask for the attribute that is asked for most often."""
    counts: dict[str, int] = {}
    for dialogue in dialogues:
        counts[dialogue.attribute] = counts.get(dialogue.attribute, 0) + 1
    most = max(counts, key=lambda name: counts[name], default="")
    return [dialogue for dialogue in dialogues if dialogue.attribute == most]


def leading(scores: Iterable[Mapping[str, Mapping[Node, float]]], n: int) -> list[Node]:
    """The heads that score highest in anything at any time, at most ``n``, in the order of the model."""
    best: dict[Node, float] = {}
    for name, by_head in _pairs(scores):
        if name != "OV eigenvalues":  # of what a head would say, not of what it does
            for node, value in by_head.items():
                best[node] = max(best.get(node, 0.0), value if value == value else 0.0)
    chosen = set(sorted(best, key=lambda node: -best[node])[:n])
    return [node for node in best if node in chosen]


def _pairs(
    scores: Iterable[Mapping[str, Mapping[Node, float]]],
) -> Iterator[tuple[str, Mapping[Node, float]]]:
    for each in scores:
        yield from each.items()
