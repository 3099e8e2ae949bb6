"""Which adapters are in the workers. The others lie on disk and come when a request asks for them.

Room is made by taking out what was used least recently, has no request in the engine and is not
pinned. If all are busy, the one that came in first yields: its running requests finish, its next
ones queue behind those that wait already. Every adapter that waits has one place in that queue, so
a busy adapter cannot keep a quiet one out.

Example, one slot: `hot` has requests in the engine all the time. A request for `cold` queues; `hot`
yields, its next requests queue behind. When its running ones are done, `cold` comes in; as `hot`
waits, `cold` yields in its turn, after the requests that it came in for.
"""

import asyncio
import itertools
import logging
import time
from collections import deque
from contextlib import suppress

from molehill.api.errors import EngineRefusedError
from molehill.api.events import LifecycleMetrics, Tier
from molehill.api.generation import Generation
from molehill.api.workers import NoRoomError, Workers

logger = logging.getLogger("vllm.molehill")

Turn = asyncio.Future[Tier]


class Residency:
    """The workers' slots. All methods run on the event loop's thread; nothing runs per step."""

    def __init__(self, workers: Workers, slots: int, events: LifecycleMetrics) -> None:
        self.slots = slots
        self.events = events
        self._workers = workers
        # In the order of their last use.
        self._residents: dict[int, Generation] = {}
        # In the order of their turns.
        self._waiting: dict[int, tuple[Generation, deque[Turn]]] = {}
        # Names by path of what the workers were told to keep in host memory.
        self._kept: dict[str, str] = {}
        self._left = asyncio.Event()
        self._taking_turns: asyncio.Task[None] | None = None
        self._turns = itertools.count(1)

    @property
    def full(self) -> bool:
        return len(self._residents) >= self.slots

    def waiting(self) -> list[Generation]:
        """Those that have requests, or a load, waiting for a slot."""
        found = self._waiting.values()
        return [generation for generation, turns in found if not all(t.done() for t in turns)]

    async def acquire(self, generation: Generation) -> Tier:
        """Waits until the generation is in the workers, and keeps it there until `release`.

        Returns where it was found. Raises EngineRefusedError if it cannot come in.
        """
        if generation.resident and not generation.yielding:
            self._enter(generation)
            return "worker"
        turn: Turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(generation.lora_int_id, (generation, deque()))[1].append(turn)
        if self._taking_turns is None or self._taking_turns.done():
            self._taking_turns = asyncio.create_task(self._take_turns())
        try:
            return await turn
        except asyncio.CancelledError:
            self._left.set()
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(generation)
            raise

    def release(self, generation: Generation) -> None:
        generation.running -= 1
        if not generation.running:
            self._left.set()

    async def forget(self, generation: Generation) -> None:
        """Takes out a generation that has no requests and gets no more."""
        self._left.set()
        if generation.loads:
            # Also from where it waits to come back.
            await self._take_out(generation)

    def pin(self, generation: Generation, pinned: bool) -> None:
        """Keeps a generation that is in the workers there, or lets it be taken out."""
        generation.pinned = pinned
        self._left.set()

    def pinnable(self) -> bool:
        """Whether one more pin leaves a slot for those that come and go."""
        return sum(resident.pinned for resident in self._residents.values()) < self.slots - 1

    def _enter(self, generation: Generation) -> None:
        generation.running += 1
        generation.last_used = time.time()
        key = generation.lora_int_id
        self._residents[key] = self._residents.pop(key)

    async def _take_turns(self) -> None:
        while self._waiting:
            key, (generation, turns) = next(iter(self._waiting.items()))
            refusal: Exception | None = None
            found: Tier = "worker"
            try:
                found = await self._bring_in(generation, turns)
            except Exception as error:
                refusal = error
            del self._waiting[key]
            generation.yielding = False
            for turn in turns:
                if turn.done():
                    continue
                if refusal is not None:
                    turn.set_exception(refusal)
                else:
                    self._enter(generation)
                    turn.set_result(found)
            if generation.retired and generation.resident and not generation.in_flight:
                await self._take_out(generation)

    async def _bring_in(self, generation: Generation, turns: deque[Turn]) -> Tier:
        found: Tier = "worker"
        if generation.resident:
            generation.since = next(self._turns)
            return found
        prepared = False
        while not all(turn.done() for turn in turns):
            if self.full:
                await self._make_room()
                continue
            if not prepared:
                found = await self._workers.prepare(generation.request.lora_path)
                prepared = True
            try:
                await self._workers.install(generation.request)
                if generation.check is not None:
                    await generation.check()
            except EngineRefusedError as error:
                # What only waits for room stays prepared, where it was found.
                await self._take_out(generation, keep=isinstance(error, NoRoomError))
                if not (isinstance(error, NoRoomError) and self._residents):
                    raise
                await self._make_room()
                continue
            generation.check = None
            generation.resident = True
            generation.loads += 1
            generation.since = next(self._turns)
            self._residents[generation.lora_int_id] = generation
            for other in self._residents.values():
                other.yielding = other.yielding and other.lora_int_id in self._waiting
            break
        return found

    async def _make_room(self) -> None:
        """Takes one adapter out, or waits until something has changed."""
        movable = [resident for resident in self._residents.values() if not resident.pinned]
        if not movable:
            raise EngineRefusedError(
                f"adapter memory: found {len(self._residents)} pinned adapters, expected room"
            )
        idle = next((resident for resident in movable if not resident.running), None)
        if idle is not None:
            self.events.evicted(idle.name, "worker")
            await self._take_out(idle, keep=True)
            return
        if not any(resident.yielding for resident in movable):
            min(movable, key=lambda resident: resident.since).yielding = True
        self._left.clear()
        await self._left.wait()

    async def _take_out(self, generation: Generation, keep: bool = False) -> None:
        # Before the engine is asked: a request that comes now waits for its next turn.
        generation.resident = generation.yielding = False
        with suppress(KeyError):
            del self._residents[generation.lora_int_id]
        path = generation.request.lora_path
        self._kept.pop(path, None)
        if keep:
            self._kept[path] = generation.name
        try:
            for gone in await self._workers.remove(generation.request, keep):
                if gone in self._kept:
                    self.events.evicted(self._kept.pop(gone), "host")
        except Exception:
            logger.exception("The engine could not free adapter %s", generation.name)
            self.events.free_failed()
