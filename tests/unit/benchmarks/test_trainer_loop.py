"""The sums of the trainer's benchmark; a run of it needs a server and is no test."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest

from molehill.benchmarks import trainer_loop
from molehill.benchmarks.trainer_loop import MemorySample, PolicyStreams, slope


@pytest.fixture
def results() -> dict[str, Any]:
    """Quiet from 0 to 10 and from 20 to 30, where tokens come every 0.1 s; every 0.2 s between."""
    streams = PolicyStreams(client=None, model="policy")
    streams.gaps = [(0.1 * i, 0.1) for i in range(1, 101)]
    streams.gaps += [(10 + 0.2 * i, 0.2) for i in range(1, 50)]
    streams.gaps += [(20.05 + 0.1 * i, 0.1) for i in range(1, 90)]
    streams.outcomes = Counter({"": 40, "ReadError: x": 2})
    trainer: Any = SimpleNamespace(seconds=[0.3, 0.5, 0.4])
    memory = [MemorySample(10.0 + i, 1000.0 + i / 60) for i in range(10)]
    result = trainer_loop.summary(streams, trainer, [0.0, 10.0, 20.0, 30.0], memory)
    return {**result, "adapter_bytes": 10_000_000}


def test_the_ratio_is_of_one_run(results: dict[str, Any]) -> None:
    assert results["itl_ratio"] == pytest.approx(2.0)
    assert results["tokens"] == {"quiet": 189, "pushing": 49}
    assert results["mb_per_minute"] == pytest.approx(1.0)
    latency, failed, memory, pushes = trainer_loop.report(results)
    assert "pushing / quiet: 2.000 (at most 1.25); 200 / 100 ms" in latency
    assert "2 of 42 (at most 0) {'ReadError: x': 2}" in failed
    assert "+1.0 MB/minute" in memory
    assert "3 of 10.0 MB, median 0.40 s, longest 0.50 s" in pushes


def test_what_is_not_reached_is_named(results: dict[str, Any]) -> None:
    assert trainer_loop.missed(results, long_enough=True) == ["itl_ratio", "failed"]
    assert trainer_loop.missed(results, long_enough=False) == ["failed"]
    results.update(itl_ratio=1.25, failed=0, mb_per_minute=11.0)
    assert trainer_loop.missed(results, long_enough=True) == ["mb_per_minute"]
    assert trainer_loop.missed(results, long_enough=False) == []


def test_flat_memory_has_no_slope() -> None:
    assert slope([]) == 0
    assert slope([MemorySample(0.0, 5.0)]) == 0
    assert slope([MemorySample(float(at), 5.0) for at in range(9)]) == pytest.approx(0.0)
