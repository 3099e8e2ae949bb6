"""Prometheus metrics per adapter, beside vLLM's own.

Workers count on their own; a scrape asks them. Labels are names of loaded adapters only, never what
clients send, and an adapter's series end when its memory is freed.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from molehill.api.figures import Figures, figures
from molehill.api.generation import Generation
from molehill.api.registry import AdapterRegistry

logger = logging.getLogger("vllm.molehill")

# A scrape does not wait longer for busy workers; it then shows the figures of the last one.
PATIENCE_SECONDS = 3.0


class Workers(Protocol):
    """The part of vLLM's engine client that reaches the workers."""

    async def collective_rpc(self, method: str) -> list[Any]:
        """One answer per worker."""


class WorkerStats:
    """The workers' counters, refreshed when asked for.

    With data parallelism vLLM hands on the answer of the first engine only, so the figures are that
    engine's.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._last: list[Any] = []
        self._asking: asyncio.Task[None] | None = None

    async def refresh(self) -> list[Any]:
        """The workers' answers, or the last ones if they take too long.

        The question itself is never cut short: vLLM would take its late answer for the next one's.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
        try:
            await asyncio.wait_for(asyncio.shield(self._asking), PATIENCE_SECONDS)
        except TimeoutError:
            logger.warning("Workers are busy; adapter metrics are those of the last scrape")
        return self._last

    async def _ask(self) -> None:
        try:
            self._last = await self._workers.collective_rpc("molehill_stats")
        except Exception:
            # A dead engine must not take the metrics with it that show it.
            logger.exception("Adapter metrics could not be read from the workers")


class AdapterCollector(Collector):
    """Metric families of what is in the engine now."""

    def __init__(self, registry: AdapterRegistry, workers: list[Any]) -> None:
        self._loaded = len(registry)
        self._in_flight: Counter[str] = Counter()
        self._figures: dict[str, Figures] = {}
        for generation in registry.alive():
            self._count(generation, workers)

    def _count(self, generation: Generation, workers: list[Any]) -> None:
        self._in_flight[generation.name] += generation.in_flight
        total = self._figures.setdefault(generation.name, Figures())
        total.add(generation.past)
        total.add(figures(workers, generation.lora_int_id))

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "molehill_adapters_loaded", "Adapters that are served by name.", self._loaded
        )
        yield from self._gauges()
        yield from self._counters()
        yield self._entropy()
        yield self._experts()

    def _gauges(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "molehill_adapter_requests_in_flight",
            "Requests that run on the adapter, on replaced weights too.",
            labels=["adapter"],
        )
        resident = GaugeMetricFamily(
            "molehill_adapter_resident_bytes",
            "Bytes that the adapter takes on all workers.",
            labels=["adapter"],
        )
        for name, total in self._figures.items():
            in_flight.add_metric([name], self._in_flight[name])
            resident.add_metric([name], total.bytes)
        yield from (in_flight, resident)

    def _counters(self) -> Iterator[Metric]:
        tokens, decisions, activated, soft = (
            CounterMetricFamily(f"molehill_{name}", text, labels=["adapter"])
            for name, text in (
                ("adapter_tokens", "Tokens that ran through the adapter."),
                ("router_decisions", "Routing decisions: one token at one router."),
                ("experts_activated", "Experts that routing decisions chose."),
                ("soft_routed", "Routing decisions that fell back to all experts."),
            )
        )
        for name, total in self._figures.items():
            tokens.add_metric([name], total.tokens)
            decisions.add_metric([name], total.decisions)
            activated.add_metric([name], total.expert_tokens.total())
            soft.add_metric([name], total.soft)
        yield from (tokens, decisions, activated, soft)

    def _entropy(self) -> Metric:
        entropy = SummaryMetricFamily(
            "molehill_router_entropy",
            "Entropy of the routers' probabilities over its maximum, per decision.",
            labels=["adapter"],
        )
        for name, total in self._figures.items():
            entropy.add_metric([name], total.decisions, total.entropy)
        return entropy

    def _experts(self) -> Metric:
        experts = CounterMetricFamily(
            "molehill_expert_tokens",
            "Routing decisions that chose the expert, over all routers.",
            labels=["adapter", "expert"],
        )
        for name, total in self._figures.items():
            for expert, chosen in sorted(total.expert_tokens.items()):
                experts.add_metric([name, str(expert)], chosen)
        return experts


def exposition(registry: AdapterRegistry, workers: list[Any]) -> bytes:
    """The families in Prometheus's text format."""
    collectors = CollectorRegistry()
    collectors.register(AdapterCollector(registry, workers))
    return generate_latest(collectors)
