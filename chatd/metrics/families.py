"""Which numbers there are. docs/observability.md says what each is good for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from chatd.metrics.asked import Asked
from chatd.metrics.process import ProcessGauges
from chatd.metrics.values import Counter, Family, Gauges, Histogram, Labels, Sample

MAX_PAIRS = 100
"""Models, each with its provider, that have numbers of their own; those after them are `OTHER`.
Prometheus keeps some fifty series for each of them."""

OTHER = "other"
"""What stands for everything that has no label of its own."""

NONE = "none"
"""What stands for who was not there: the provider of a turn that asked nobody."""

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_CHAT = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 8, 12, 20, 30, 60)
_OVERHEAD = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 1, 5)
_STORAGE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAG = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

_ASKED = ("provider", "model")

FAMILIES = [
    Family("chatd_turns_total", "counter", "Turns that ended, by how.", ("result", *_ASKED)),
    Family("chatd_turn_errors_total", "counter", "Turns that ended in an error.", ("code",)),
    Family("chatd_turn_seconds", "histogram", "A turn, until it is stored.", _ASKED, _CHAT),
    Family(
        "chatd_first_token_seconds",
        "histogram",
        "A streamed turn, until its first word.",
        _ASKED,
        _CHAT,
    ),
    Family(
        "chatd_turn_overhead_seconds",
        "histogram",
        "What of a turn is not its providers': before the first was asked, and after the last.",
        (),
        _OVERHEAD,
    ),
    Family("chatd_tokens_total", "counter", "Tokens, as told.", (*_ASKED, "kind")),
    Family("chatd_cost_usd_total", "counter", "What answers cost, in USD.", _ASKED),
    Family("chatd_unknown_cost_total", "counter", "Attempts of unknown cost.", _ASKED),
    Family(
        "chatd_attempts_total",
        "counter",
        "Requests to providers that ended, by how.",
        (*_ASKED, "outcome"),
    ),
    Family("chatd_storage_seconds", "histogram", "Storage.", ("operation",), _STORAGE),
    Family("chatd_storage_errors_total", "counter", "Failures of storage.", ("operation",)),
    Family("chatd_limit_refusals_total", "counter", "Requests that a limit refused.", ("limit",)),
    Family(
        "chatd_http_requests_total",
        "counter",
        "Requests that were answered.",
        ("route", "method", "status"),
    ),
    Family("chatd_http_request_seconds", "histogram", "Requests.", ("route",), _HTTP),
    Family("chatd_event_loop_lag_seconds", "histogram", "Lag of the event loop.", (), _LAG),
    Family("chatd_info", "gauge", "1, with the version.", ("worker", "version")),
    Family("chatd_running_turns", "gauge", "Turns that run.", ("worker",)),
    Family("chatd_open_streams", "gauge", "Answers that are being streamed.", ("worker",)),
    Family("chatd_unstored_turns", "gauge", "Ended turns that storage does not have.", ("worker",)),
    Family("chatd_stuck_turns", "gauge", "Turns given up that do not end.", ("worker",)),
    Family("chatd_shared_up", "gauge", "1 while shared state answers, else 0.", ("worker",)),
    Family(
        "chatd_breaker_state",
        "gauge",
        "0: asked; 1: tried once in a while; 2: left alone.",
        ("worker", *_ASKED),
    ),
    Family("process_resident_memory_bytes", "gauge", "Memory in use.", ("worker",)),
    Family("process_open_fds", "gauge", "Open files.", ("worker",)),
    Family("process_start_time_seconds", "gauge", "Start, in Unix time.", ("worker",)),
    Family("process_cpu_seconds_total", "gauge", "CPU time.", ("worker",)),
]


class Metrics:
    """What a process counts and times. One for each process, whatever else is opened anew."""

    def __init__(self) -> None:
        counters = self._counters = {f.name: Counter(f) for f in FAMILIES if f.kind == "counter"}
        histograms = {f.name: Histogram(f) for f in FAMILIES if f.kind == "histogram"}
        self._histograms = histograms
        self._asked: dict[tuple[str, str], Asked] = {}
        self.gather: Callable[[], list[dict[str, Any]]] = self._alone
        """Snapshots of all processes that serve together, with their numbers."""
        self.sources: dict[str, Gauges] = {"process": ProcessGauges()}
        """Who tells gauges, by a name under which another may take its place."""
        self.turn_errors = counters["chatd_turn_errors_total"]
        self.turn_seconds = histograms["chatd_turn_seconds"]
        self.first_token = histograms["chatd_first_token_seconds"]
        self.overhead = histograms["chatd_turn_overhead_seconds"][()]
        self.storage = histograms["chatd_storage_seconds"]
        self.storage_errors = counters["chatd_storage_errors_total"]
        self.refusals = counters["chatd_limit_refusals_total"]
        self.requests = counters["chatd_http_requests_total"]
        self.request_seconds = histograms["chatd_http_request_seconds"]
        self.lag = histograms["chatd_event_loop_lag_seconds"][()]
        self.open_streams = 0

    def asked(self, provider: str, model: str) -> Asked:
        """The numbers of a provider with a model; the model is `OTHER` once there are too many.

        Both are an operator's words. What a provider calls a model is never a label.
        """
        pair = (provider, model)
        if (asked := self._asked.get(pair)) is not None:
            return asked
        if len(self._asked) >= MAX_PAIRS:
            pair = (provider, OTHER)
        if pair not in self._asked:
            buckets = self.turn_seconds[pair], self.first_token[pair]
            self._asked[pair] = Asked(pair, *buckets)
        return self._asked[pair]

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts a request that was answered."""
        named = method if method in METHODS else OTHER
        self.requests.values[route, named, str(status)] += 1
        self.request_seconds[(route,)].observe(seconds)

    def snapshot(self) -> dict[str, Any]:
        """All numbers as they are now, as JSON can hold them."""
        for asked in self._asked.values():
            for name, labels, count in asked.taken():
                if count:
                    self._counters[name].values[labels] += count
        return {
            "counters": {name: counter.rows() for name, counter in self._counters.items()},
            "histograms": {name: buckets.rows() for name, buckets in self._histograms.items()},
            "gauges": list(self._gauges()),
        }

    def _alone(self) -> list[dict[str, Any]]:
        return [{"number": 1, **self.snapshot()}]

    def load(self, snapshot: Mapping[str, Any]) -> None:
        """Adds what another counted. Its gauges are not taken."""
        for name, rows in snapshot["counters"].items():
            self._counters[name].load(rows)
        for name, rows in snapshot["histograms"].items():
            self._histograms[name].load(rows)

    def _gauges(self) -> Iterable[Sample]:
        yield "chatd_open_streams", (), self.open_streams
        for source in list(self.sources.values()):
            for name, labels, value in source():
                yield name, self._bounded(labels) if len(labels) == len(_ASKED) else labels, value

    def _bounded(self, labels: Labels) -> Labels:
        return self.asked(labels[0], labels[1]).labels
