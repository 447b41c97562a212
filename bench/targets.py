"""What chatd has to reach, as figures of one run, and whether a run shows that it does.

Everything that a run measures is a sample: subject, measure, and a value for each round. Rounds are
interleaved, so the n-th values of two subjects were measured side by side and are compared so.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Samples: TypeAlias = defaultdict[str, defaultdict[str, list[float]]]
"""Values by subject and measure."""


def no_samples() -> Samples:
    """Where samples are put."""
    return defaultdict(lambda: defaultdict(list))


def values_of(samples: Samples, subject: str, measure: str) -> list[float]:
    """What each round shows of a subject; empty when the run did not measure it."""
    found = samples.get(subject)
    return (found.get(measure) if found else None) or []


@dataclass(frozen=True)
class Target:
    """A bound for a measure of a subject.

    :param over: the subject whose value divides it.
    :param beyond: the subject whose value is taken off it.
    :param short: whether the short form holds it.
    :param streams: whether it is missed when a server does not keep up with its streams.
    """

    title: str
    subject: str
    measure: str
    at_least: float | None = None
    at_most: float | None = None
    over: str | None = None
    beyond: str | None = None
    unit: str = ""
    short: bool = False
    streams: bool = False

    def values(self, samples: Samples) -> list[float]:
        """What each round shows; empty when the run did not measure it."""
        own = values_of(samples, self.subject, self.measure)
        other = self.over or self.beyond
        if other is None:
            return own
        pairs = zip(own, values_of(samples, other, self.measure), strict=False)
        return [mine / its if self.over else mine - its for mine, its in pairs]

    @property
    def bound(self) -> str:
        """The bound in words."""
        sign, value = ("≥", self.at_least) if self.at_most is None else ("≤", self.at_most)
        return f"{sign} {value:.4g}{self.unit}"

    def judge(self, samples: Samples) -> Verdict | None:
        """How the run stands to it; None when the run did not measure it."""
        values = self.values(samples)
        if self.streams and values_of(samples, self.subject, "failed"):
            return Verdict(self, math.inf, 0, False, True)
        if not values:
            return None
        value, noise = statistics.median(values), spread(values)
        short_of = (self.at_least or 0) - value if self.at_most is None else value - self.at_most
        return Verdict(self, value, noise, short_of <= 0, short_of > noise)


@dataclass(frozen=True)
class Verdict:
    """The median of a target's rounds, and how far apart the rounds are."""

    target: Target
    value: float
    noise: float
    met: bool
    missed: bool
    """Worse than the bound by more than the noise."""


def spread(values: Sequence[float]) -> float:
    """The noise of a run: what the middle half of its rounds lies within."""
    if len(values) < 2:
        return 0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


TARGETS = (
    Target("turns/s on sqlite, to the limit", "sqlite", "rate", at_least=0.60, over="limit", unit="x", short=True),
    Target("turns/s on supabase, to the limit", "supabase", "rate", at_least=0.30, over="limit", unit="x"),
    Target("turns/s on supabase, to FastAPI + supabase-py, async", "supabase", "rate", at_least=10, over="fastapi_async", unit="x"),
    Target("turns/s on supabase, to FastAPI + supabase-py, sync", "supabase", "rate", at_least=10, over="fastapi_sync", unit="x"),
    Target("turns/s on sqlite, to LiteLLM", "sqlite", "rate", at_least=25, over="litellm", unit="x"),
    Target("CPU per turn on sqlite, to the limit", "sqlite", "cpu", at_most=0.75 / 0.42, over="limit", unit="x", short=True),
    Target("added latency p50 at 100 turns/s", "sqlite", "p50", at_most=3, beyond="mock", unit=" ms"),
    Target("added latency p99 at 100 turns/s", "sqlite", "p99", at_most=10, beyond="mock", unit=" ms"),
    Target("first token added to a stream, p50", "sqlite", "first", at_most=1, beyond="mock", unit=" ms"),
    Target("gap between events of 1,000 streams, p99", "sqlite", "gap", at_most=250, unit=" ms", streams=True),
    Target("a core's share for 1,000 streams", "sqlite", "stream_cpu", at_most=60, unit=" %", streams=True),
    Target("memory of each of 1,000 streams", "sqlite", "stream_memory", at_most=100, unit=" KiB", streams=True),
    Target("memory idle", "sqlite", "idle", at_most=70, unit=" MiB"),
    Target("cold start to the first 200", "sqlite", "cold", at_most=1.0, unit=" s"),
)  # fmt: skip


def verdicts(samples: Samples, *, short: bool) -> list[Verdict]:
    """How a run stands to the targets that it measured, of which the short form holds some."""
    chosen = [target for target in TARGETS if target.short or not short]
    return [verdict for target in chosen if (verdict := target.judge(samples))]
