"""Registries that remember, one after another."""

import asyncio
from pathlib import Path
from typing import Any

from molehill.api.adapters.load_options import LoadOptions
from molehill.api.sources.fetch import Sources
from molehill.api.sources.manifest import Entry, Manifest
from molehill.api.sources.restore import Restore
from molehill.api.sources.roots import AdapterRoots
from molehill.engine.formats import native
from support.world import World, adapter


class Server:
    """A registry that remembers, on the same folder as the one before it. Sources are `root/N`."""

    def __init__(self, folder: Path, slots: int = 4, **more: Any) -> None:
        self.folder, self.slots, self.more = folder, slots, more
        self.world = World(folder, slots, **more)
        self.manifest = Manifest(self.world.store.root)
        self.root = folder / "root"
        self.root.mkdir(exist_ok=True)
        self.sources = Sources(AdapterRoots([self.root]))
        self.restore = Restore(
            self.world.registry, self.world.store, self.sources, self.world.read, self.manifest
        )

    async def load(self, name: str, seed: int, **options: Any) -> None:
        source = str(seed)
        if not (self.root / source).exists():
            native.write(adapter(seed), self.root / source)
        fetch = self.sources.fetch(source)
        await self.world.registry.load(name, source, fetch, LoadOptions(**options))

    def restarted(self) -> "Server":
        """The next server on the same folder; this one's is its no more."""
        self.world.store.claim.release()
        return Server(self.folder, self.slots, **self.more)

    def serves(self) -> dict[str, str]:
        return {generation.name: generation.digest for generation in self.world.registry}

    def remembers(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.manifest.read()}


def play(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 20))
