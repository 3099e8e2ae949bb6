"""Which adapters are in the workers. The others lie on disk and come when a request asks for them.

Room is made by taking out what was used least recently, has no request in the engine and is not
pinned. If all are busy, the one that came in first yields: its running requests finish, its next
ones queue behind those that wait already. Every adapter that waits has one place in that queue, so
a busy adapter cannot keep a quiet one out.

Example, one slot: `hot` has requests in the engine all the time. A request for `cold` queues; `hot`
yields, its next requests queue behind. When its running ones are done, `cold` comes in; as `hot`
waits, `cold` yields in its turn, after the requests that it came in for.

The workers read several adapters at a time, those that wait longest first, while others run and
while others wait for room. The first in the queue that is read has the next turn: one that reads
slowly holds up nobody. What is too large for the memory that is left keeps its turn; what fits
beside it may go before it, once each, and yields after the requests that it came in for.
"""

import asyncio
import itertools
import logging
from contextlib import suppress

from molehill.api.adapters.errors import EngineRefusedError, NoRoomError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.tasks import Tasks
from molehill.api.adapters.waiting import Turn, Waiting
from molehill.api.adapters.workers import Workers

logger = logging.getLogger("vllm.molehill")


class Residency:
    """The workers' slots. All methods run on the event loop's thread; nothing runs per step."""

    def __init__(self, workers: Workers, slots: int, events: LifecycleMetrics) -> None:
        self.slots = slots
        self.events = events
        self._workers = workers
        # In the order of their last use; those that are still checked, too.
        self._residents: dict[int, Generation] = {}
        # In the order of their turns.
        self._queue: dict[int, Waiting] = {}
        # Names by id of what the workers were told to keep in host memory.
        self._kept: dict[int, str] = {}
        self._changed = asyncio.Event()
        self._tasks = Tasks("residency", events)
        self._taking_turns: asyncio.Task[None] | None = None
        self._turns = itertools.count(1)
        # How many have been taken out.
        self._left = 0

    @property
    def full(self) -> bool:
        return len(self._residents) >= self.slots

    def waiting(self) -> list[Generation]:
        """Those that have requests, or a load, waiting for a slot."""
        return [waiting.generation for waiting in self._queue.values() if not waiting.abandoned]

    async def acquire(self, generation: Generation) -> Tier:
        """Waits until the generation is in the workers, and keeps it there until `release`.

        Returns where it was found. Raises EngineRefusedError if it cannot come in.
        """
        if generation.status.resident and not generation.status.yielding:
            self._enter(generation)
            return "worker"
        turn: Turn = asyncio.get_running_loop().create_future()
        self._queue.setdefault(generation.lora_int_id, Waiting(generation)).turns.append(turn)
        self._changed.set()
        if self._taking_turns is None or self._taking_turns.done():
            self._taking_turns = self._tasks.start(self._take_turns(), self._refuse_all)
        try:
            return await turn
        except asyncio.CancelledError:
            self._changed.set()
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(generation)
            raise

    def release(self, generation: Generation) -> None:
        generation.status.release()
        if not generation.status.running:
            self._changed.set()

    async def forget(self, generation: Generation) -> None:
        """Takes out a generation that has no requests and gets no more."""
        self._changed.set()
        if generation.status.loads:
            # Also from where it waits to come back.
            await self._take_out(generation)

    def pin(self, generation: Generation, pinned: bool) -> None:
        """Keeps a generation that is in the workers there, or lets it be taken out."""
        generation.status.pin(pinned)
        self._changed.set()

    def pinnable(self) -> bool:
        """Whether one more pin leaves a slot for those that come and go."""
        return sum(resident.status.pinned for resident in self._residents.values()) < self.slots - 1

    def _enter(self, generation: Generation, requests: int = 1) -> None:
        generation.status.run(requests)
        key = generation.lora_int_id
        self._residents[key] = self._residents.pop(key)

    # The queue

    async def _take_turns(self) -> None:
        while self._queue:
            self._changed.clear()
            self._read_ahead()
            if not await self._advance():
                await self._changed.wait()

    def _read_ahead(self) -> None:
        """Has the workers read what is next, as many as they read at a time."""
        reading = sum(other.reading or other.prepared for other in self._queue.values())
        for waiting in self._queue.values():
            if reading >= self._workers.at_once:
                return
            if not (waiting.reading or waiting.abandoned or self._is_read(waiting)):
                waiting.reading = True
                reading += 1
                self._tasks.start(self._read(waiting))

    async def _read(self, waiting: Waiting) -> None:
        generation = waiting.generation
        try:
            if await self._workers.prepare(generation.request) == "host":
                self._kept[generation.lora_int_id] = generation.name
            else:
                waiting.prepared = True
        except Exception as error:
            self._refuse(waiting, error)
        finally:
            waiting.reading = False
            self._changed.set()

    def _is_read(self, waiting: Waiting) -> bool:
        generation = waiting.generation
        return (
            generation.status.resident or waiting.prepared or generation.lora_int_id in self._kept
        )

    async def _advance(self) -> bool:
        """Takes the queue one step further; False if all of it waits for something to change."""
        first: Waiting | None = None
        for waiting in list(self._queue.values()):
            if waiting.checking or waiting.reading:
                continue
            if waiting.abandoned:
                await self._give_up(waiting)
                return True
            if not self._is_read(waiting):
                continue
            if first is None or self._fits_before(first, waiting):
                waiting.overtakes = first
                if await self._try(waiting):
                    return True
                first = first or waiting
        return False

    def _fits_before(self, first: Waiting, other: Waiting) -> bool:
        """Whether `other` may be tried while `first` waits for room. What yields to `first` may
        not, nor may it cost anybody a slot."""
        generation = other.generation
        again = generation.lora_int_id in first.overtaken
        return not (again or generation.status.resident or self.full or self._is_crowded(other))

    async def _try(self, waiting: Waiting) -> bool:
        """Brings an adapter in that is read, makes room for it, or refuses it; False if it waits
        for room."""
        try:
            if waiting.generation.status.resident:
                await self._admit(waiting, "worker")
                return True
            if self.full or self._is_crowded(waiting):
                return await self._make_room()
            await self._install(waiting)
        except Exception as error:
            self._refuse(waiting, error)
            await self._discard(waiting)
        return True

    def _is_crowded(self, waiting: Waiting) -> bool:
        """Whether memory had no room for it, and nobody has left since."""
        return waiting.crowded == self._left

    async def _install(self, waiting: Waiting) -> None:
        """Raises EngineRefusedError if it will not come in, however many leave."""
        generation = waiting.generation
        found: Tier = "disk" if waiting.prepared else "host"
        if found == "host" and await self._workers.begin(generation.request):
            # It is not there any more.
            self._kept.pop(generation.lora_int_id, None)
            return
        try:
            await self._workers.install(generation.request)
        except EngineRefusedError as error:
            # Some of several workers may have taken it. What only waits for room stays prepared.
            stays = isinstance(error, NoRoomError)
            await self._remove(generation, keep=stays)
            if stays and self._residents:
                waiting.crowded = self._left
                return
            waiting.prepared = waiting.prepared and stays
            raise
        self._residents[generation.lora_int_id] = generation
        self._kept.pop(generation.lora_int_id, None)
        waiting.prepared = False
        if waiting.overtakes is not None:
            waiting.overtakes.overtaken.add(generation.lora_int_id)
        if generation.status.check is None:
            await self._admit(waiting, found)
            return
        waiting.checking = True
        # Nobody takes it out meanwhile.
        generation.status.hold()
        self._tasks.start(self._check(waiting, found))

    async def _check(self, waiting: Waiting, found: Tier) -> None:
        generation = waiting.generation
        try:
            if generation.status.check is not None:
                await generation.status.check()
            generation.status.pass_check()
        except Exception as error:
            generation.status.release()
            self._refuse(waiting, error)
            await self._take_out(generation, keep=not generation.status.draining)
        else:
            generation.status.release()
            await self._admit(waiting, found)
        finally:
            self._changed.set()

    async def _admit(self, waiting: Waiting, found: Tier) -> None:
        """Lets the requests in that wait for what is in a slot."""
        generation = waiting.generation
        del self._queue[generation.lora_int_id]
        overtakes = waiting.overtakes in self._queue.values()
        if not generation.status.resident:
            generation.status.come_in()
            if not overtakes:
                for other in self._residents.values():
                    waits = other.lora_int_id in self._queue
                    other.status.give_way(other.status.yielding and waits)
        # Whom it overtook, it lets in after the requests that it came in for.
        generation.status.take_turn(next(self._turns), yielding=overtakes)
        self._enter(generation, len(waiting.open()))
        waiting.admit(found)
        if generation.status.draining and not generation.status.in_flight:
            await self._take_out(generation)

    def _refuse(self, waiting: Waiting, error: Exception) -> None:
        self._queue.pop(waiting.generation.lora_int_id, None)
        waiting.generation.status.give_way(False)
        waiting.refuse(error)

    def _refuse_all(self) -> None:
        """A fault of the queue's own ends nobody's request but those that wait now."""
        for waiting in list(self._queue.values()):
            self._refuse(waiting, EngineRefusedError("the queue for the workers' slots failed"))

    async def _give_up(self, waiting: Waiting) -> None:
        self._refuse(waiting, EngineRefusedError("nobody waits"))
        await self._discard(waiting)

    async def _discard(self, waiting: Waiting) -> None:
        """Of what is prepared and does not come in."""
        if not waiting.prepared:
            return
        try:
            await self._workers.discard(waiting.generation.request)
        except EngineRefusedError:
            logger.exception("The workers keep adapter %s prepared", waiting.generation.name)

    # The slots

    async def _make_room(self) -> bool:
        """Takes one adapter out; False if all are busy, of which one then yields."""
        movable = [resident for resident in self._residents.values() if not resident.status.pinned]
        if not movable:
            raise EngineRefusedError(
                f"adapter memory: found {len(self._residents)} pinned adapters, expected room"
            )
        idle = next((resident for resident in movable if not resident.status.running), None)
        if idle is not None:
            self.events.evicted(idle.name, "worker")
            await self._take_out(idle, keep=True)
            return True
        if not any(resident.status.yielding for resident in movable):
            min(movable, key=lambda resident: resident.status.since).status.give_way()
        return False

    async def _take_out(self, generation: Generation, keep: bool = False) -> None:
        # Before the engine is asked: a request that comes now waits for its next turn.
        generation.status.go_out()
        with suppress(KeyError):
            del self._residents[generation.lora_int_id]
        self._kept.pop(generation.lora_int_id, None)
        if keep:
            self._kept[generation.lora_int_id] = generation.name
        await self._remove(generation, keep)
        self._left += 1
        self._changed.set()

    async def _remove(self, generation: Generation, keep: bool) -> None:
        try:
            for gone in await self._workers.remove(generation.request, keep):
                if gone in self._kept:
                    self.events.evicted(self._kept.pop(gone), "host")
        except Exception:
            logger.exception("The engine could not free adapter %s", generation.name)
            self.events.free_failed()
