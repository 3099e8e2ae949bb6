"""Which adapters are in the workers' slots. The others come when a request asks for them, from the
workers' host memory or from the store.

Every adapter that waits has one place in the queue, so a busy adapter cannot keep a quiet one out.

Example, one slot: `hot` has requests in the engine all the time. A request for `cold` queues; `hot`
yields, its next requests queue behind. When its running ones are done, `cold` comes in; as `hot`
waits, `cold` yields in its turn, after the requests that it came in for.
"""

import asyncio
from collections import Counter

from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.residents import Residents
from molehill.api.adapters.scheduler import Scheduler
from molehill.api.adapters.status import Hold
from molehill.api.adapters.transfers import Transfers
from molehill.api.adapters.waiting import Queue
from molehill.api.adapters.workers import Workers


class Residency:
    """The workers' slots. All methods run on the event loop's thread; nothing runs per step."""

    def __init__(self, workers: Workers, slots: int, events: LifecycleMetrics) -> None:
        self.slots = slots
        self.events = events
        self._changed = asyncio.Event()
        self._queue = Queue()
        self._residents = Residents(slots)
        self._transfers = Transfers(workers, self._residents, events, self._changed)
        self._scheduler = Scheduler(
            self._queue, self._residents, self._transfers, self._changed, events
        )

    @property
    def full(self) -> bool:
        return self._residents.full

    @property
    def pinnable(self) -> bool:
        """Whether one more pin leaves a slot for those that come and go."""
        return self._residents.pinnable

    def tier(self, generation: Generation) -> Tier:
        """Where the generation is: in a slot of the workers, in their host memory, or in the store
        alone."""
        if generation.status.slot.resident:
            return "worker"
        return "host" if generation in self._transfers.host else "disk"

    def requests_waiting(self) -> Counter[str]:
        """Requests that wait for a slot, by the adapter's name."""
        requests = Counter[str]()
        for waiting in self._queue:
            requests[waiting.generation.name] += waiting.requests
        return requests

    def waiting(self) -> list[Generation]:
        """Those that have requests, or a load, waiting for a slot."""
        return [waiting.generation for waiting in self._queue if not waiting.abandoned]

    async def acquire(self, generation: Generation, hold: Hold) -> Tier:
        """Waits until the generation is in the workers, and keeps it there until `release`.

        Returns where it was before. Raises EngineRefusedError if it cannot come in.
        """
        slot = generation.status.slot
        if slot.resident and not slot.yielding and generation.status.check is None:
            generation.status.slot.run(hold)
            self._residents.use(generation)
            return "worker"
        turn = self._queue.join(generation, hold)
        self._scheduler.wake()
        try:
            return await turn.tier
        except asyncio.CancelledError:
            self._changed.set()
            if hold.in_slot:
                self.release(generation, hold)
            raise

    def release(self, generation: Generation, hold: Hold) -> None:
        generation.status.slot.stop(hold)
        if not generation.status.running:
            self._changed.set()

    def pin(self, generation: Generation, pinned: bool) -> None:
        """Keeps a generation that is in the workers there, or lets it be taken out."""
        generation.status.slot.pin(pinned)
        self._changed.set()

    async def free(self, generation: Generation) -> None:
        """What the workers have of a generation that has no requests and gets no more."""
        self._changed.set()
        if generation.status.slot.loads:
            # Also from where it waits to come back.
            await self._transfers.uninstall(generation)
