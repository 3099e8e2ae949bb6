"""What workers tell, summed: over workers, generations and time."""

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from molehill.api.adapters.events import LifecycleMetrics
from molehill.api.metrics import worker_stats
from molehill.api.metrics.engines import EngineCollector
from molehill.api.metrics.prometheus import AdapterCollector, exposition
from molehill.api.metrics.worker_stats import (
    GenerationStats,
    Snapshot,
    StatsByName,
    WorkerStats,
    by_generation,
    compilations,
    seconds,
)
from molehill.engine.routing_stats import RoutingStats, SiteRoutingStats
from molehill.engine.vllm.protocol import (
    AdapterReport,
    RoutingReply,
    StatsReply,
    StatsRequest,
    StepSeconds,
    to_wire,
)


def answer(stage: int, stats: RoutingStats, resident: int | None = 100) -> StatsReply:
    report = AdapterReport("a", resident, stats)
    return StatsReply(stage, {7: report}, seconds=StepSeconds(2.0, 0.5))


def test_tensor_parallel_workers_count_once_but_memory_and_seconds_add_up() -> None:
    stats = RoutingStats(5, 5, 1, 2.5, [5, 4], 60, 40, 1.1, 1, op_seconds=0.5)
    both = replace(stats, op_seconds=1.0)
    assert by_generation([answer(0, stats), answer(0, stats)]) == {
        7: GenerationStats("a", both, 200)
    }


def test_pipeline_stages_add_their_own_sites() -> None:
    first, second = (
        RoutingStats(5, 5, 1, 2.5, [5, 4], 60, 40),
        RoutingStats(5, 5, 0, 1.0, [0, 0, 5], 6, 4),
    )
    both = RoutingStats(5, 10, 1, 3.5, [5, 4, 5], 66, 44)
    assert by_generation([answer(0, first), answer(1, second)]) == {
        7: GenerationStats("a", both, 200)
    }


def test_an_adapter_out_of_the_slots_takes_no_memory() -> None:
    assert by_generation([answer(0, RoutingStats(), None)])[7].resident_bytes is None


def test_seconds_add_up_where_all_workers_measure() -> None:
    one = answer(0, RoutingStats())
    assert seconds([one, one]) == StepSeconds(4.0, 1.0)
    assert seconds([one, replace(one, seconds=None)]) is None
    assert seconds([]) is None


def test_compilations_add_up_over_the_workers_that_compile() -> None:
    one = answer(0, RoutingStats())
    assert compilations([one]) is None
    assert compilations([replace(one, compilations=2), replace(one, compilations=1), one]) == 3


def test_a_name_counts_on_through_a_replacement() -> None:
    totals = StatsByName()
    old, new = GenerationStats("a", RoutingStats(5), 10), GenerationStats("a", RoutingStats(2), 10)
    assert totals.update({1: old}, {1}, {"a"})["a"].tokens == 5
    assert totals.update({1: old, 2: new}, {1, 2}, {"a"})["a"].tokens == 7
    # Drained: told for the last time, then no more.
    drained = GenerationStats("a", RoutingStats(6), None)
    assert totals.update({1: drained, 2: new}, {2}, {"a"})["a"].tokens == 8
    assert (
        totals.update({2: GenerationStats("a", RoutingStats(3), 10)}, {2}, {"a"})["a"].tokens == 9
    )


def test_a_name_that_ended_starts_anew() -> None:
    totals = StatsByName()
    assert totals.update({1: GenerationStats("a", RoutingStats(5), None)}, set(), set()) == {}
    assert (
        totals.update({2: GenerationStats("a", RoutingStats(1), 10)}, {2}, {"a"})["a"].tokens == 1
    )


def test_an_evicted_adapter_is_counted_once() -> None:
    totals = StatsByName()
    evicted = GenerationStats("a", RoutingStats(5), None)
    for _ in range(3):
        assert totals.update({1: evicted}, {1}, {"a"})["a"].tokens == 5


def test_a_generation_on_its_way_out_is_counted_once() -> None:
    totals = StatsByName()
    leaving = {
        1: GenerationStats("a", RoutingStats(5), 10),
        2: GenerationStats("a", RoutingStats(1), 10),
    }
    for _ in range(3):
        assert totals.update(leaving, {2}, {"a"})["a"].tokens == 6


class NoAdapters:
    """The part of a registry that is asked."""

    def __init__(self) -> None:
        self.events = LifecycleMetrics()
        self.residency = SimpleNamespace(slots=4, waiting=list, requests_waiting=Counter)

        self.failures: dict[str, Any] = {}

    def alive(self) -> list[Any]:
        return []

    def loading(self) -> list[Any]:
        return []

    def __len__(self) -> int:
        return 0


class SlowWorkers:
    """Answers when told to."""

    def __init__(self) -> None:
        self.questions = 0
        self.release = asyncio.Event()
        self.dead = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        assert (method, args) == ("molehill_stats", (to_wire(StatsRequest()),))
        self.questions += 1
        await self.release.wait()
        if self.dead:
            raise RuntimeError("engine dead")
        return [to_wire(StatsReply(0, seconds=StepSeconds(float(self.questions), 0.0)))]


def test_busy_workers_are_asked_once_and_the_last_figures_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_stats, "PATIENCE_SECONDS", 0.01)

    async def scenario() -> None:
        workers = SlowWorkers()
        result = WorkerStats(workers, NoAdapters())
        assert (await result.refresh()).seconds is None
        assert (await result.refresh()).seconds is None
        assert workers.questions == 1
        workers.release.set()
        assert (await result.refresh()).seconds == StepSeconds(1.0, 0.0)
        assert (await result.refresh()).seconds == StepSeconds(2.0, 0.0)

    asyncio.run(scenario())


def samples(registry: NoAdapters, snapshot: Snapshot) -> dict[str, float]:
    """As a scrape shows them."""
    text = exposition(AdapterCollector(registry, snapshot), registry.events).decode()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_compilations_are_shown_where_there_are_any_to_count() -> None:
    name = "molehill_kernel_compilations_total"
    assert samples(NoAdapters(), Snapshot(compilations=0))[name] == 0
    assert samples(NoAdapters(), Snapshot(compilations=3))[name] == 3
    assert name not in samples(NoAdapters(), Snapshot())


LATE = 'molehill_worker_scrape_failures_total{kind="late"}'
ERROR = 'molehill_worker_scrape_failures_total{kind="error"}'
AGE = "molehill_worker_figures_age_seconds"


def test_figures_say_how_old_they_are_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy workers, then an answer, then a dead engine."""
    monkeypatch.setattr(worker_stats, "PATIENCE_SECONDS", 0.01)

    async def scenario() -> None:
        workers, registry = SlowWorkers(), NoAdapters()
        result = WorkerStats(workers, registry)

        async def scrape() -> dict[str, float]:
            return samples(registry, await result.refresh())

        first, second = await scrape(), await scrape()
        assert 0 < first[AGE] < second[AGE]
        assert (second[LATE], second[ERROR]) == (2, 0)
        workers.release.set()
        await scrape()
        # It asks anew, and is answered at once.
        fresh = await scrape()
        assert fresh[AGE] < second[AGE]
        workers.dead = True
        await asyncio.sleep(second[AGE])
        stale = await scrape()
        assert stale[AGE] >= fresh[AGE] + second[AGE]
        assert (stale[LATE], stale[ERROR]) == (2, 1)

    asyncio.run(scenario())


def test_an_answer_that_cannot_be_understood_takes_no_scrape_with_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class StrangeWorkers:
        async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
            return [{"stage": 0}]

    registry = NoAdapters()
    result = WorkerStats(StrangeWorkers(), registry)
    snapshot = asyncio.run(result.refresh())
    assert samples(registry, snapshot)[ERROR] == 1
    assert "ProtocolError" in caplog.text


def test_host_bytes_of_names_that_share_weights_are_each_names_own() -> None:
    def generation(name: str, lora_id: int) -> Any:
        request = SimpleNamespace(lora_int_id=lora_id, lora_path="store/digest")
        return SimpleNamespace(name=name, lora_int_id=lora_id, request=request)

    replies = [StatsReply(0, host_bytes={1: 30, 2: 30}), StatsReply(0, host_bytes={2: 30})]
    names = [generation("a", 1), generation("b", 2)]
    assert worker_stats.host_bytes(replies, names) == {"a": 30, "b": 60}


def test_a_dead_engine_leaves_the_last_figures() -> None:
    class DeadWorkers:
        async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
            raise RuntimeError("engine dead")

    assert asyncio.run(WorkerStats(DeadWorkers(), NoAdapters()).refresh()).stats == {}


def test_engines_serve_different_tokens_so_their_figures_add_up() -> None:
    """Two engines of two tensor-parallel workers."""

    class Engines:
        async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
            return [
                to_wire(replace(answer(0, RoutingStats(tokens, 2 * tokens)), engine=engine))
                for engine, tokens in ((1, 7), (0, 5), (1, 7), (0, 5))
            ]

    registry = NoAdapters()
    adapter = SimpleNamespace(name="a", lora_int_id=7)
    registry.alive = lambda: [adapter]  # type: ignore[method-assign]
    snapshot = asyncio.run(WorkerStats(Engines(), registry).refresh())
    assert snapshot.stats == {"a": RoutingStats(12, 24)}
    assert snapshot.resident_bytes == {"a": 400}
    assert [(rank, engine.adapters) for rank, engine in snapshot.engines.items()] == [
        (0, 1),
        (1, 1),
    ]
    lines = exposition(EngineCollector(snapshot.engines)).decode().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        'molehill_engine_adapters{engine="0"} 1.0',
        'molehill_engine_adapters{engine="1"} 1.0',
        'molehill_engine_adapter_resident_bytes{adapter="a",engine="0",tier="worker"} 200.0',
        'molehill_engine_adapter_resident_bytes{adapter="a",engine="0",tier="host"} 0.0',
        'molehill_engine_adapter_resident_bytes{adapter="a",engine="1",tier="worker"} 200.0',
        'molehill_engine_adapter_resident_bytes{adapter="a",engine="1",tier="host"} 0.0',
        'molehill_engine_adapter_tokens_total{adapter="a",engine="0"} 5.0',
        'molehill_engine_adapter_tokens_total{adapter="a",engine="1"} 7.0',
    ]


def test_one_engine_has_no_figures_beside_the_sums() -> None:
    one = {0: worker_stats.EngineStats({"a": RoutingStats(5)}, {"a": 3}, {}, 1)}
    assert exposition(EngineCollector(one)) == b""


def test_routing_by_site_adds_up_over_engines_and_counts_ranks_once() -> None:
    def site(tokens: int) -> SiteRoutingStats:
        return SiteRoutingStats(2, tokens, 1, 0.5, (tokens, 1), 10 * tokens, 1)

    replies = [
        RoutingReply(5, {"q": site(5)}),
        RoutingReply(5, {"q": site(5)}),
        RoutingReply(5, {"v": site(4)}),
        RoutingReply(7, {"q": site(7)}, engine=1),
    ]
    assert worker_stats.routing_of(replies) == (
        12,
        {"q": SiteRoutingStats(2, 12, 2, 1.0, (12, 2), 120, 2), "v": site(4)},
    )
