"""Where adapters are: in the workers' slots, in their host memory, or on disk alone; and who makes
room for others.

Room is made by taking out what was used least recently, has no request in the engine and is not
pinned. If all are busy, the one that came in first yields: its running requests finish, its next
ones wait until others have had their turn.
"""

from collections.abc import Collection, Iterator

from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation


class Residents:
    """slots: how many there are."""

    def __init__(self, slots: int, events: LifecycleMetrics) -> None:
        self.slots = slots
        self._events = events
        # By id, in the order of their last use; those that are still checked, too.
        self._in_slots: dict[int, Generation] = {}
        # Names by id of what the workers were told to keep in host memory.
        self._in_host: dict[int, str] = {}

    @property
    def full(self) -> bool:
        return len(self._in_slots) >= self.slots

    @property
    def pinnable(self) -> bool:
        """Whether one more pin leaves a slot for those that come and go."""
        pinned = sum(resident.status.pinned for resident in self)
        return pinned < self.slots - 1

    def __len__(self) -> int:
        return len(self._in_slots)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._in_slots.values())

    def tier(self, generation: Generation) -> Tier:
        """The nearest in which it is."""
        if generation.lora_int_id in self._in_slots:
            return "worker"
        return "host" if generation.lora_int_id in self._in_host else "disk"

    def enter(self, generation: Generation) -> None:
        """Into a slot."""
        self._in_slots[generation.lora_int_id] = generation
        self._in_host.pop(generation.lora_int_id, None)

    def use(self, generation: Generation) -> None:
        """It is now the one that was used last."""
        self._in_slots[generation.lora_int_id] = self._in_slots.pop(generation.lora_int_id)

    def leave(self, generation: Generation, keep: bool) -> None:
        """Out of its slot, if it has one. keep: into host memory."""
        self._in_slots.pop(generation.lora_int_id, None)
        self._in_host.pop(generation.lora_int_id, None)
        if keep:
            self.keep(generation)

    def keep(self, generation: Generation) -> None:
        """In host memory."""
        self._in_host[generation.lora_int_id] = generation.name

    def drop(self, generation: Generation) -> None:
        """It is not in host memory any more."""
        self._in_host.pop(generation.lora_int_id, None)

    def record_evictions(self, lora_int_ids: Collection[int]) -> None:
        """What had to leave host memory for others."""
        for lora_int_id in lora_int_ids:
            if lora_int_id in self._in_host:
                self._events.evicted(self._in_host.pop(lora_int_id), "host")

    def evict(self) -> Generation | None:
        """Who is to leave a slot now; None where all are busy, of whom one then yields.

        Raises EngineRefusedError where all are pinned.
        """
        movable = [resident for resident in self if not resident.status.pinned]
        if not movable:
            raise EngineRefusedError(
                f"adapter memory: found {len(self)} pinned adapters, expected room"
            )
        # What is still checked has a slot and is not resident yet: it stays.
        present = [resident for resident in movable if resident.status.resident]
        for resident in present:
            if not resident.status.running:
                self._events.evicted(resident.name, "worker")
                return resident
        if present and not any(resident.status.yielding for resident in present):
            min(present, key=lambda resident: resident.status.since).status.give_way()
        return None
