"""The simulated fleet: its residency against plain LRU, its clock, its routing."""

import asyncio
import itertools
import operator
import random
import statistics
from collections import OrderedDict
from dataclasses import replace

import pytest

from molehill.benchmarks.fleet_simulation import FleetTraffic, drawn, main, router, row, serve
from molehill.benchmarks.simulated_replica import SimulatedReplica, Sizing, Visit
from molehill.benchmarks.simulated_time import simulate

SIZING = Sizing(
    slots=20,
    host_copies=40,
    read_seconds=0.1,
    install_seconds=0.02,
    answer_seconds=0.5,
    sequences=64,
)
TRAFFIC = FleetTraffic(adapters=200, skew=1.0, rate=20.0, requests=800)


def in_lru(asked, size):
    """Whether each adapter is in a cache of the `size` that were used last."""
    cache, found = OrderedDict(), []
    for adapter in asked:
        found.append(adapter in cache)
        cache[adapter] = None
        cache.move_to_end(adapter)
        if len(cache) > size:
            cache.popitem(last=False)
    return found


def test_one_request_at_a_time_finds_what_lru_keeps():
    asked = list(itertools.islice(drawn(TRAFFIC, random.Random(0)), 600))

    async def scenario():
        replica = SimulatedReplica(SIZING)
        for adapter in asked:
            await replica.answer(adapter)
        return [visit.tier for visit in replica.visits]

    tiers = simulate(scenario())
    assert [tier == "worker" for tier in tiers] == in_lru(asked, 20)
    # What comes out of host memory is still in it when what makes room for it comes in.
    known = [tier != "disk" for tier in tiers]
    assert all(map(operator.le, in_lru(asked, 20 + 39), known))
    assert all(map(operator.le, known, in_lru(asked, 20 + 40)))


def test_a_cold_start_takes_what_it_is_made_of():
    async def scenario():
        replica = SimulatedReplica(replace(SIZING, slots=1, host_copies=2))
        for adapter in (0, 0, 1, 0):
            await replica.answer(adapter)
        return replica.visits, asyncio.get_running_loop().time()

    visits, end = simulate(scenario())
    assert [visit.tier for visit in visits] == ["disk", "worker", "disk", "host"]
    waited = [visit.seconds for visit in visits]
    assert waited == pytest.approx([0.12, 0.0, 0.12, 0.02])
    assert end == pytest.approx(sum(waited) + 4 * 0.5)


def test_more_cold_starts_than_the_workers_can_read_queue_up():
    """Two at a time, 0.1 s each, are 20 per second at most."""
    sizing = replace(SIZING, slots=60, host_copies=0, answer_seconds=0.1)
    traffic = replace(TRAFFIC, skew=0.0, requests=400)
    below, above = (simulate(serve(replace(traffic, rate=rate), sizing)) for rate in (15.0, 80.0))
    assert statistics.median(below.cold) < 0.5
    assert statistics.median(above.cold) > 2


def test_busy_adapters_are_never_taken_out():
    """As many as there are slots answer at any time: the next one waits for the first to end."""

    async def scenario():
        replica = SimulatedReplica(replace(SIZING, slots=2))
        await asyncio.gather(*(replica.answer(adapter) for adapter in range(3)))
        return [visit.seconds for visit in replica.visits]

    assert simulate(scenario()) == pytest.approx([0.12, 0.14, 0.64])


def test_requests_go_by_adapter_but_for_the_most_popular():
    traffic = replace(TRAFFIC, replicas=4, hot=2)
    choose = router(traffic, random.Random(0))
    assert {choose(0) for _ in range(100)} == {0, 1, 2, 3}
    assert all(len({choose(adapter) for _ in range(20)}) == 1 for adapter in range(2, 30))
    assert {choose(adapter) for adapter in range(2, 60)} == {0, 1, 2, 3}


def test_affinity_makes_slots_of_several_replicas_one_cache():
    traffic = replace(TRAFFIC, replicas=4, requests=150)
    anywhere, by_adapter = (
        simulate(serve(replace(traffic, hot=hot), SIZING)).shares["worker"] for hot in (None, 0)
    )
    assert by_adapter > anywhere + 0.1


def test_what_the_warm_up_saw_does_not_count():
    early, late = Visit("disk", 9.0), Visit("worker", 0.0)
    measured = row([[early, late], [early, early, late, late]])
    assert measured.shares == {"worker": 1.0, "host": 0.0, "disk": 0.0}
    assert (measured.cold, measured.busiest) == ([], pytest.approx(4 / 3))


def test_a_loop_that_would_wait_for_ever_says_so():
    async def scenario():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="waits for another"):
        simulate(scenario())


def test_the_script_prints_a_table(capsys):
    options = ("--adapters", "50", "--requests", "40", "--slots", "8", "--rate", "5")
    main(["--read-ms", "100", "--install-ms", "20", "--table", "reads", *options])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 10
    assert {line.count("|") for line in lines} == {10}
