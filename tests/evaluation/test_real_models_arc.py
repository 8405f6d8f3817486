"""The benchmark of ARC-easy on SmolLM2-135M, on a dozen questions: lm-eval's HFLM answers each alike."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_same_answers_as_the_harness(
    smollm2_gguf, smollm2_checkpoint, shared_data, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import real_models_arc

    try:
        questions = shared_data / "eval" / "arc_easy.jsonl"
        found = real_models_arc.arc_easy(smollm2_gguf, smollm2_checkpoint, questions, 12)
    finally:
        sys.modules.pop("real_models_arc", None)
    assert found["arc_easy_questions"] == 12
    assert found["arc_easy_disagreements"] == 0
    assert found["arc_easy_largest_difference_nats"] < 1e-3  # sums of some dozen float32
    assert found["arc_easy_accuracy_toolmem"] == found["arc_easy_accuracy_lm_eval"]
    assert found["arc_easy_cpu_time_over_lm_eval"] < 1  # 0.6 is for an idle machine to show
