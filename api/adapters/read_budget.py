"""How much of adapters is in this process's memory at a time."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from molehill.engine.formats.registry import expands

# Adapters that are read at a time, each in a thread: one that reads slowly holds up no other. They
# take turns with the event loop, which streams meanwhile: more would hold that up.
MOST_AT_ONCE = 2


class ReadBudget:
    """Lets adapters be read beside each other that together take no more than one may, in the order
    in which they ask. `async with` itself is for whoever does not know how much it will take.

    limit: bytes that the largest adapter may take.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: list[int] = []
        # Held by the next one while it waits for room.
        self._next = asyncio.Lock()
        self._left = asyncio.Event()

    @asynccontextmanager
    async def beside(self, num_bytes: int) -> AsyncIterator[None]:
        """num_bytes: what it will take, at most."""
        taken = min(num_bytes, self._limit)
        await self._enter(taken)
        try:
            yield
        finally:
            self._leave(taken)

    async def __aenter__(self) -> None:
        await self._enter(self._limit)

    async def __aexit__(self, *_: Any) -> None:
        self._leave(self._limit)

    async def _enter(self, taken: int) -> None:
        async with self._next:
            while len(self._taken) >= MOST_AT_ONCE or sum(self._taken) + taken > self._limit:
                self._left.clear()
                await self._left.wait()
            self._taken.append(taken)

    def _leave(self, taken: int) -> None:
        self._taken.remove(taken)
        self._left.set()


def most_bytes(directory: Path) -> int:
    """What reading an adapter may take, at most: its tensors in float32, that may be stored in half
    of it, and the files themselves. Of VeRA, LoHa and the like, whose pairs are made as they are
    read, nothing says it but the limit. What cannot be looked at takes nothing: reading it says
    why."""
    stored = 0
    for folder, _, files in os.walk(directory):
        if expands(Path(folder)):
            return sys.maxsize
        for name in files:
            try:
                stored += os.stat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    return 3 * stored
