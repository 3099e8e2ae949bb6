"""Installs adapters in the workers and uninstalls them, and notes where they are then."""

import asyncio
import logging
from enum import Enum, auto

from molehill.api.adapters.errors import EngineRefusedError, NoRoomError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.host_copies import HostCopies
from molehill.api.adapters.residents import Residents
from molehill.api.adapters.workers import Workers

logger = logging.getLogger("vllm.molehill")


class Installed(Enum):
    """What an install came to. LOST: it is not in host memory any more, and has to be read again.
    CROWDED: it would fit beside fewer adapters."""

    IN_SLOT = auto()
    LOST = auto()
    CROWDED = auto()


class Transfers:
    """host: what the workers keep in host memory. departures: how often an adapter has left the
    workers, which frees memory. changed: set each time."""

    def __init__(
        self,
        workers: Workers,
        residents: Residents,
        events: LifecycleMetrics,
        changed: asyncio.Event,
    ) -> None:
        self.host = HostCopies(events)
        self.departures = 0
        self._workers = workers
        self._residents = residents
        self._events = events
        self._changed = changed

    @property
    def at_once(self) -> int:
        """How many may be prepared, or be held prepared, at a time."""
        return self._workers.at_once

    async def prepare(self, generation: Generation) -> Tier:
        """Returns when it is ready for a slot; where it was. Raises EngineRefusedError."""
        tier = await self._workers.prepare(generation.request)
        if tier == "host":
            self.host.keep(generation)
        return tier

    async def discard(self, generation: Generation) -> None:
        """Of what is prepared and does not come in."""
        try:
            await self._workers.discard(generation.request)
        except EngineRefusedError:
            logger.exception("The workers keep adapter %s prepared", generation.name)

    async def install(self, generation: Generation, tier: Tier) -> Installed:
        """Into a slot, of what is prepared from `tier`.

        Raises EngineRefusedError if it will not come in, however many leave; NoRoomError where
        there are none that could.
        """
        if tier == "host" and await self._workers.start_prepare(generation.request):
            self.host.drop(generation)
            return Installed.LOST
        try:
            await self._workers.install(generation.request)
        except EngineRefusedError as error:
            # Some of several workers may have taken it. What only waits for room stays prepared.
            crowded = isinstance(error, NoRoomError)
            await self._uninstall(generation, keep=crowded)
            if crowded and len(self._residents):
                return Installed.CROWDED
            raise
        self._residents.enter(generation)
        self.host.drop(generation)
        return Installed.IN_SLOT

    async def uninstall(self, generation: Generation, keep: bool = False) -> None:
        """Out of its slot, or of where it waits to come back. keep: in host memory, for it may."""
        # Before the engine is asked: a request that comes now waits for its next turn.
        generation.status.slot.leave()
        self._residents.leave(generation)
        await self._uninstall(generation, keep)
        self.departures += 1
        self._changed.set()

    async def _uninstall(self, generation: Generation, keep: bool) -> None:
        # Until the workers say that they have it.
        self.host.drop(generation)
        try:
            uninstalled = await self._workers.uninstall(generation.request, keep)
        except Exception:
            logger.exception("The engine could not free adapter %s", generation.name)
            self._events.free_failed()
            return
        self.host.record_evictions(uninstalled.evicted)
        # One that is retired may have been freed meanwhile.
        if uninstalled.kept and not generation.status.draining:
            self.host.keep(generation)
