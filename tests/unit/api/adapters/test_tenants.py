"""Slots of a tenant: its adapters take turns among themselves, and nobody else's place."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.world import World, let_tasks_run
from vllm.exceptions import GracefulHTTPError

from molehill.api.adapters.admission import AdmissionLimits
from molehill.api.adapters.errors import BadLimitsError
from molehill.api.adapters.traffic_limits import NO_LIMITS, TrafficLimits, check_limits

MANY = AdmissionLimits(adapters=50, loads=4)


def of(tenant: str, slots: int | None = None) -> TrafficLimits:
    return TrafficLimits(tenant=tenant, tenant_slots=slots)


def play(world: World, scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(world), 60))


async def ask(w: World, name: str) -> None:
    assert [output async for output in w.generate(name)] == ["first", "last"]


def resident(w: World) -> list[str]:
    return sorted(w.engine.loaded.values())


def test_a_tenant_that_floods_pushes_out_its_adapters_alone(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        for number, name in enumerate(("mine", "yours")):
            await w.load(name, number)
        for number in range(6):
            await w.load(f"flood-{number}", 10 + number, limits=of("flood", 2))
        assert resident(w) == ["flood-4", "flood-5", "mine", "yours"]
        for number in range(6):
            await ask(w, f"flood-{number}")
        assert resident(w) == ["flood-4", "flood-5", "mine", "yours"]
        # One slot more was free all the time.
        await w.load("more", 3)
        assert resident(w) == ["flood-4", "flood-5", "mine", "more", "yours"]

    play(World(tmp_path, slots=5, admission=MANY), scenario)


def test_who_waits_for_a_tenants_slot_holds_up_nobody_else(tmp_path: Path) -> None:
    """Neither in the queue nor where the workers read, two at a time."""

    async def scenario(w: World) -> None:
        w.engine.host = 0
        await w.load("first", 1)
        await w.load("second", 2)
        for number in range(4):
            await w.load(f"flood-{number}", 10 + number, limits=of("flood", 1))
        assert resident(w) == ["flood-3", "second"]
        busy = w.generate("flood-3")
        await anext(busy)
        waiting = [asyncio.create_task(anext(w.generate(f"flood-{n}"))) for n in range(3)]
        await let_tasks_run()
        # `second` is idle: `first` takes its place, though it came after all of the flood.
        other = w.generate("first")
        assert await asyncio.wait_for(anext(other), 5) == "first"
        assert resident(w) == ["first", "flood-3"]
        assert not any(task.done() for task in waiting)
        w.engine.more.set()
        assert [output async for output in busy] == ["last"]
        assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == ["first"] * 3
        assert [output async for output in other] == ["last"]

    play(World(tmp_path, slots=2, admission=MANY), scenario)


def test_adapters_of_a_tenant_take_turns(tmp_path: Path) -> None:
    """One slot of two: the busy one yields to the other, and comes after it."""

    async def scenario(w: World) -> None:
        await w.load("quiet", 1, limits=of("t", 1))
        await w.load("hot", 2, limits=of("t", 1))
        running = w.generate("hot")
        await anext(running)
        quiet = asyncio.create_task(anext(w.generate("quiet")))
        await let_tasks_run()
        again = asyncio.create_task(anext(w.generate("hot")))
        await let_tasks_run()
        assert not quiet.done()
        assert not again.done()
        w.engine.more.set()
        assert [output async for output in running] == ["last"]
        await asyncio.wait_for(asyncio.gather(quiet, again), 5)
        slots = {generation.name: generation.status.slot for generation in w.registry}
        assert slots["hot"].loads == 2
        assert slots["quiet"].turn < slots["hot"].turn

    play(World(tmp_path, slots=2), scenario)


def test_a_tenant_does_not_pass_those_that_wait_for_any_slot(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("other", 3)
        await w.load("a", 1, limits=of("t", 2))
        await w.load("b", 2, limits=of("t", 2))
        streams = [w.generate("a"), w.generate("b")]
        for stream in streams:
            await anext(stream)
        other = asyncio.create_task(anext(w.generate("other")))
        await let_tasks_run()
        # `a` came in first: it yields, and its next request comes after.
        again = asyncio.create_task(anext(w.generate("a")))
        await let_tasks_run()
        assert not other.done()
        assert not again.done()
        w.engine.more.set()
        for stream in streams:
            assert [output async for output in stream] == ["last"]
        await asyncio.wait_for(asyncio.gather(other, again), 5)
        slots = {generation.name: generation.status.slot for generation in w.registry}
        assert slots["other"].turn < slots["a"].turn

    play(World(tmp_path, slots=2), scenario)


def test_pins_of_a_tenant_count(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("pinned", 1, pinned=True, limits=of("t", 1))
        await w.load("other", 2, limits=of("t"))
        await w.registry.limit("other", of("t", 1))
        # It has its slot from before.
        await w.load("third", 3)
        await w.load("fourth", 4)
        assert resident(w) == ["fourth", "pinned", "third"]
        with pytest.raises(GracefulHTTPError, match="slots of 't': found 1 pinned") as refusal:
            await ask(w, "other")
        assert refusal.value.http_status == 503

    play(World(tmp_path, slots=3), scenario)


def test_replaced_weights_count_for_the_tenant_too(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("mine", 1)
        await w.load("theirs", 2, limits=of("t", 1))
        await w.load("theirs", 3, replace=True)
        assert resident(w) == ["mine", "theirs"]
        assert w.registry.get("theirs").status.traffic.limits == of("t", 1)
        assert w.registry.get("mine").status.slot.loads == 1

    play(World(tmp_path, slots=2), scenario)


def test_a_mix_by_request_is_its_tenants(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("mine", 1)
        for number, name in enumerate(("a", "b")):
            await w.load(name, 2 + number, limits=of("t", 1))
        lease = await w.registry.mixes.lease({"a": 0.5, "b": 0.5}, object())
        assert lease.generation.status.traffic.limits == of("t", 1)
        await asyncio.wait_for(lease.acquire_slot(), 5)
        assert resident(w) == ["(mix)", "mine"]
        lease.release()
        # A mix that is there already has those of now.
        await w.registry.limit("a", of("u", 2))
        again = await w.registry.mixes.lease({"a": 0.5, "b": 0.5}, object())
        assert again.generation is lease.generation
        assert again.generation.status.traffic.limits == of("u", 2)
        again.release()

    play(World(tmp_path, slots=3), scenario)


def test_tenants_are_checked() -> None:
    assert check_limits({"tenant": "t", "tenant_slots": 2}) == of("t", 2)
    assert check_limits({"tenant": "t"}) == of("t")
    assert check_limits({"tenant": None, "tenant_slots": None}) == NO_LIMITS


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tenant_slots": 2}, "limits.tenant: found none beside tenant_slots"),
        ({"tenant": "", "tenant_slots": 2}, "limits.tenant: found '', expected 1 to 200"),
        ({"tenant": 3}, "limits.tenant: found 3, expected 1 to 200 printable characters"),
        ({"tenant": "a\nb"}, "limits.tenant: found"),
        ({"tenant": "x" * 201}, "limits.tenant: found"),
        ({"tenant": "t", "tenant_slots": 0}, "limits.tenant_slots: found 0, expected a whole"),
        ({"tenant": "t", "tenant_slots": 1.5}, "limits.tenant_slots: found 1.5, expected a whole"),
        ({"slots": 1}, "expected requests_in_flight, tokens_per_second, tenant and tenant_slots"),
    ],
)
def test_tenants_that_are_none_are_refused(given: Any, message: str) -> None:
    with pytest.raises(BadLimitsError) as refusal:
        check_limits(given)
    assert message in str(refusal.value)
