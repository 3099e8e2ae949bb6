"""What each of several engines holds and has served, as Prometheus metrics."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from molehill.api.metrics.worker_stats import EngineStats


class EngineCollector(Collector):
    """engines: by data-parallel rank, which vLLM's metrics have as `engine` too. Nothing of a
    single one, whose figures AdapterCollector has."""

    def __init__(self, engines: Mapping[int, EngineStats]) -> None:
        self._engines = {str(rank): stats for rank, stats in engines.items()}

    def collect(self) -> Iterator[Metric]:
        if len(self._engines) < 2:
            return
        yield self._adapters()
        yield self._bytes()
        yield self._tokens()

    def _adapters(self) -> Metric:
        adapters = GaugeMetricFamily(
            "molehill_engine_adapters",
            "Generations in the slots of the engine's workers.",
            labels=["engine"],
        )
        for engine, stats in self._engines.items():
            adapters.add_metric([engine], stats.adapters)
        return adapters

    def _bytes(self) -> Metric:
        resident = GaugeMetricFamily(
            "molehill_engine_adapter_resident_bytes",
            "Bytes that the adapter takes in the slots of the engine's workers, and in their host "
            "memory while it is out of the slots.",
            labels=["engine", "adapter", "tier"],
        )
        for engine, stats in self._engines.items():
            for name, size in stats.resident_bytes.items():
                resident.add_metric([engine, name, "worker"], size)
                resident.add_metric([engine, name, "host"], stats.host_bytes.get(name, 0))
        return resident

    def _tokens(self) -> Metric:
        tokens = CounterMetricFamily(
            "molehill_engine_adapter_tokens",
            "Tokens that ran through the adapter on the engine.",
            labels=["engine", "adapter"],
        )
        for engine, stats in self._engines.items():
            for name, total in stats.stats.items():
                tokens.add_metric([engine, name], total.tokens)
        return tokens
