"""More adapters than slots: who is in the workers, who leaves, and that everybody gets a turn."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from support.world import World, let_tasks_run
from vllm.exceptions import GracefulHTTPError

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.http import schemas
from molehill.api.metrics.prometheus import AdapterCollector
from molehill.api.metrics.worker_stats import Snapshot
from molehill.engine.vllm import protocol

MANY = AdmissionLimits(adapters=2000, loads=4)


def play(world: World, scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(world), 60))


async def ask(w: World, name: str) -> None:
    """One request from its beginning to its end."""
    assert [output async for output in w.generate(name)] == ["first", "last"]


def evictions(w: World) -> dict[tuple[str, str], int]:
    """By adapter and tier, where there are any."""
    return {
        (sample.labels["adapter"], sample.labels["tier"]): int(sample.value)
        for metric in w.registry.events.collect()
        for sample in metric.samples
        if sample.name == "molehill_adapter_evictions_total" and sample.value
    }


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", 1)
        await w.load("b", 2)
        await ask(w, "a")
        await w.load("c", 3)
        assert sorted(w.engine.loaded.values()) == ["a", "c"]
        await ask(w, "b")
        assert sorted(w.engine.loaded.values()) == ["b", "c"]
        assert [g.status.slot.loads for g in w.registry] == [1, 2, 1]

    play(World(tmp_path, slots=2), scenario)


def test_evictions_are_counted_where_they_happen(tmp_path: Path) -> None:
    """One slot, and host memory for one: what leaves the slot pushes out what left before."""

    async def scenario(w: World) -> None:
        w.engine.more.set()
        w.engine.host = 1
        for number, name in enumerate("abc"):
            await w.load(name, number)
        assert evictions(w) == {("a", "worker"): 1, ("a", "host"): 1, ("b", "worker"): 1}
        await ask(w, "b")
        assert evictions(w)["c", "worker"] == evictions(w)["b", "host"] == 1
        await w.registry.unload("a")
        assert "a" not in {name for name, _ in evictions(w)}

    play(World(tmp_path, slots=1), scenario)


@pytest.mark.parametrize(
    ("host", "resident", "reads"),
    [
        (0, ("disk", "disk", "workers"), 1),
        # What it takes the slot of takes its place in host memory before.
        (1, ("disk", "host", "workers"), 1),
        (2, ("host", "host", "workers"), 0),
    ],
)
def test_the_server_says_where_an_adapter_is_as_the_workers_do(
    tmp_path: Path, host: int, resident: tuple[str, ...], reads: int
) -> None:
    """One slot, and host memory for so many. reads: of the one that is asked for then."""

    async def scenario(w: World) -> None:
        w.engine.more.set()
        w.engine.host = host
        for number, name in enumerate("abc"):
            await w.load(name, number)
        assert tuple(info.resident for info in schemas.everything(w.registry)) == resident
        begun = len(w.engine.begun)
        await ask(w, "b")
        assert len(w.engine.begun) - begun == reads

    play(World(tmp_path, slots=1), scenario)


def test_memory_that_is_full_before_the_slots_makes_room_too(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        w.engine.capacity = 1
        await w.load("a", 1)
        await w.load("b", 2)
        assert list(w.engine.loaded.values()) == ["b"]
        await ask(w, "a")
        assert list(w.engine.loaded.values()) == ["a"]

    play(World(tmp_path, slots=4), scenario)


def test_an_adapter_that_is_larger_than_the_memory_disturbs_nobody(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        w.engine.refusal = "found 2 bytes, expected at most 1"
        with pytest.raises(EngineRefusedError, match="at most 1"):
            await w.load("b", 2)
        assert list(w.engine.loaded.values()) == ["a"]

    play(World(tmp_path, slots=2), scenario)


def test_pinned_adapters_stay(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("pinned", 1, pinned=True)
        for n in range(2, 6):
            await w.load(f"a{n}", n)
        assert sorted(w.engine.loaded.values()) == ["a5", "pinned"]
        assert w.registry.get("pinned").status.slot.loads == 1

    play(World(tmp_path, slots=2, admission=MANY), scenario)


def test_a_request_that_pinned_adapters_leave_no_room_for_is_told_so(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.capacity = 1
        await w.load("a", 1)
        await w.load("pinned", 2, pinned=True)
        with pytest.raises(GracefulHTTPError, match="found 1 pinned") as refusal:
            await ask(w, "a")
        assert refusal.value.http_status == 503
        with pytest.raises(EngineRefusedError):
            await w.load("b", 3)
        assert all(generation.status.in_flight == 0 for generation in w.registry)

    play(World(tmp_path, slots=4), scenario)


def test_an_unpinned_adapter_makes_room_for_those_that_wait(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("c", 3)
        await w.load("pinned", 1, pinned=True)
        await w.load("b", 2)
        running = w.generate("b")
        await anext(running)
        waiting = asyncio.create_task(anext(w.generate("c")))
        await let_tasks_run()
        assert not waiting.done()
        await w.registry.pin("pinned", False)
        assert await waiting == "first"
        assert sorted(w.engine.loaded.values()) == ["b", "c"]
        await running.aclose()

    play(World(tmp_path, slots=2), scenario)


def test_what_the_workers_do_not_give_back_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        answer = w.engine.collective_rpc

        async def stuck(method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
            if method == protocol.UNINSTALL.method:
                raise RuntimeError("a worker is gone")
            return await answer(method, args=args)

        monkeypatch.setattr(w.engine, "collective_rpc", stuck)
        await w.registry.unload("a")
        counted = {
            sample.name: sample.value
            for metric in w.registry.events.collect()
            for sample in metric.samples
        }
        assert counted["molehill_adapter_free_failures_total"] == 1
        assert (w.served, w.in_store()) == ({}, [])

    play(World(tmp_path), scenario)


def test_an_adapter_with_a_running_request_is_never_taken_out(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        running = w.generate("a")
        assert await anext(running) == "first"
        loading = asyncio.create_task(w.load("b", 2))
        await let_tasks_run()
        assert list(w.engine.loaded.values()) == ["a"]
        w.engine.more.set()
        assert [output async for output in running] == ["last"]
        await loading
        assert list(w.engine.loaded.values()) == ["b"]

    play(World(tmp_path, slots=1), scenario)


def test_who_runs_and_who_waits_is_told_in_one_series(tmp_path: Path) -> None:
    """Those that wait for a slot too, of which the engine does not know yet."""

    async def scenario(w: World) -> None:
        for number, name in enumerate(("idle", "b", "a")):
            await w.load(name, number)
        assert at_work(w) == ("1", "", "")
        streams = [w.generate("a"), w.generate("a")]
        for stream in streams:
            await anext(stream)
        assert at_work(w) == ("1", "a", "")
        waiting = []
        # `a` yields: what it runs goes on, what comes now waits.
        for name, names in (("b", "b"), ("b", "b"), ("a", "a,b")):
            waiting.append(asyncio.create_task(anext(w.generate(name))))
            await let_tasks_run()
            assert at_work(w) == ("1", "a", names)
        assert requests_waiting(w) == {"idle": 0, "a": 1, "b": 2}
        w.engine.more.set()
        for stream in streams:
            assert [output async for output in stream] == ["last"]
        assert set(await asyncio.gather(*waiting)) == {"first"}

    play(World(tmp_path, slots=1), scenario)


def at_work(w: World) -> tuple[str, ...]:
    families = AdapterCollector(w.registry, Snapshot()).collect()
    (family,) = [family for family in families if family.name == "vllm:lora_requests_info"]
    (sample,) = family.samples
    names = ("max_lora", "running_lora_adapters", "waiting_lora_adapters")
    assert set(sample.labels) == set(names)
    return tuple(sample.labels[name] for name in names)


def requests_waiting(w: World) -> dict[str, float]:
    (family,) = [
        family
        for family in AdapterCollector(w.registry, Snapshot()).collect()
        if family.name == "molehill_adapter_requests_waiting"
    ]
    return {sample.labels["adapter"]: sample.value for sample in family.samples}


def test_a_client_that_stops_waiting_gives_its_turn_up(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("b", 2)
        running = w.generate("b")
        await anext(running)
        waiting = asyncio.create_task(anext(w.generate("a")))
        await let_tasks_run()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await let_tasks_run()
        # `b` no longer has to yield: its next request need not wait for anybody.
        again = w.generate("b")
        assert await anext(again) == "first"
        for stream in (running, again):
            await stream.aclose()
        assert all(generation.status.in_flight == 0 for generation in w.registry)

    play(World(tmp_path, slots=1), scenario)


def test_an_adapter_that_is_unloaded_while_it_waits_goes_after_its_request(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("a", 1)
        await w.load("b", 2)
        waiting = asyncio.create_task(ask(w, "a"))
        await asyncio.sleep(0)
        await w.registry.unload("a")
        await waiting
        await let_tasks_run()
        assert "a" not in w.engine.loaded.values()
        assert len(w.registry.alive()) == len(w.in_store()) == 1

    play(World(tmp_path, slots=1), scenario)


def test_a_hot_adapter_does_not_starve_a_cold_one(tmp_path: Path) -> None:
    """One slot. Eight clients keep `hot` busy without a pause; `cold` gets a request now and then.
    Who waits is passed by one turn of the other at most, however much there is to do."""
    clients, often = 8, 100

    async def scenario(w: World) -> None:
        await w.load("hot", 1)
        await w.load("cold", 2)
        # The double's requests end when `more` is set; here each takes some rounds of the loop.
        engine: Any = w.engine
        engine.more = Rounds(6)
        numbers = {name: w.registry.get(name).lora_int_id for name in ("hot", "cold")}
        done = asyncio.Event()

        async def starts_of_the_other(name: str) -> int:
            """Requests of the other adapter that the engine took while one of `name` ran."""
            before = len(w.engine.served)
            await ask(w, name)
            return sum(number != numbers[name] for number in w.engine.served[before:])

        async def keep_busy() -> list[int]:
            passed = []
            while not done.is_set():
                passed.append(await starts_of_the_other("hot"))
            return passed

        busy = [asyncio.create_task(keep_busy()) for _ in range(clients)]
        cold = []
        for _ in range(often):
            await Rounds(3).wait()
            cold.append(await starts_of_the_other("cold"))
        done.set()
        hot = [passed for counts in await asyncio.gather(*busy) for passed in counts]
        assert max(cold) <= clients
        assert max(hot) <= 1
        # They were in each other's way, and the hot one was served in between.
        assert w.registry.get("cold").status.slot.loads > often / 2
        assert len(hot) >= often

    play(World(tmp_path, slots=1), scenario)


class Rounds:
    """An event that comes after so many rounds of the event loop, however busy the machine is."""

    def __init__(self, number: int) -> None:
        self._number = number

    async def wait(self) -> None:
        for _ in range(self._number):
            await asyncio.sleep(0)


def test_many_adapters_take_turns_in_few_slots(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        for n in range(20):
            await w.load(f"a{n}", n)
        await asyncio.gather(*(ask(w, f"a{n % 20}") for n in range(200)))
        assert len(w.engine.loaded) == 3
        # Requests of one adapter share its turn: it did not come in for each of them.
        assert all(generation.status.slot.loads <= 4 for generation in w.registry)

    play(World(tmp_path, slots=3, admission=MANY), scenario)


@pytest.mark.slow
def test_hundreds_of_registered_adapters_cost_a_request_nothing(tmp_path: Path) -> None:
    """Admitting, counting and releasing a request look at its own adapter only: it takes as many
    lines of Python among 300 adapters as alone."""

    async def scenario(w: World) -> None:
        w.engine.more.set()

        async def lines(name: str) -> int:
            await ask(w, name)
            with counting_lines() as count:
                await ask(w, name)
            return count()

        await w.load("a0", 0)
        alone = await lines("a0")
        assert alone > 20
        for n in range(1, 300):
            await w.load(f"a{n}", n)
        assert len(w.registry) == 300
        # They were taken out meanwhile; the first request of `lines` brings them back.
        assert [await lines(f"a{n}") for n in (0, 150, 299)] == [alone] * 3

    play(World(tmp_path, slots=4, admission=MANY), scenario)


@contextmanager
def counting_lines() -> Iterator[Callable[[], int]]:
    """Lines of molehill that this thread runs, in functions that are called from now on."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_globals.get("__name__", "").startswith("molehill."):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lambda: count
    finally:
        sys.settrace(before)
