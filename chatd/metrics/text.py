"""Numbers as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from chatd.metrics.families import FAMILIES, Metrics
from chatd.metrics.values import Family, Labels

if TYPE_CHECKING:
    from prometheus_client.core import Metric


def render(snapshots: Iterable[Mapping[str, Any]], accept: str) -> tuple[str, bytes]:
    """The content type and the text, in the format that an `Accept` header asks for.

    Counters and histograms are sums over the workers; gauges have each worker's number.
    """
    # Some 20 ms, and memory, that a process which nobody asks is spared.
    from prometheus_client.exposition import choose_encoder  # noqa: PLC0415
    from prometheus_client.registry import Collector, CollectorRegistry  # noqa: PLC0415

    given = list(snapshots)

    class Numbers(Collector):
        def collect(self) -> Iterable[Metric]:
            return _metrics(given)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Numbers())
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


def _metrics(snapshots: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
    from prometheus_client.core import (  # noqa: PLC0415 (as above)
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    total = Metrics()
    for snapshot in snapshots:
        total.load(snapshot)
    summed = total.snapshot()
    for family in FAMILIES:
        name, told, labels = family.name, family.help, family.labels
        if family.kind == "histogram":
            histogram = HistogramMetricFamily(name, told, labels=labels)
            for values, counts, seconds in summed["histograms"][name]:
                histogram.add_metric(values, _cumulated(family, counts), seconds)
            yield histogram
        elif family.kind == "counter":
            counter = CounterMetricFamily(name, told, labels=labels)
            for values, value in summed["counters"][name]:
                counter.add_metric(values, value)
            yield counter
        else:
            # The CPU time of a process grows, and starts again with another one.
            grows = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            gauge = grows(name, told, labels=labels)
            for values, value in _gauges(snapshots, name):
                gauge.add_metric(values, value)
            yield gauge


def _gauges(snapshots: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[Labels, float]]:
    """The values of a gauge of each worker; of those with the same labels the highest."""
    highest: dict[Labels, float] = {}
    for snapshot in snapshots:
        for named, labels, value in snapshot["gauges"]:
            if named == name:
                key = (str(snapshot["number"]), *labels)
                highest[key] = max(value, highest.get(key, value))
    yield from highest.items()


def _cumulated(family: Family, counts: Sequence[int]) -> list[tuple[str, float]]:
    bounds = [*(str(float(bound)) for bound in family.bounds), "+Inf"]
    return list(zip(bounds, map(float, accumulate(counts)), strict=True))
