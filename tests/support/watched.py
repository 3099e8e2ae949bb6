"""A world with roots that are watched."""

import shutil
from pathlib import Path
from typing import Any

from molehill.api.sources.fetch import Sources
from molehill.api.sources.roots import AdapterRoots
from molehill.api.sources.watcher import Watcher
from molehill.engine.adapter.layout import Layout
from molehill.engine.adapter.model import Adapter
from molehill.engine.formats import native
from support.world import World, adapter


class Watched(World):
    """A world with two watched roots. read_count: how often an adapter was read."""

    def __init__(self, folder: Path, slots: int = 4, **more: Any) -> None:
        super().__init__(folder, slots, **more)
        self.root, self.other = folder / "root", folder / "other"
        for root in (self.root, self.other):
            root.mkdir()
        roots = AdapterRoots([self.root, self.other])
        self.watcher = Watcher(roots, Sources(roots), self.registry)
        self.read_count = 0

    def read(
        self,
        path: Path,
        lora_b_layout: Layout | None = None,
        base_is_residual: bool = False,
        non_granular_after: int | None = None,
    ) -> Adapter:
        self.read_count += 1
        return super().read(path, lora_b_layout)

    def put(self, name: str, seed: int) -> Path:
        shutil.rmtree(self.root / name, ignore_errors=True)
        native.write(adapter(seed), self.root / name)
        return self.root / name

    def serves(self) -> dict[str, str]:
        return {generation.name: generation.digest for generation in self.registry}

    def failures(self) -> dict[str, str]:
        return {name: failure.kind for name, failure in self.registry.failures.items()}
