"""Has the workers read what is next in the queue, several at a time, beside what they run."""

import asyncio

from molehill.api.adapters.residents import Residents
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.transfers import Transfers
from molehill.api.adapters.waiting import Queue, Waiting


class Preparation:
    """changed: set when one is read."""

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

    def is_ready(self, waiting: Waiting) -> bool:
        """Whether a slot is all that it needs."""
        generation = waiting.generation
        in_workers = generation in self._residents or generation in self._transfers.host
        return waiting.prepared or in_workers

    def begin(self) -> None:
        """Of those that wait longest, as many as the workers read at a time. Those whose tenant has
        all its slots leave one place to the others."""
        taken = [other for other in self._queue if other.reading or other.prepared]
        held = sum(self._residents.tenant_full(other.generation) for other in taken)
        reading = len(taken) - held
        most = self._transfers.at_once
        most_held = max(1, most - 1)
        for waiting in self._queue:
            if waiting.reading or waiting.abandoned or self.is_ready(waiting):
                continue
            full = self._residents.tenant_full(waiting.generation)
            if reading + min(held, most_held) >= most or (full and held >= most_held):
                continue
            waiting.reading = True
            held, reading = held + full, reading + (not full)
            self._tasks.start(self._read(waiting))

    async def discard(self, waiting: Waiting) -> None:
        """Of what does not come in."""
        if waiting.prepared:
            await self._transfers.discard(waiting.generation)

    async def _read(self, waiting: Waiting) -> None:
        try:
            waiting.prepared = await self._transfers.prepare(waiting.generation) == "disk"
        except Exception as error:
            self._queue.refuse(waiting, error)
            # Of several engines some may have it.
            await self._transfers.discard(waiting.generation)
        finally:
            waiting.reading = False
            self._changed.set()
