"""Lets the requests in that wait for an adapter that is now in a slot."""

import asyncio
import itertools

from molehill.api.adapters.events import Tier
from molehill.api.adapters.residents import Residents
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.transfers import Transfers
from molehill.api.adapters.waiting import Queue, Waiting


class Turns:
    """changed: set when a check is over."""

    def __init__(
        self,
        queue: Queue,
        residents: Residents,
        transfers: Transfers,
        tasks: Tasks,
        changed: asyncio.Event,
    ) -> None:
        self._queue = queue
        self._residents = residents
        self._transfers = transfers
        self._tasks = tasks
        self._changed = changed
        self._numbers = itertools.count(1)

    async def admit(self, waiting: Waiting, tier: Tier) -> None:
        """tier: where the adapter was before. What must be made sure of first goes on in a task."""
        if waiting.generation.status.check is None:
            await self._admit_all(waiting, tier)
            return
        waiting.checking = True
        if waiting.generation.status.slot.resident:
            # What is not resident, and has a slot, is not taken out of it.
            waiting.generation.status.slot.step_back()
        self._tasks.start(self._check(waiting, tier))

    async def _check(self, waiting: Waiting, tier: Tier) -> None:
        status = waiting.generation.status
        try:
            if status.check is not None:
                await status.check()
            status.check_with(None)
        except Exception as error:
            self._queue.refuse(waiting, error)
            await self._transfers.uninstall(waiting.generation, keep=not status.draining)
        else:
            await self._admit_all(waiting, tier)
        finally:
            self._changed.set()

    async def _admit_all(self, waiting: Waiting, tier: Tier) -> None:
        generation = waiting.generation
        self._queue.leave(waiting)
        overtakes = waiting.overtakes is not None and self._queue.holds(waiting.overtakes)
        if not generation.status.slot.resident:
            generation.status.slot.enter()
            if not overtakes:
                for other in self._residents:
                    other.status.slot.give_way(other.status.slot.yielding and other in self._queue)
        # Whom it overtook, it lets in after the requests that it came in for.
        generation.status.slot.take_turn(next(self._numbers), yielding=overtakes)
        self._residents.use(generation)
        waiting.admit(tier)
        if generation.status.draining and not generation.status.holds:
            await self._transfers.uninstall(generation)
