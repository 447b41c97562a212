"""Numbers with labels: counters, and histograms of seconds."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Labels = tuple[str, ...]
"""The values of a family's labels, in their order."""

Sample = tuple[str, Labels, float]
"""A gauge's name, its labels and its value now."""

Gauges = Callable[[], Iterable[Sample]]
"""Reads gauges, as they are now."""


@dataclass(frozen=True, slots=True)
class Family:
    """Numbers of one name, as Prometheus is told of them."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()


class Counter:
    """Numbers that only grow, by their labels."""

    __slots__ = ("family", "values")

    def __init__(self, family: Family) -> None:
        self.family = family
        self.values: defaultdict[Labels, float] = defaultdict(float)

    def add(self, *labels: str, amount: float = 1) -> None:
        """Adds to one of them."""
        self.values[labels] += amount

    def rows(self) -> list[Any]:
        """All of it as JSON can hold it."""
        return [[labels, value] for labels, value in self.values.items()]

    def load(self, rows: Iterable[Any]) -> None:
        """Adds what `rows` gave before."""
        for labels, value in rows:
            self.values[tuple(labels)] += value


class Buckets:
    """How often something took how many seconds. `counts` are not cumulated; the last has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one more."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def load(self, counts: Sequence[int], total: float) -> None:
        """Adds what was counted elsewhere with the same bounds."""
        self.counts[:] = [a + b for a, b in zip(self.counts, counts, strict=True)]
        self.total += total


class Histogram(dict[Labels, Buckets]):
    """Buckets by their labels, made when they are first asked for."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.family = family

    def __missing__(self, labels: Labels) -> Buckets:
        buckets = self[labels] = Buckets(self.family.bounds)
        return buckets

    def rows(self) -> list[Any]:
        """All of it as JSON can hold it."""
        return [
            [labels, list(buckets.counts), buckets.total]
            for labels, buckets in self.items()
            if any(buckets.counts)
        ]

    def load(self, rows: Iterable[Any]) -> None:
        """Adds what `rows` gave before."""
        for labels, counts, total in rows:
            self[tuple(labels)].load(counts, total)
