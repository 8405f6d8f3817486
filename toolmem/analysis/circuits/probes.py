"""Probes: at which layer and token a linear map reads a fact from the stream.

Shapes: n people or dialogues, d features, c classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from toolmem.analysis.circuits.dialogues import Told, side_by_side
from toolmem.analysis.circuits.hooks import record
from toolmem.analysis.circuits.lens import lens_points
from toolmem.errors import ToolmemError
from toolmem.models import LanguageModel


class Probed(NamedTuple):
    """How well a fact is read at a place.

    Args:
        accuracy: of a linear probe on dialogues about people that it was not fitted on.
        control: the same with the labels shuffled among dialogues: what such a probe reaches by itself.
        guess: the share of the most frequent label.
    """

    accuracy: float
    control: float
    guess: float


def ridge(
    features: Tensor, labels: Tensor, n_classes: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """A linear map to one number a class, least squares with a penalty, solved in closed form.

    Args:
        features: (n, d) float64.
        labels: (n,) int64.
        n_classes: c.
        penalty: on squared weights, in units of dialogues; the intercept has none.

    Returns:
        weights (d, c) and intercepts (c,).
    """
    wanted = torch.nn.functional.one_hot(labels, n_classes).to(features.dtype)
    centre, share = features.mean(0), wanted.mean(0)
    x = features - centre
    gram = x.T @ x + penalty * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, x.T @ (wanted - share))
    return weights, share - centre @ weights


def folds_of(groups: Sequence[str], n_folds: int, seed: int) -> Tensor:
    """A fold for each dialogue, (n,) int64, all of a group's in one.

    Args:
        groups: whom each is about.
        n_folds: how many.
        seed: of who comes into which.

    Raises:
        ToolmemError: for fewer groups than folds.
    """
    names = sorted(set(groups))
    if n_folds < 2 or len(names) < n_folds:
        raise ToolmemError(
            f"a probe over {n_folds} folds needs 2 folds or more, and as many people; there are {len(names)} "
            "people: ask about more"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))
    fold = {name: int(place) % n_folds for name, place in zip(names, order, strict=True)}
    return torch.tensor([fold[name] for name in groups])


def probe(
    features: Tensor,
    labels: Sequence[object],
    groups: Sequence[str],
    *,
    n_folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
) -> Probed:
    """Cross-validated accuracy of a linear probe, beside that of one with shuffled labels.

    Args:
        features: (n, d); each is brought to mean 0 and variance 1 by the fold that is fitted on.
        labels: (n,), anything that compares.
        groups: (n,), whom each is about: nobody is fitted on and tested.
        n_folds: how many.
        penalty: of ``ridge``.
        seed: of folds and shuffling.

    Raises:
        ToolmemError: for too few people.
    """
    x = features.detach().double()
    names = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    y = torch.tensor([names[label] for label in labels], device=x.device)
    folds = folds_of(groups, n_folds, seed).to(x.device)
    generator = torch.Generator().manual_seed(seed)
    shuffled = y[torch.randperm(len(y), generator=generator).to(x.device)]
    hits = [0, 0]
    for fold in range(n_folds):
        fitted, tested = folds != fold, folds == fold
        mean, spread = x[fitted].mean(0), x[fitted].std(0)
        z = (x - mean) / torch.where(spread > 1e-9, spread, 1.0)
        for kind, wanted in enumerate((y, shuffled)):
            weights, intercepts = ridge(z[fitted], wanted[fitted], len(names), penalty)
            said = (z[tested] @ weights + intercepts).argmax(-1)
            hits[kind] += int((said == wanted[tested]).sum())
    guess = torch.bincount(y).max().item() / len(y)
    return Probed(hits[0] / len(y), hits[1] / len(y), guess)


def probe_answers(
    model: LanguageModel,
    told: Sequence[Told],
    places: Sequence[str] | None = None,
    **options: float,
) -> dict[tuple[str, str], Probed]:
    """Where the answer's first token is readable: after each layer, at each place of the dialogue.

    Args:
        model: any architecture.
        told: dialogues that ask for one attribute of many people.
        places: names of ``Told.places``; all that every dialogue has when None.
        **options: of ``probe``.

    Returns:
        by (point, place).

    Raises:
        ToolmemError: for too few people.
    """
    told = [one for one in told if one.answer]
    if not told:
        raise ToolmemError("no dialogue here has an answer to probe for")
    labels = [int(one.tokens[one.answer[0]]) for one in told]
    people = [one.dialogue.person for one in told]
    if places is None:
        places = [name for name in told[0].places if all(name in one.places for one in told)]
    rows = side_by_side(told, model.embedding.weight.device)
    found = record(model, rows.tokens, lens_points(model), spans=rows.spans)
    row = torch.arange(len(told))
    return {
        (point, place): probe(
            stream[row, torch.tensor([one.places[place] for one in told])],
            labels, people, **options,  # type: ignore[arg-type]
        )
        for point, stream in found.items()
        for place in places
    }  # fmt: skip
