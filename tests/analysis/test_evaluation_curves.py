"""A run's page shows what evaluations of its checkpoints found, joined by step."""

from __future__ import annotations

from test_dynamics_plot import write_run

from toolmem.analysis.curves_plot import families, panels
from toolmem.analysis.page import Request
from toolmem.analysis.sources import RunSource
from toolmem.evaluation.curves import write_point


def test_points_are_curves_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", [0, 0, 0.1, 0.2, 0.3])
    for step, accuracy in ((10, 0.25), (30, 0.5)):
        found = {"arc_easy/accuracy": accuracy, "arc_easy/accuracy/low": 0.1, "divergence/kl": 0.5}
        write_point(run, step, found | {"lambada/perplexity": float("inf")})
    source = RunSource.open(run)
    assert source.metrics["arc_easy/accuracy"] == {10: 0.25, 30: 0.5}
    assert "lambada/perplexity" not in source.metrics
    assert families(source)["tasks"] == ["arc_easy/accuracy"]
    assert families(source)["divergence"] == ["divergence/kl"]
    assert families(source)["recall"] == ["recall/exact_match"]
    drawn = {panel.name: panel for panel in panels(source, Request(None))}
    assert any("tasks" in name for name in drawn)
