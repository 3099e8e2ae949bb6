"""vLLM's own metrics, without what only grows."""

from contextlib import suppress
from typing import Any

from prometheus_client import REGISTRY, generate_latest
from vllm.v1.metrics.prometheus import get_prometheus_registry


def drop_adapter_sets(engine_client: Any) -> None:
    """Ends `vllm:lora_requests_info`.

    It has one series for every set of adapters that ran or waited together, and keeps them all: of
    a hundred adapters that come and go, more sets than can be held. AdapterCollector has the set
    of now under the same name.
    """
    manager = engine_client.logger_manager
    for logger in manager.stat_loggers if manager else ():
        gauge = getattr(logger, "gauge_lora_info", None)
        if gauge is not None:
            logger.gauge_lora_info = None
            # It is in no registry where vLLM writes metrics to files.
            with suppress(KeyError):
                REGISTRY.unregister(gauge)


def exposition() -> bytes:
    """vLLM's metrics in Prometheus' text format."""
    text: bytes = generate_latest(get_prometheus_registry())
    return text
