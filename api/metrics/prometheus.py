"""Prometheus metrics per adapter, beside vLLM's own.

Labels are names of loaded adapters only, never what clients send, and an adapter's series end when
its memory is freed.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.adapters.status import AdapterState
from molehill.api.metrics.worker_stats import Snapshot
from molehill.engine.routing_stats import RoutingStats

COUNTERS = (
    ("molehill_adapter_tokens", "tokens", "Tokens that ran through the adapter."),
    ("molehill_router_decisions", "decisions", "Routing decisions: one token at one router."),
    ("molehill_soft_routed", "soft", "Routing decisions that fell back to all experts."),
    (
        "molehill_adapter_flops",
        "flops_done",
        "FLOPs of routers and chosen experts' low-rank products; a multiply-add is two.",
    ),
    (
        "molehill_adapter_flops_avoided",
        "flops_avoided",
        "FLOPs that the experts would have taken that routers did not choose.",
    ),
)


def of_state(registry: AdapterRegistry, state: AdapterState) -> int:
    """Generations, those of mixes by request too."""
    return sum(generation.status.state is state for generation in registry.alive())


class AdapterCollector(Collector):
    """Metric families of what is in the engine now."""

    def __init__(self, registry: AdapterRegistry, snapshot: Snapshot) -> None:
        self._time = time.time()
        self._loaded = len(registry)
        self._states = {
            AdapterState.SERVING: of_state(registry, AdapterState.SERVING),
            AdapterState.LOADING: len(registry.loading()),
            AdapterState.DRAINING: of_state(registry, AdapterState.DRAINING),
            AdapterState.FAILED: len(registry.failures),
        }
        self._snapshot = snapshot
        self._in_flight: Counter[str] = Counter()
        self._stored: Counter[str] = Counter()
        for generation in registry.alive():
            self._in_flight[generation.name] += generation.status.in_flight
            self._stored[generation.name] += generation.content.num_bytes
        self._waiting = registry.residency.requests_waiting()
        self._lora_labels = {
            "max_lora": str(registry.residency.slots),
            "waiting_lora_adapters": joined(registry.residency.waiting()),
            "running_lora_adapters": joined(g for g in registry.alive() if g.status.running),
        }
        self._stats = {name: snapshot.stats.get(name, RoutingStats()) for name in self._in_flight}

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(
            "molehill_adapters_loaded", "Adapters that are served by name.", self._loaded
        )
        yield GaugeMetricFamily(
            "molehill_worker_figures_age_seconds",
            "Seconds since these worker statistics were collected; since the start where there are "
            "none yet.",
            self._snapshot.age,
        )
        yield self._by_state()
        yield self._lora_requests()
        yield from self._requests()
        yield self._bytes()
        yield from self._counters()
        yield self._activated()
        yield self._entropy()
        yield self._imbalance()
        yield self._experts()
        yield from self._seconds()
        yield from self._compilations()

    def _by_state(self) -> Metric:
        states = GaugeMetricFamily(
            "molehill_adapters",
            "Adapters by state, as GET /v1/adapters lists them.",
            labels=["state"],
        )
        for state, number in self._states.items():
            states.add_metric([state], number)
        return states

    def _lora_requests(self) -> Metric:
        """vLLM's metric in one series: a new set of adapters takes the place of the one before."""
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters that requests run on and wait for, at the time that is the value.",
            labels=list(self._lora_labels),
        )
        info.add_metric(list(self._lora_labels.values()), self._time)
        return info

    def _requests(self) -> Iterator[Metric]:
        in_flight = GaugeMetricFamily(
            "molehill_adapter_requests_in_flight",
            "Requests that run on the adapter, on replaced weights too.",
            labels=["adapter"],
        )
        for name, running in self._in_flight.items():
            in_flight.add_metric([name], running)
        yield in_flight
        waiting = GaugeMetricFamily(
            "molehill_adapter_requests_waiting",
            "Of them, requests that wait for a slot of the adapter.",
            labels=["adapter"],
        )
        for name in self._in_flight:
            waiting.add_metric([name], self._waiting[name])
        yield waiting

    def _bytes(self) -> Metric:
        resident = GaugeMetricFamily(
            "molehill_adapter_resident_bytes",
            "Bytes that the adapter takes: in the slots of all workers, in their host memory while "
            "it is out of the slots, and in the store on disk.",
            labels=["adapter", "tier"],
        )
        for name, stored in self._stored.items():
            resident.add_metric([name, "worker"], self._snapshot.resident_bytes.get(name, 0))
            resident.add_metric([name, "host"], self._snapshot.host_bytes.get(name, 0))
            resident.add_metric([name, "disk"], stored)
        return resident

    def _counters(self) -> Iterator[Metric]:
        for name, field, text in COUNTERS:
            family = CounterMetricFamily(name, text, labels=["adapter"])
            for adapter, total in self._stats.items():
                family.add_metric([adapter], getattr(total, field))
            yield family

    def _activated(self) -> Metric:
        activated = CounterMetricFamily(
            "molehill_experts_activated",
            "Experts that routing decisions chose.",
            labels=["adapter"],
        )
        for name, total in self._stats.items():
            activated.add_metric([name], sum(total.expert_tokens))
        return activated

    def _entropy(self) -> Metric:
        entropy = SummaryMetricFamily(
            "molehill_router_entropy",
            "Entropy of the routers' probabilities over its maximum, per decision.",
            labels=["adapter"],
        )
        for name, total in self._stats.items():
            entropy.add_metric([name], total.decisions, total.entropy)
        return entropy

    def _imbalance(self) -> Metric:
        imbalance = GaugeMetricFamily(
            "molehill_expert_imbalance",
            "Tokens of a router's busiest expert over the mean of its experts since the load, "
            "averaged over the routers: 1 is even. No sample before the first decision.",
            labels=["adapter"],
        )
        for name, total in self._stats.items():
            if total.imbalanced:
                imbalance.add_metric([name], total.imbalance / total.imbalanced)
        return imbalance

    def _experts(self) -> Metric:
        experts = CounterMetricFamily(
            "molehill_expert_tokens",
            "Routing decisions that chose the expert, over all routers.",
            labels=["adapter", "expert"],
        )
        for name, total in self._stats.items():
            for expert, chosen in enumerate(total.expert_tokens):
                experts.add_metric([name, str(expert)], chosen)
        return experts

    def _seconds(self) -> Iterator[Metric]:
        """Nothing where the workers do not measure them."""
        seconds = self._snapshot.seconds
        if seconds is None:
            return
        yield CounterMetricFamily(
            "molehill_step_seconds",
            "Wall time of forward passes and sampling, summed over workers.",
            seconds.steps,
        )
        spent = CounterMetricFamily(
            "molehill_adapter_op_seconds",
            "Wall time of the adapter ops in those steps, by the adapters' FLOPs.",
            labels=["adapter"],
        )
        share = GaugeMetricFamily(
            "molehill_adapter_op_share",
            "The adapter's share of the steps' wall time since the start.",
            labels=["adapter"],
        )
        for name, total in self._stats.items():
            spent.add_metric([name], total.op_seconds)
            if seconds.steps:
                share.add_metric([name], total.op_seconds / seconds.steps)
        yield spent
        yield share

    def _compilations(self) -> Iterator[Metric]:
        """Nothing where the workers compile no kernels at run time."""
        late = self._snapshot.compilations
        if late is not None:
            what = "Compilations of GPU kernels after the start, for which a step waited."
            yield CounterMetricFamily("molehill_kernel_compilations", what, late)


def joined(generations: Iterable[Generation]) -> str:
    """Their names, each once. None has a comma in it."""
    return ",".join(sorted({generation.name for generation in generations}))


def exposition(*collectors: Collector) -> bytes:
    """Their families in Prometheus's text format."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    return generate_latest(registry)
