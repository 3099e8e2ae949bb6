"""Pins: adapters that stay in the workers' slots."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.world import Play, World, adapter, let_tasks_run

from molehill.api.adapters.errors import (
    CannotPinError,
    EngineRefusedError,
)


def test_a_pin_stays_when_weights_are_replaced_unless_the_load_says_otherwise(play: Play) -> None:
    async def scenario(w: World) -> None:
        assert (await w.load("a", 1, pinned=True)).generation.status.slot.pinned
        assert (await w.load("a", 2, replace=True)).generation.status.slot.pinned
        assert not (await w.load("a", 3, replace=True, pinned=False)).generation.status.slot.pinned

    play(scenario)


def test_pins_leave_a_slot_for_the_others(play: Play) -> None:
    async def scenario(w: World) -> None:
        for n in range(3):
            await w.load(f"a{n}", n, pinned=True)
        with pytest.raises(CannotPinError):
            await w.load("b", 4, pinned=True)
        assert w.registry.get("b") is None
        await w.load("b", 4)
        with pytest.raises(CannotPinError):
            await w.registry.pin("b", True)
        await w.registry.pin("a0", False)
        assert (await w.registry.pin("b", True)).status.slot.pinned

    play(scenario)


def test_a_pin_changes_hands_after_the_probe(tmp_path: Path) -> None:
    """All slots but one may be pinned: the new weights' pin must not be one too many meanwhile."""
    probing, proceed = asyncio.Event(), asyncio.Event()
    proceed.set()

    async def probe(_: Any) -> None:
        probing.set()
        await proceed.wait()

    async def scenario(w: World) -> None:
        w.engine.more.set()
        await w.load("c", 3)
        await w.load("b", 4)
        old = (await w.load("a", 1, pinned=True)).generation
        assert not w.registry.get("c").status.slot.resident
        proceed.clear()
        probing.clear()
        replacing = asyncio.create_task(w.load("a", 2, replace=True))
        await probing.wait()
        # It waits for the slot that the probe has, and is not told that all are pinned.
        asking = asyncio.create_task(anext(w.generate("c")))
        await let_tasks_run()
        assert not asking.done()
        proceed.set()
        new = (await replacing).generation
        assert (old.status.slot.pinned, new.status.slot.pinned) == (False, True)
        assert await asking == "first"
        assert sorted(w.engine.loaded.values()) == ["a", "c"]

    asyncio.run(asyncio.wait_for(scenario(World(tmp_path, slots=2, probe=probe)), 20))


def test_a_pinned_adapter_is_replaced_at_the_pin_limit_or_stays_as_it_is(play: Play) -> None:
    async def scenario(w: World) -> None:
        for n in range(3):
            await w.load(f"a{n}", n, pinned=True)
        await w.load("b", 8)
        with pytest.raises(CannotPinError):
            await w.load("b", 9, replace=True, pinned=True)
        assert w.registry.get("b").digest == adapter(8).digest
        assert (await w.load("a0", 9, replace=True)).generation.status.slot.pinned
        assert [generation.status.slot.pinned for generation in w.registry] == [
            True,
            True,
            True,
            False,
        ]
        assert sorted(w.engine.loaded.values()) == ["a0", "a1", "a2"]

    play(scenario)


def test_a_pin_that_the_engine_refuses_names_no_path_of_the_server(tmp_path: Path) -> None:
    async def scenario(w: World) -> None:
        await w.load("a", 1)
        await w.load("b", 2)
        w.engine.refusal = f"{w.registry.get('a').content.path}: no room"
        with pytest.raises(EngineRefusedError, match=r"^label-1: no room$"):
            await w.registry.pin("a", True)
        assert w.registry.get("a").status.in_flight == 0

    asyncio.run(asyncio.wait_for(scenario(World(tmp_path, slots=1)), 20))
