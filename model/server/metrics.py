"""What the server counts and times, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

PREFIX = "xlstm"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Of one server; counters belong to the thread of its event loop."""

    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]]):
        """`gauges`: name -> (what it is, value now), asked for whenever the page is."""
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Gauges(gauges))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, labels, registry=self._registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, registry=self._registry, buckets=SECONDS)

        self.responses = counter("responses", "Answers begun, by path and HTTP status.", "path", "status")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts that were taken on.")
        self.generated_tokens = counter("generated_tokens", "Tokens that were generated for clients.")
        self.sequences = counter("sequences", "Sequences that ended: stop, length, cancelled or error.", "reason")
        self.stalled = counter("stalled_clients", "Clients that took or sent nothing for stall_seconds.")
        self.first_token = seconds("time_to_first_token_seconds", "From a request to its first token.")
        self.answer = seconds("answer_seconds", "From a request to the last token of its sequences.")

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Gauges(Collector):
    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]]):
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        for name, (text, value) in self._gauges().items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
