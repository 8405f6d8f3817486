"""What the server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

if TYPE_CHECKING:
    from toolmem.generation.engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

# metric -> (what it is, its label, {value of the label: name in the engine's stats})
GAUGES: dict[str, tuple[str, str, dict[str, str]]] = {
    "toolmem_lanes": (
        "Dialogues by what they are doing",
        "state",
        {"running": "lanes_running", "waiting": "lanes_waiting", "calling": "lanes_calling"},
    ),
    "toolmem_pages": (
        "Pages of the decoding state",
        "state",
        {"used": "pages_used", "free": "pages_free"},
    ),
}
COUNTERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "toolmem_tokens": (
        "Tokens: written by the model, answered by tools, read from prompts",
        "kind",
        {
            "sampled": "tokens_sampled",
            "forced": "tokens_forced",
            "prefilled": "tokens_prefilled",
        },
    ),
    "toolmem_dialogues": (
        "Dialogues that are over",
        "outcome",
        {
            "finished": "requests_finished",
            "cancelled": "requests_cancelled",
            "failed": "requests_failed",
        },
    ),
}
PLAIN_COUNTERS = {
    "toolmem_tool_calls": ("Tool calls", "tool_calls"),
    "toolmem_tool_errors": ("Tool calls that were answered by an error", "tool_errors"),
}


class _EngineCollector:
    """The engine's own counts, read when they are asked for."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        """Every metric family."""
        stats = self.engine.stats()
        for name, (text, label, values) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=[label])
            for value, key in values.items():
                gauge.add_metric([value], getattr(stats, key))
            yield gauge
        for name, (text, label, values) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=[label])
            for value, key in values.items():
                counter.add_metric([value], getattr(stats, key))
            yield counter
        for name, (text, key) in PLAIN_COUNTERS.items():
            yield CounterMetricFamily(name, text, value=getattr(stats, key))
        yield GaugeMetricFamily(
            "toolmem_state_bytes", "Bytes of the decoding state", value=stats.bytes_used
        )


class Metrics:
    """The counts of one server.

    Args:
        engine: whose lanes, pages and tokens are told too.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "toolmem_http_requests",
            "HTTP requests that were answered, by path and status",
            ["path", "status"],
            registry=self.registry,
        )
        self.open = Gauge(
            "toolmem_completions_open", "Chat completions under way", registry=self.registry
        )
        self.vanished = Counter(
            "toolmem_clients_vanished",
            "Clients that were gone before their answer was complete",
            registry=self.registry,
        )
        self.seconds = Histogram(
            "toolmem_completion_seconds",
            "Seconds from a chat request to the end of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "toolmem_first_token_seconds",
            "Seconds from a chat request to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._finished = 0
        self._total = 0.0

    def finished(self, seconds: float) -> None:
        """Note an answer that is complete."""
        self.seconds.observe(seconds)
        self._finished += 1
        self._total += seconds

    @property
    def mean_seconds(self) -> float:
        """Mean time that an answer took; 0 before the first."""
        return self._total / self._finished if self._finished else 0.0

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
