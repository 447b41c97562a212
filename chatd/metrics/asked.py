"""Numbers of one provider with one model: so many are written at a turn that they are kept together."""

from __future__ import annotations

from collections.abc import Iterator

from chatd.domain import Usage
from chatd.metrics.values import Buckets, Labels

Count = tuple[str, Labels, float]
"""A counter's name, its labels and what is to be added to it."""


class Asked:
    """What is counted of a provider with a model since `taken` was called."""

    __slots__ = (
        "cached",
        "cost",
        "first_token",
        "input",
        "labels",
        "outcomes",
        "output",
        "reasoning",
        "results",
        "seconds",
        "unknown",
    )

    def __init__(self, labels: Labels, seconds: Buckets, first_token: Buckets) -> None:
        self.labels = labels
        self.seconds = seconds
        self.first_token = first_token
        self._clear()

    def _clear(self) -> None:
        self.results: dict[str, int] = {}
        self.outcomes: dict[str, int] = {}
        self.input = self.output = self.cached = self.reasoning = self.unknown = 0
        self.cost = 0.0

    def ended(self, result: str) -> None:
        """Counts a turn by how it ended."""
        self.results[result] = self.results.get(result, 0) + 1

    def tried(self, outcome: str) -> None:
        """Counts an attempt by how it ended."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def took(self, usage: Usage) -> None:
        """Counts what an attempt took."""
        self.input += usage.input_tokens or 0
        self.output += usage.output_tokens or 0
        self.cached += usage.cached_tokens or 0
        self.reasoning += usage.reasoning_tokens or 0
        self.cost += usage.cost_usd or 0.0

    def taken(self) -> Iterator[Count]:
        """All of it; it counts from nothing afterwards."""
        for result, count in self.results.items():
            yield "chatd_turns_total", (result, *self.labels), count
        for outcome, count in self.outcomes.items():
            yield "chatd_attempts_total", (*self.labels, outcome), count
        for kind in ("input", "output", "cached", "reasoning"):
            yield "chatd_tokens_total", (*self.labels, kind), getattr(self, kind)
        yield "chatd_cost_usd_total", self.labels, self.cost
        yield "chatd_unknown_cost_total", self.labels, self.unknown
        self._clear()
