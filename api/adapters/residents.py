"""Which adapters are in the workers' slots, and who makes room for others.

Room is made by taking out what was used least recently, has no request in the engine and is not
pinned. If all are busy, the one that came in first yields: its running requests finish, its next
ones wait until others have had their turn.
"""

from collections.abc import Iterator

from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.adapters.generation import Generation


class Residents:
    """slots: how many there are."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        # By id, in the order of their last use; those that are still checked, too.
        self._in_slots: dict[int, Generation] = {}

    @property
    def full(self) -> bool:
        return len(self._in_slots) >= self.slots

    @property
    def pinnable(self) -> bool:
        """Whether one more pin leaves a slot for those that come and go."""
        pinned = sum(resident.status.slot.pinned for resident in self)
        return pinned < self.slots - 1

    def __len__(self) -> int:
        return len(self._in_slots)

    def __iter__(self) -> Iterator[Generation]:
        return iter(self._in_slots.values())

    def __contains__(self, generation: Generation) -> bool:
        return generation.lora_int_id in self._in_slots

    def enter(self, generation: Generation) -> None:
        """Into a slot."""
        self._in_slots[generation.lora_int_id] = generation

    def use(self, generation: Generation) -> None:
        """It is now the one that was used last."""
        self._in_slots[generation.lora_int_id] = self._in_slots.pop(generation.lora_int_id)

    def leave(self, generation: Generation) -> None:
        """Out of its slot, if it has one."""
        self._in_slots.pop(generation.lora_int_id, None)

    def pick_victim(self) -> Generation | None:
        """Who is to leave a slot now, the one used least recently; None where all are busy.

        Raises EngineRefusedError where all are pinned.
        """
        if all(resident.status.slot.pinned for resident in self):
            raise EngineRefusedError(
                f"adapter memory: found {len(self)} pinned adapters, expected room"
            )
        idle = (resident for resident in self._movable() if not resident.status.running)
        return next(idle, None)

    def make_one_yield(self) -> None:
        """The one that came in first, unless another yields already."""
        movable = self._movable()
        if movable and not any(resident.status.slot.yielding for resident in movable):
            min(movable, key=lambda resident: resident.status.slot.turn).status.slot.give_way()

    def _movable(self) -> list[Generation]:
        """What is still checked has a slot and is not resident yet: it stays."""
        slots = ((resident, resident.status.slot) for resident in self)
        return [resident for resident, slot in slots if slot.resident and not slot.pinned]
