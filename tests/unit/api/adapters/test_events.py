"""Counts of loads, refusals, hits and evictions."""

import pytest

from molehill.api.adapters.errors import BadNameError
from molehill.api.adapters.events import LifecycleMetrics
from molehill.engine.adapter.errors import ShapeError


def samples(events: LifecycleMetrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("molehill_adapter_"), *sample.labels.values()): sample.value
        for metric in events.collect()
        for sample in metric.samples
    }


def test_loads_and_refusals_are_told_apart() -> None:
    events = LifecycleMetrics()
    events.begin("a")
    with events.load("a"):
        pass
    with pytest.raises(ShapeError), events.load("b"):
        raise ShapeError("a", "b", "c")
    for _ in range(2):
        with pytest.raises(BadNameError), events.load("b"):
            raise BadNameError
    with pytest.raises(OSError, match="disk"), events.load("b"):
        raise OSError("disk")
    result = samples(events)
    assert result["load_seconds_count",] == result["loading_seconds_count", "a"] == 1
    assert 0 < result["loading_seconds_sum", "a"] == result["load_seconds_sum",]
    assert not [key for key in result if "b" in key]
    refused = {key[1]: value for key, value in result.items() if key[0] == "loads_refused_total"}
    assert refused == {"wrong_shape": 1, "invalid_name": 2, "internal_error": 1}


def test_hits_and_evictions_are_counted_by_adapter_and_tier() -> None:
    events = LifecycleMetrics()
    for name in ("a", "b"):
        events.begin(name)
    events.hit("a", "worker", 0.0)
    events.hit("a", "worker", 0.0)
    events.hit("b", "disk", 0.3)
    events.evicted("b", "worker")
    result = samples(events)
    assert result["cache_hits_total", "a", "worker"] == 2
    assert result["cache_hits_total", "b", "worker"] == 0
    assert result["cache_hits_total", "b", "disk"] == 1
    assert result["evictions_total", "b", "worker"] == 1
    assert result["evictions_total", "b", "host"] == 0
    assert result["wait_seconds_sum", "disk"] == 0.3
    assert (result["wait_seconds_count", "worker"], result["wait_seconds_count", "host"]) == (2, 0)


def test_a_names_series_end_with_it_and_start_anew() -> None:
    events = LifecycleMetrics()
    events.begin("a")
    events.hit("a", "worker", 0.0)
    events.evicted("a", "host")
    events.loaded("a", 1.0)
    events.begin("a")
    assert samples(events)["cache_hits_total", "a", "worker"] == 1
    for _ in range(2):
        events.end("a")
    events.hit("a", "worker", 0.0)
    events.evicted("a", "host")
    events.loaded("a", 1.0)
    assert not [key for key in samples(events) if "a" in key]
    events.begin("a")
    assert samples(events)["cache_hits_total", "a", "worker"] == 0


def test_faults_are_counted() -> None:
    events = LifecycleMetrics()
    events.free_failed()
    for _ in range(2):
        events.manifest_failed()
    result = samples(events)
    assert result["free_failures_total",] == 1
    assert result["molehill_manifest_write_failures_total",] == 2


def test_a_fresh_server_shows_zeros_and_no_creation_times() -> None:
    result = samples(LifecycleMetrics())
    assert result["load_seconds_count",] == 0
    assert not [key for key in result if key[0].endswith("_created")]
