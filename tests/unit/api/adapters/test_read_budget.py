"""Adapters that are read at a time in the API process: how many, how much, in which order."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from support.world import World, is_reading, let_tasks_run

from molehill.api.adapters.read_budget import MOST_AT_ONCE, ReadBudget, most_bytes
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter


class SlowDisk(World):
    """Reads of `slow` adapters (seeds from 50) wait until they are let."""

    proceed: threading.Event

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        result = super().read(path, lora_b_layout)
        if path.name.startswith("adapter-5"):
            assert self.proceed.wait(20)
        return result


def test_a_slow_read_holds_up_no_other_load(tmp_path: Path) -> None:
    async def scenario(w: SlowDisk) -> None:
        w.proceed = threading.Event()
        slow = asyncio.create_task(w.load("slow", 50))
        try:
            while not any(loading.stage == "reading" for loading in w.registry.loading()):
                await asyncio.sleep(0.001)
            assert (await asyncio.wait_for(w.load("quick", 1), 5)).status == "loaded"
            assert not slow.done()
        finally:
            w.proceed.set()
        assert (await slow).status == "loaded"

    asyncio.run(asyncio.wait_for(scenario(SlowDisk(tmp_path)), 20))


def play(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_together_they_take_no_more_than_the_largest_may(tmp_path: Path) -> None:
    most = 100

    async def scenario() -> None:
        reading = ReadBudget(most)
        inside: list[int] = []
        order: list[int] = []

        async def read(size: int) -> None:
            async with reading.beside(size):
                order.append(size)
                inside.append(min(size, most))
                assert sum(inside) <= most
                assert len(inside) <= MOST_AT_ONCE
                assert is_reading(reading)
                await asyncio.sleep(0.002)
                inside.remove(min(size, most))

        sizes = [60, 41, 1, 500, 2, 3, 4, 5, 6, 7, 100, 0]
        await asyncio.gather(*map(read, sizes))
        # Who is large is not overtaken by those that are small.
        assert order == sizes
        assert not is_reading(reading)

    play(scenario)


def test_who_does_not_know_how_much_it_takes_is_alone() -> None:
    async def scenario() -> None:
        reading = ReadBudget(100)
        async with reading:
            other = asyncio.create_task(reading.beside(0).__aenter__())
            large = asyncio.create_task(reading.beside(1).__aenter__())
            await let_tasks_run()
            assert other.done()
            assert not large.done()
        await large

    play(scenario)


def test_one_that_stops_waiting_lets_the_next_in() -> None:
    async def scenario() -> None:
        reading = ReadBudget(100)
        async with reading:
            gone = asyncio.create_task(reading.beside(100).__aenter__())
            await let_tasks_run()
            gone.cancel()
            await let_tasks_run()
        async with reading.beside(100):
            pass
        assert not is_reading(reading)

    play(scenario)


def test_what_a_directory_may_take_is_more_than_its_files(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "a").write_bytes(b"1234")
    (tmp_path / "below" / "b").write_bytes(b"12")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert 18 <= most_bytes(tmp_path) < 18 + 3 * 4096
    assert most_bytes(tmp_path / "missing") == 0


def test_files_behind_links_count_as_what_is_read_of_them(tmp_path: Path) -> None:
    """As in a snapshot of Hugging Face's cache."""
    (tmp_path / "blob").write_bytes(bytes(10_000))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "weights").symlink_to(tmp_path / "blob")
    (snapshot / "gone").symlink_to(tmp_path / "nothing")
    assert most_bytes(snapshot) == 30_000


@pytest.mark.parametrize("place", [".", "member-of-a-mix"])
@pytest.mark.parametrize("kind", ["vera", "loha", "lokr", "miss", "hra"])
def test_pairs_that_are_made_at_load_may_take_the_whole_limit(
    tmp_path: Path, kind: str, place: str
) -> None:
    """A file of a kilobyte may stand for gigabytes: no other is read beside it."""
    (tmp_path / place).mkdir(exist_ok=True)
    config = tmp_path / place / "adapter_config.json"
    config.write_text(json.dumps({"peft_type": "LORA"}))
    stored = most_bytes(tmp_path)
    assert stored < 10_000
    config.write_text(json.dumps({"peft_type": kind.upper()}))

    async def scenario() -> None:
        reading = ReadBudget(1 << 33)
        async with reading.beside(most_bytes(tmp_path)):
            other = asyncio.create_task(reading.beside(1).__aenter__())
            await let_tasks_run()
            assert not other.done()
        await other

    assert most_bytes(tmp_path) >= 1 << 33
    play(scenario)
    config.write_text("{")
    assert most_bytes(tmp_path) < 10_000
