"""A world that follows an adapters file, and waits for what comes of it."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from molehill.api.sources.adapters_file import LABEL
from molehill.api.sources.desired_state import DesiredState, DesiredStateReconciler
from molehill.api.sources.fetch import Sources
from molehill.api.sources.operator_file import OperatorFile
from molehill.api.sources.roots import AdapterRoots
from molehill.engine.formats import native
from support.watched import Watched
from support.world import adapter


class Followed(Watched):
    """place: of the file, or a URL. prefixes: see Sources."""

    def __init__(
        self, folder: Path, place: str | None = None, prefixes: tuple[str, ...] = (), **more: Any
    ) -> None:
        folder.mkdir(exist_ok=True)
        super().__init__(folder, **more)
        self.path = folder / "adapters.yaml"
        self.sources = Sources(AdapterRoots([self.root]), prefixes=prefixes)
        self.file = DesiredStateReconciler(
            OperatorFile(place or str(self.path), LABEL), self.sources, self.registry
        )

    def write(self, *entries: Any) -> None:
        self.path.write_text(json.dumps(entries))

    def put_as(self, seed: int) -> str:
        """An adapter below the root, as a source."""
        native.write(adapter(seed), self.root / f"source-{seed}")
        return f"source-{seed}"

    def entry(self, name: str, seed: int, **more: Any) -> dict[str, Any]:
        source = f"source-{seed}"
        if not (self.root / source).exists():
            self.put_as(seed)
        return {"name": name, "source": source, **more}

    def states(self) -> dict[str | None, str]:
        return {status.name: status.state.value for status in self.file.statuses()}

    def errors(self) -> dict[str | None, str | None]:
        """Errors of entries by name."""
        return {
            status.name: status.error
            for status in self.file.statuses()
            if status.state is DesiredState.FAILED
        }

    async def until(self, condition: Callable[[], object]) -> None:
        """Looks at the file until something holds; whoever plays it limits the time."""
        await self.file.poll()
        while not condition():
            await asyncio.sleep(0.005)
            await self.file.poll()

    async def look(self, times: int = 3) -> None:
        """What nothing is expected of."""
        for _ in range(times):
            await self.file.poll()
            await asyncio.sleep(0.02)
