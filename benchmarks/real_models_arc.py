"""ARC-easy on SmolLM2-135M against lm-eval's HFLM over transformers, of the same weights on the same cores.

Both are asked by turns, a part of the questions at a time, so that a machine that others use, too, slows them
alike; what is compared is the sum of the turns. Questions are lm-eval's requests (context, continuation), the
model's answer the likeliest continuation, by its sum of log-probabilities and by that over its length.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

PART = 50  # questions of a turn
HF_BATCH = 16  # of 1, 4, 8, 16 and 32 the one of least processor time


class Turn(NamedTuple):
    """What one of the two made of a part."""

    seconds: float
    cpu: float
    totals: list[list[float]]


def requests_of(items: list[Any]) -> list[Any]:
    """lm-eval's requests for multiple-choice questions."""
    from lm_eval.api.instance import Instance

    return [
        Instance("loglikelihood", {}, (option.prompt, " " + option.text), number)
        for number, item in enumerate(items)
        for option in item.options
    ]


def turn(lm: Any, items: list[Any]) -> Turn:
    """Let one of the two answer some questions."""
    requests = requests_of(items)
    began = time.perf_counter(), time.process_time()
    found = lm.loglikelihood(requests, disable_tqdm=True)
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    totals = iter([float(total) for total, _ in found])
    return Turn(seconds, cpu, [[next(totals) for _ in item.options] for item in items])


def answers(turns: list[Turn], items: list[Any], by_length: bool) -> np.ndarray:
    """The number of the choice that each question is answered by."""
    every = [totals for one in turns for totals in one.totals]
    sizes = [[len(option.text) if by_length else 1 for option in item.options] for item in items]
    return np.array([int(np.argmax(np.divide(t, s))) for t, s in zip(every, sizes, strict=True)])


def arc_easy(gguf: Path, checkpoint: Path, questions: Path, limit: int | None) -> dict[str, Any]:
    """Compare speed and answers.

    Args:
        gguf: SmolLM2-135M, which transformers reads for HFLM.
        checkpoint: the same, by ``toolmem convert``.
        questions: ARC-easy, JSONL of query, choices, gold.
        limit: the first so many questions alone; all when None.

    Returns:
        figures, ``arc_easy_time_over_lm_eval`` and ``arc_easy_disagreements`` among them.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from toolmem.evaluation.harness import ToolmemLM
    from toolmem.evaluation.tasks import find_recipe

    items = find_recipe("arc_easy", questions).items(questions)[:limit]
    names = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(**names, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(**names),
        batch_size=HF_BATCH,
    )
    ours = ToolmemLM(str(checkpoint), batch_size=4 * PART)
    both = {"toolmem": ours, "lm_eval": theirs}
    found: dict[str, list[Turn]] = {name: [] for name in both}
    for lm in both.values():
        turn(lm, items[:4])  # what is made at the first call
    for number, start in enumerate(range(0, len(items), PART)):
        for name in list(both) if number % 2 else list(both)[::-1]:
            found[name].append(turn(both[name], items[start : start + PART]))
    seconds = {name: sum(one.seconds for one in turns) for name, turns in found.items()}
    cpu = {name: sum(one.cpu for one in turns) for name, turns in found.items()}
    ratios = [
        mine.seconds / his.seconds
        for mine, his in zip(found["toolmem"], found["lm_eval"], strict=True)
    ]
    apart = {
        by: int(
            (answers(found["toolmem"], items, norm) != answers(found["lm_eval"], items, norm)).sum()
        )
        for by, norm in (("sum", False), ("length", True))
    }
    gold = np.array([item.gold[0] for item in items])
    accuracy = {
        f"accuracy{suffix}_{name}": float((answers(turns, items, norm) == gold).mean())
        for name, turns in found.items()
        for suffix, norm in (("", False), ("_norm", True))
    }
    most = max(
        abs(a - b)
        for mine, his in zip(found["toolmem"], found["lm_eval"], strict=True)
        for one, other in zip(mine.totals, his.totals, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    return {
        "arc_easy_questions": len(items),
        "arc_easy_seconds_toolmem": round(seconds["toolmem"], 2),
        "arc_easy_seconds_lm_eval": round(seconds["lm_eval"], 2),
        "arc_easy_time_over_lm_eval": round(seconds["toolmem"] / seconds["lm_eval"], 4),
        "arc_easy_cpu_time_over_lm_eval": round(cpu["toolmem"] / cpu["lm_eval"], 4),
        "arc_easy_cpu_seconds_toolmem": round(cpu["toolmem"], 2),
        "arc_easy_cpu_seconds_lm_eval": round(cpu["lm_eval"], 2),
        "arc_easy_time_over_lm_eval_median_turn": round(statistics.median(ratios), 4),
        "arc_easy_disagreements": apart["sum"] + apart["length"],
        "arc_easy_disagreements_accuracy": apart["sum"],
        "arc_easy_disagreements_accuracy_norm": apart["length"],
        "arc_easy_largest_difference_nats": most,
        "lm_eval_batch_size": HF_BATCH,
        **{f"arc_easy_{name}": value for name, value in accuracy.items()},
    }
