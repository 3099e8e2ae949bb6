"""What a restart takes up, in which order, and what it never forgets."""

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from world import World, adapter, settle

from molehill.api.manifest import Entry, Manifest
from molehill.api.paths import AdapterRoots
from molehill.api.restart import Restart
from molehill.api.sources import Sources
from molehill.api.terms import Terms
from molehill.engine.formats import native


class Server:
    """A registry that remembers, on the same folder as the one before it. Sources are `root/N`."""

    def __init__(self, folder: Path, slots: int = 4) -> None:
        self.folder, self.slots = folder, slots
        self.world = World(folder, slots)
        self.manifest = Manifest(self.world.store.root)
        self.root = folder / "root"
        self.root.mkdir(exist_ok=True)
        self.sources = Sources(AdapterRoots([self.root]))
        self.restart = Restart(
            self.world.registry, self.world.store, self.sources, self.world.read, self.manifest
        )

    async def load(self, name: str, seed: int, **terms: Any) -> None:
        source = str(seed)
        if not (self.root / source).exists():
            native.write(adapter(seed), self.root / source)
        fetch = self.sources.fetch(source)
        await self.world.registry.load(name, source, fetch, Terms(**terms))

    def restarted(self) -> "Server":
        """The next server on the same folder; this one's is its no more."""
        self.world.store.close()
        return Server(self.folder, self.slots)

    def serves(self) -> dict[str, str]:
        return {generation.name: generation.digest for generation in self.world.registry}

    def remembers(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.manifest.read()}


def play(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))


def test_a_restarted_server_is_not_ready_until_all_is_loaded(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1, pinned=True)
        await first.load("b", 2)
        served = first.serves()
        second = first.restarted()
        second.world.engine.proceed.clear()
        restoring = asyncio.create_task(second.restart.run())
        while not second.world.engine.calls:
            await asyncio.sleep(0.001)
        assert not second.restart.ready
        second.world.engine.proceed.set()
        await restoring
        assert second.restart.ready
        assert second.serves() == served
        assert [generation.pinned for generation in second.world.registry] == [True, False]
        assert [generation.note for generation in second.world.registry] == [None, None]

    play(scenario())


def test_a_server_without_a_manifest_is_ready_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        server = Server(tmp_path)
        await server.restart.run()
        assert server.restart.ready
        assert server.serves() == {}

    play(scenario())


def test_more_adapters_than_slots_are_taken_up_on_disk(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path, slots=2)
        for n in range(4):
            await first.load(f"a{n}", n, pinned=n == 3)
        second = first.restarted()
        second.world.engine.more.set()
        await second.restart.run()
        assert second.serves() == first.serves()
        assert sorted(second.world.engine.loaded.values()) == ["a1", "a3"]
        assert [output async for output in second.world.generate("a2")] == ["first", "last"]

    play(scenario())


def test_what_was_not_taken_up_yet_is_not_forgotten_meanwhile(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        await first.load("b", 2)
        second = first.restarted()
        await second.load("c", 3)
        assert set(second.remembers()) == {"a", "b", "c"}
        assert set(second.restarted().remembers()) == {"a", "b", "c"}

    play(scenario())


def test_what_a_client_has_loaded_since_is_newer(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        second = first.restarted()
        await second.load("a", 2)
        await second.restart.run()
        assert second.serves() == {"a": adapter(2).digest}
        assert second.remembers()["a"].generation == adapter(2).digest

    play(scenario())


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_a_lost_copy_comes_from_the_source(tmp_path: Path, damage: str) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        copy = first.world.store.path(adapter(1).digest)
        if damage == "missing":
            shutil.rmtree(copy)
        else:
            (copy / native.WEIGHTS).write_bytes(b"half")
        second = first.restarted()
        await second.restart.run()
        assert second.serves() == {"a": adapter(1).digest}
        assert native.read(copy, second.world.limits).digest == adapter(1).digest

    play(scenario())


def test_a_source_that_changed_does_not_stand_in_for_a_lost_copy(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        shutil.rmtree(first.world.store.path(adapter(1).digest))
        shutil.rmtree(first.root / "1")
        native.write(adapter(2), first.root / "1")
        server = first
        for _ in range(2):
            server = server.restarted()
            await server.restart.run()
            await settle()
            assert server.restart.ready
            assert server.serves() == {}
            assert "expected" in server.world.registry.failures["a"].message
            # It may come back: the next start tries again.
            assert set(server.remembers()) == {"a"}
        await server.world.registry.dismiss("a")
        assert server.remembers() == {}

    play(scenario())


def test_a_source_that_changed_is_reported_and_what_was_loaded_is_served(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        for n in (1, 2, 3):
            await first.load(f"a{n}", n)
        for n in (1, 2):
            shutil.rmtree(first.root / str(n))
        native.write(adapter(9), first.root / "1")
        second = first.restarted()
        await second.restart.run()
        assert second.serves() == first.serves()
        notes = {g.name: g.note or "" for g in second.world.registry}
        assert "other content" in notes["a1"]
        assert "cannot be read" in notes["a2"]
        assert notes["a3"] == ""

    play(scenario())


def test_copies_that_nobody_remembers_are_deleted(tmp_path: Path) -> None:
    async def scenario() -> None:
        first = Server(tmp_path)
        await first.load("a", 1)
        root = first.world.store.root
        for name in ("0" * 64, f".{'1' * 64}-half", "somebody-elses"):
            (root / name).mkdir()
        first.restarted()
        left = {path.name for path in root.iterdir()}
        assert left == {adapter(1).digest, "manifest.json", "somebody-elses"}

    play(scenario())
