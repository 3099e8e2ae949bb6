"""Prometheus metrics of the adapters file: how far what serves is what it wants."""

import time
from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molehill.api.sources.desired_state import DesiredState, DesiredStateReconciler


class DesiredCollector(Collector):
    """The series of one adapters file, as it stands when this is made."""

    def __init__(self, file: DesiredStateReconciler) -> None:
        self._states = Counter(status.state for status in file.statuses())
        self._age = time.time() - (file.read_at or file.started_at)
        self._failures = file.read_failures

    def collect(self) -> Iterator[Metric]:
        states = GaugeMetricFamily(
            "molehill_desired_adapters",
            "Entries of the adapters file by state, as GET /v1/adapters lists them.",
            labels=["state"],
        )
        for state in DesiredState:
            states.add_metric([state], self._states[state])
        yield states
        yield GaugeMetricFamily(
            "molehill_adapters_file_age_seconds",
            "Since the adapters file was last read and understood; since the start where it never "
            "was.",
            self._age,
        )
        yield CounterMetricFamily(
            "molehill_adapters_file_failures",
            "Looks at the adapters file that could not read or understand it.",
            self._failures,
        )
