"""What is ready for a slot does not wait behind what is not, and nobody is kept out for it."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from support.world import World, let_tasks_run
from vllm.exceptions import GracefulHTTPError

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.preparation import Preparation
from molehill.api.adapters.residents import Residents

MANY = AdmissionLimits(adapters=100, loads=4)


def play(world: World, scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(world), 20))


async def on_disk(w: World, name: str, seed: int) -> int:
    """Loads what the workers have not read yet; its id."""
    loaded = await w.load(name, seed, eager=False)
    assert not loaded.generation.status.slot.loads
    return loaded.generation.lora_int_id


async def running(w: World, name: str) -> AsyncGenerator[str, None]:
    """A request that has its place in the workers, and goes on until it is closed."""
    stream = w.generate(name)
    assert await asyncio.wait_for(anext(stream), 5) == "first"
    return stream


async def filled(w: World) -> None:
    """All slots hold adapters that nobody uses; what is loaded next stays on disk."""
    for n in range(w.residency.slots):
        await w.load(f"filler-{n}", 100 + n)


def test_a_slow_read_holds_up_nobody_behind_it(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await filled(w)
        slow, quick = [await on_disk(w, name, n) for n, name in enumerate(("slow", "quick"))]
        w.engine.slow = {slow}
        first = asyncio.create_task(running(w, "slow"))
        await let_tasks_run()
        second = await running(w, "quick")
        assert not first.done()
        assert w.engine.begun[-2:] == [slow, quick]
        w.engine.slow = set()
        await (await first).aclose()
        await second.aclose()

    play(World(tmp_path, slots=2), scenario)


def test_nobody_leaves_a_slot_for_what_is_not_read_yet(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        w.engine.slow = {await on_disk(w, "slow", 2)}
        first = await running(w, "a")
        waiting = asyncio.create_task(running(w, "slow"))
        await let_tasks_run()
        # `a` need not yield yet.
        await (await running(w, "a")).aclose()
        w.engine.slow = set()
        await let_tasks_run()
        behind = asyncio.create_task(running(w, "a"))
        await let_tasks_run()
        assert not waiting.done()
        assert not behind.done()
        await first.aclose()
        await (await waiting).aclose()
        await (await behind).aclose()

    play(World(tmp_path, slots=1), scenario)


def test_what_waits_next_is_read_while_the_first_waits_for_room(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        first, second, third = [await on_disk(w, name, 2 + n) for n, name in enumerate("bcd")]
        busy = await running(w, "a")
        waiting = [asyncio.create_task(running(w, name)) for name in "bcd"]
        await let_tasks_run()
        # No more than the workers hold prepared.
        assert w.engine.begun[-2:] == [first, second]
        await busy.aclose()
        for task in waiting:
            await (await task).aclose()
        assert w.engine.begun[-3:] == [first, second, third]
        assert w.engine.calls[-1] == ("install", third)

    play(World(tmp_path, slots=1), scenario)


def test_the_first_that_is_read_has_the_next_turn_and_the_queue_keeps_its_order(
    tmp_path: Path,
) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        ids = {name: await on_disk(w, name, 2 + n) for n, name in enumerate("bc")}
        w.engine.slow = {ids["b"]}
        busy = await running(w, "a")
        waiting = [asyncio.create_task(running(w, name)) for name in "bc"]
        await let_tasks_run()
        # It began to wait first, and is ready before there is room.
        w.engine.slow = set()
        await asyncio.sleep(0.3)
        await busy.aclose()
        for task in waiting:
            await (await task).aclose()
        installs = [lora_id for call, lora_id in w.engine.calls if call == "install"]
        assert installs == [1, ids["b"], ids["c"]]

    play(World(tmp_path, slots=1), scenario)


def test_what_fits_goes_before_what_is_too_large_once_and_yields_to_it(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await filled(w)
        ids = {name: await on_disk(w, name, n) for n, name in enumerate(("busy", "large", "small"))}
        w.engine.large = {ids["large"]}
        busy = await running(w, "busy")
        for n in range(3):
            await w.registry.unload(f"filler-{n}")
        large = asyncio.create_task(running(w, "large"))
        await let_tasks_run()
        small = await running(w, "small")
        assert not large.done()
        # The next requests of both queue behind it.
        behind = [asyncio.create_task(running(w, name)) for name in ("small", "busy")]
        await let_tasks_run()
        await small.aclose()
        await let_tasks_run()
        # It has gone before it once.
        assert not any(task.done() for task in (large, *behind))
        await busy.aclose()
        await (await large).aclose()
        for task in behind:
            await (await task).aclose()
        assert all(generation.status.in_flight == 0 for generation in w.registry)

    play(World(tmp_path, slots=3, admission=MANY), scenario)


def test_a_busy_small_one_does_not_keep_a_large_one_out(tmp_path: Path) -> None:
    """Two small adapters are asked for without a pause; the large one needs all of the memory."""

    async def scenario(w: World) -> None:
        w.engine.more = type("Clock", (), {"wait": lambda self: asyncio.sleep(0.002)})()
        ids = {name: (await w.load(name, n)).generation.lora_int_id for n, name in enumerate("abl")}
        await w.registry.unload("l")
        w.engine.large = {ids["l"] + 1}
        done = asyncio.Event()

        async def keep_busy(name: str) -> None:
            while not done.is_set():
                assert [output async for output in w.generate(name)] == ["first", "last"]

        clients = [asyncio.create_task(keep_busy(name)) for name in "aabb"]
        await let_tasks_run()
        await asyncio.wait_for(w.load("l", 3), 5)
        assert [output async for output in w.generate("l")] == ["first", "last"]
        done.set()
        await asyncio.gather(*clients)

    play(World(tmp_path, slots=3), scenario)


def test_a_late_probe_holds_up_nobody(tmp_path: Path) -> None:
    proceed = asyncio.Event()

    async def probe(generation: Any) -> None:
        if generation.name == "late":
            await proceed.wait()

    async def scenario(w: World) -> None:
        await filled(w)
        late = await on_disk(w, "late", 1)
        await on_disk(w, "other", 2)
        first = asyncio.create_task(running(w, "late"))
        await let_tasks_run()
        second = await running(w, "other")
        assert not first.done()
        # Nor is it taken out meanwhile, or found by a request that came later.
        later = asyncio.create_task(running(w, "late"))
        await let_tasks_run()
        assert not later.done()
        assert w.engine.begun.count(late) == 1
        proceed.set()
        for stream in (await first, await later, second):
            await stream.aclose()
        assert w.registry.get("late").status.slot.loads == 1

    play(World(tmp_path, slots=2, probe=probe), scenario)


def test_what_is_prepared_and_not_wanted_any_more_is_let_go_of(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        lora_id = await on_disk(w, "b", 2)
        busy = await running(w, "a")
        waiting = asyncio.create_task(running(w, "b"))
        await let_tasks_run()
        waiting.cancel()
        await let_tasks_run()
        assert w.engine.calls[-1] == ("discard", lora_id)
        await busy.aclose()

    play(World(tmp_path, slots=1), scenario)


@pytest.mark.parametrize("place", [(Residents, "use"), (Preparation, "begin")])
def test_a_fault_in_the_queue_is_told_and_the_next_request_gets_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[type, str]
) -> None:
    """Before a request gets in, or before any is looked at."""

    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await on_disk(w, "b", 2)

        def fault(*_: Any) -> None:
            raise AssertionError("a fault of ours")

        with monkeypatch.context() as patched:
            patched.setattr(*place, fault)
            with pytest.raises((GracefulHTTPError, AssertionError)):
                await asyncio.wait_for(anext(w.generate("b")), 5)
        await (await running(w, "b")).aclose()
        await (await running(w, "a")).aclose()

    play(World(tmp_path, slots=1), scenario)
