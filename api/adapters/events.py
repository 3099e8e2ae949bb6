"""Counts what happens to adapters as they come and go."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from molehill.api.adapters.errors import RequestError
from molehill.api.adapters.traffic import LimitKind
from molehill.engine.adapter.errors import AdapterError

# Seconds. A load reads, checks and copies: milliseconds for small adapters, minutes over a network.
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
# Of a request that waits for its adapter: to copy it takes milliseconds, a queue seconds.
WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

Tier = Literal["worker", "host", "disk"]
# Nothing leaves the disk to make room.
EVICTING: tuple[Tier, ...] = ("worker", "host")

# Who starts tasks that nobody awaits.
TaskKind = Literal["adapters_file", "metrics", "registry", "residency", "restart", "watch"]

# What becomes of a request that does not activate its adapter.
NotInvoked = Literal["base", "refused"]

# Why a scrape shows the workers' figures of an earlier one.
ScrapeFailure = Literal["error", "late"]


class CounterOf(NamedTuple):
    """What prometheus_client makes a counter of; exposed, its name ends in `_total`."""

    name: str
    documentation: str
    labelnames: tuple[str, ...] = ()


REFUSED = CounterOf(
    "molehill_adapter_loads_refused", "Loads that were refused, by the error's type.", ("kind",)
)
HITS = CounterOf(
    "molehill_adapter_cache_hits",
    "Requests by the tier where they found their adapter; from `host` and `disk` it had to "
    "be brought in.",
    ("adapter", "tier"),
)
NOT_INVOKED = CounterOf(
    "molehill_requests_not_invoked",
    "Prompts without the tokens that activate the adapter, by what became of them.",
    ("adapter", "outcome"),
)
LIMITED = CounterOf(
    "molehill_adapter_limit_refusals",
    "Requests that were refused for a limit of the adapter's traffic, by the limit.",
    ("adapter", "reason"),
)
EVICTIONS = CounterOf(
    "molehill_adapter_evictions",
    "How often the adapter made room for others in the tier.",
    ("adapter", "tier"),
)
UNFREED = CounterOf(
    "molehill_adapter_free_failures", "Adapters that the workers did not give back."
)
UNWRITTEN = CounterOf(
    "molehill_manifest_write_failures",
    "Changes of the adapters that a restart would not know, as the disk did not take them.",
)
SCRAPES = CounterOf(
    "molehill_worker_scrape_failures",
    "Scrapes without new figures of the workers: by an error, or as they were too busy.",
    ("kind",),
)
TASKS = CounterOf(
    "molehill_task_failures",
    "Faults of what goes on in the background, by whose work it was.",
    ("task",),
)


class LifecycleMetrics(Collector):
    """Loads, refusals, cache hits, evictions and faults since the start of the process.

    Only names between `begin` and `end` have series of their own: never what clients write.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._names: set[str] = set()
        self._loads = Histogram(
            "molehill_adapter_load_seconds",
            "From the request for a load to an adapter that serves.",
            buckets=BUCKETS,
            registry=self._registry,
        )
        self._loading = Summary(
            "molehill_adapter_loading_seconds",
            "The same of each adapter, over what was loaded under its name.",
            ["adapter"],
            registry=self._registry,
        )
        self._refused = self._counter(REFUSED)
        self._hits = self._counter(HITS)
        self._waits = Histogram(
            "molehill_adapter_wait_seconds",
            "What requests waited for a slot of their adapter, by the tier where they found it.",
            ["tier"],
            buckets=WAIT_BUCKETS,
            registry=self._registry,
        )
        for tier in get_args(Tier):
            self._waits.labels(tier)
        self._not_invoked = self._counter(NOT_INVOKED)
        self._limited = self._counter(LIMITED)
        self._evictions = self._counter(EVICTIONS)
        self._unfreed = self._counter(UNFREED)
        self._unwritten = self._counter(UNWRITTEN)
        self._scrapes = self._counter(SCRAPES, get_args(ScrapeFailure))
        self._tasks = self._counter(TASKS, get_args(TaskKind))

    def _counter(self, counter: CounterOf, known: Iterable[str] = ()) -> Counter:
        """known: values of its label, whose series start at zero."""
        made = Counter(*counter, registry=self._registry)
        for value in known:
            made.labels(value)
        return made

    def begin(self, name: str) -> None:
        """The name has weights: its series start, at zero."""
        self._names.add(name)
        for metric, labels in self._series(name):
            metric.labels(*labels)

    def end(self, name: str) -> None:
        """The name has none any more."""
        if name in self._names:
            self._names.remove(name)
            for metric, labels in self._series(name):
                metric.remove(*labels)

    def _series(self, name: str) -> Iterator[tuple[Counter | Summary, tuple[str, ...]]]:
        """All that are one adapter's, with their labels."""
        yield self._loading, (name,)
        for tier in get_args(Tier):
            yield self._hits, (name, tier)
        for tier in EVICTING:
            yield self._evictions, (name, tier)
        for outcome in get_args(NotInvoked):
            yield self._not_invoked, (name, outcome)
        for reason in get_args(LimitKind):
            yield self._limited, (name, reason)

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            # Of no use beside the process's own start time.
            metric.samples = [s for s in metric.samples if not s.name.endswith("_created")]
            yield metric

    @contextmanager
    def load(self, name: str) -> Iterator[None]:
        """Around a load: counts what it came to."""
        start = time.perf_counter()
        with self.refusals():
            yield
        self.loaded(name, time.perf_counter() - start)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Around what can refuse a load."""
        try:
            yield
        except (RequestError, AdapterError) as error:
            # A class's own constant, so that the label takes no values from outside.
            self.refused(type(error).kind)
            raise
        except Exception:
            self.refused("internal_error")
            raise

    def loaded(self, name: str, seconds: float) -> None:
        self._loads.observe(seconds)
        # It may have been unloaded since.
        if name in self._names:
            self._loading.labels(name).observe(seconds)

    def refused(self, kind: str) -> None:
        self._refused.labels(kind).inc()

    def hit(self, name: str, tier: Tier, seconds: float) -> None:
        """seconds: until the adapter was in a slot for the request."""
        self._waits.labels(tier).observe(seconds)
        if name in self._names:
            self._hits.labels(name, tier).inc()

    def not_invoked(self, name: str, outcome: NotInvoked) -> None:
        if name in self._names:
            self._not_invoked.labels(name, outcome).inc()

    def limited(self, name: str, reason: LimitKind) -> None:
        if name in self._names:
            self._limited.labels(name, reason).inc()

    def evicted(self, name: str, tier: Tier) -> None:
        if name in self._names:
            self._evictions.labels(name, tier).inc()

    def free_failed(self) -> None:
        self._unfreed.inc()

    def manifest_failed(self) -> None:
        self._unwritten.inc()

    def task_failed(self, kind: TaskKind) -> None:
        self._tasks.labels(kind).inc()

    def scrape_failed(self, kind: ScrapeFailure) -> None:
        self._scrapes.labels(kind).inc()
