"""Counts of loads, refusals, hits and evictions."""

import pytest

from molehill.api.errors import BadNameError
from molehill.api.events import LifecycleMetrics
from molehill.engine.errors import ShapeError


def samples(events: LifecycleMetrics) -> dict[tuple[str, ...], float]:
    return {
        (sample.name.removeprefix("molehill_adapter_"), *sample.labels.values()): sample.value
        for metric in events.collect()
        for sample in metric.samples
    }


def test_loads_and_refusals_are_told_apart() -> None:
    events = LifecycleMetrics()
    with events.load():
        pass
    with pytest.raises(ShapeError), events.load():
        raise ShapeError("a", "b", "c")
    for _ in range(2):
        with pytest.raises(BadNameError), events.load():
            raise BadNameError
    with pytest.raises(OSError, match="disk"), events.load():
        raise OSError("disk")
    found = samples(events)
    assert found["load_seconds_count",] == 1
    refused = {key[1]: value for key, value in found.items() if key[0] == "loads_refused_total"}
    assert refused == {"wrong_shape": 1, "invalid_name": 2, "internal_error": 1}


def test_hits_and_evictions_are_counted_by_tier() -> None:
    events = LifecycleMetrics()
    events.hit("worker")
    events.hit("worker")
    events.hit("disk")
    events.evicted("worker")
    found = samples(events)
    assert found["cache_hits_total", "worker"] == 2
    assert found["cache_hits_total", "disk"] == 1
    assert found["evictions_total", "worker"] == 1


def test_faults_are_counted() -> None:
    events = LifecycleMetrics()
    events.free_failed()
    for _ in range(2):
        events.manifest_failed()
    found = samples(events)
    assert found["free_failures_total",] == 1
    assert found["molehill_manifest_write_failures_total",] == 2


def test_a_fresh_server_shows_zeros_and_no_creation_times() -> None:
    found = samples(LifecycleMetrics())
    assert found["evictions_total", "worker"] == 0
    assert not [key for key in found if key[0].endswith("_created")]
