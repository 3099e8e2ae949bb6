"""Who comes into the workers' slots next.

The workers read several adapters at a time, those that wait longest first, while others run and
while others wait for room. The first in the queue that is read has the next turn: one that reads
slowly holds up nobody, nor does one that waits for a slot of its tenant's. What is too large for
the memory that is left keeps its turn; what fits beside it may go before it, once each, and yields
after the requests that it came in for.
"""

import asyncio

from molehill.api.adapters.errors import EngineRefusedError, NoRoomError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.preparation import Preparation
from molehill.api.adapters.residents import Residents
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.transfers import Installed, Transfers
from molehill.api.adapters.turns import Turns
from molehill.api.adapters.waiting import Queue, Waiting


class Scheduler:
    """Works through the queue, in a task that lasts as long as any wait in it.

    changed: set by whatever may let somebody in who waits.
    """

    def __init__(
        self,
        queue: Queue,
        residents: Residents,
        transfers: Transfers,
        changed: asyncio.Event,
        events: LifecycleMetrics,
    ) -> None:
        self._queue = queue
        self._residents = residents
        self._transfers = transfers
        self._changed = changed
        self._events = events
        self._tasks = Tasks("residency", events)
        parts = (queue, residents, transfers, self._tasks, changed)
        self._preparation = Preparation(*parts)
        self._turns = Turns(*parts)
        self._running: asyncio.Task[None] | None = None

    def wake(self) -> None:
        """Somebody has joined the queue."""
        self._changed.set()
        if self._running is None or self._running.done():
            self._running = self._tasks.start(self._run(), self._refuse_all)

    async def _run(self) -> None:
        while self._queue:
            self._changed.clear()
            self._preparation.begin()
            if not await self._advance():
                await self._changed.wait()

    def _refuse_all(self) -> None:
        """A fault of the queue's own ends nobody's request but those that wait now."""
        for waiting in self._queue:
            error = EngineRefusedError("the queue for the workers' slots failed")
            self._queue.refuse(waiting, error)

    async def _advance(self) -> bool:
        """Takes the queue one step further; False if all of it waits for something to change."""
        first: Waiting | None = None
        tenants_waiting: set[str | None] = set()
        for waiting in self._queue:
            if waiting.checking or waiting.reading:
                continue
            if waiting.abandoned:
                self._queue.refuse(waiting, EngineRefusedError("nobody waits"))
                await self._preparation.discard(waiting)
                return True
            if not self._preparation.is_ready(waiting):
                continue
            tenant = waiting.generation.status.traffic.limits.tenant
            if tenant in tenants_waiting:
                continue
            if self._waits_for_tenant(waiting.generation):
                waiting.overtakes = None
                if await self._try(waiting):
                    return True
                tenants_waiting.add(tenant)
                continue
            if first is None or self._fits_before(first, waiting):
                waiting.overtakes = first
                if await self._try(waiting):
                    return True
                first = first or waiting
        return False

    def _waits_for_tenant(self, generation: Generation) -> bool:
        """Whether it takes the place of another of its tenant, and so of nobody else."""
        return not generation.status.slot.resident and self._residents.tenant_full(generation)

    def _fits_before(self, first: Waiting, other: Waiting) -> bool:
        """Whether `other` may be tried while `first` waits for room. What yields to `first` may
        not, nor may it cost anybody a slot."""
        generation = other.generation
        again = generation.lora_int_id in first.overtaken
        return not (again or generation.status.slot.resident or self._needs_room(other))

    def _needs_room(self, waiting: Waiting) -> bool:
        """Whether there is no slot, or memory had no room for it and nobody has left since."""
        full = self._residents.full or self._residents.tenant_full(waiting.generation)
        return full or waiting.crowded == self._transfers.departures

    async def _try(self, waiting: Waiting) -> bool:
        """Brings an adapter in that is read, makes room for it, or refuses it; False if it waits
        for room."""
        try:
            if waiting.generation.status.slot.resident:
                await self._turns.admit(waiting, "worker")
                return True
            if self._needs_room(waiting):
                return await self._make_room(waiting.generation)
            await self._install(waiting)
        except Exception as error:
            self._queue.refuse(waiting, error)
            await self._preparation.discard(waiting)
        return True

    async def _make_room(self, incoming: Generation) -> bool:
        """Takes one adapter out; False if all are busy, of which one then yields."""
        victim = self._residents.pick_victim(incoming)
        if victim is None:
            self._residents.make_one_yield(incoming)
            return False
        self._events.evicted(victim.name, "worker")
        await self._transfers.uninstall(victim, keep=True)
        return True

    async def _install(self, waiting: Waiting) -> None:
        """Raises EngineRefusedError if it will not come in, however many leave."""
        tier: Tier = "disk" if waiting.prepared else "host"
        try:
            installed = await self._transfers.install(waiting.generation, tier)
        except EngineRefusedError as error:
            waiting.prepared = waiting.prepared and isinstance(error, NoRoomError)
            raise
        if installed is Installed.CROWDED:
            waiting.crowded = self._transfers.departures
        if installed is Installed.IN_SLOT:
            waiting.prepared = False
            if waiting.overtakes is not None:
                waiting.overtakes.overtaken.add(waiting.generation.lora_int_id)
            await self._turns.admit(waiting, tier)
