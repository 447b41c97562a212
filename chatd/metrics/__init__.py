"""What a process counts and times, for Prometheus.

Numbers are kept as plain Python ones, since they are written at every turn and read seldom; what
Prometheus reads is made of them when it asks.
"""

from chatd.metrics.asked import Asked
from chatd.metrics.families import NONE, Metrics
from chatd.metrics.values import Labels, Sample
from chatd.metrics.workers import Place

__all__ = ["NONE", "Asked", "Labels", "Metrics", "Place", "Sample"]
