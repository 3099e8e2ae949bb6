"""Which adapters are in the workers' slots, and who makes room for others.

Room is made by taking out what was used least recently, has no request in the engine and is not
pinned. If all are busy, the one that came in first yields: its running requests finish, its next
ones wait until others have had their turn. A tenant that has all its slots makes room with its own.
"""

from collections.abc import Iterable, Iterator

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

    def tenant_full(self, generation: Generation) -> bool:
        """Whether its tenant has all the slots that are the tenant's."""
        slots = generation.status.traffic.limits.tenant_slots
        return slots is not None and len(self._of_tenant(generation)) >= slots

    def pick_victim(self, incoming: Generation) -> Generation | None:
        """Who is to leave a slot now for `incoming`, the one used least recently; None where all
        are busy. Of its tenant, where that is full.

        Raises EngineRefusedError where all are pinned.
        """
        candidates = self._candidates(incoming)
        if all(resident.status.slot.pinned for resident in candidates):
            of_tenant = candidates and self.tenant_full(incoming)
            where = f"slots of {self._tenant(incoming)!a}" if of_tenant else "adapter memory"
            raise EngineRefusedError(
                f"{where}: found {len(candidates)} pinned adapters, expected room"
            )
        idle = (resident for resident in movable(candidates) if not resident.status.running)
        return next(idle, None)

    def make_one_yield(self, incoming: Generation) -> None:
        """The one that came in first, unless another yields already; of `incoming`'s tenant, where
        that is full."""
        movable_ones = movable(self._candidates(incoming))
        if movable_ones and not any(resident.status.slot.yielding for resident in movable_ones):
            min(movable_ones, key=lambda resident: resident.status.slot.turn).status.slot.give_way()

    def _candidates(self, incoming: Generation) -> list[Generation]:
        return self._of_tenant(incoming) if self.tenant_full(incoming) else list(self)

    def _of_tenant(self, generation: Generation) -> list[Generation]:
        tenant = self._tenant(generation)
        return [resident for resident in self if tenant and self._tenant(resident) == tenant]

    def _tenant(self, generation: Generation) -> str | None:
        return generation.status.traffic.limits.tenant


def movable(residents: Iterable[Generation]) -> list[Generation]:
    """What is still checked has a slot and is not resident yet: it stays."""
    slots = ((resident, resident.status.slot) for resident in residents)
    return [resident for resident, slot in slots if slot.resident and not slot.pinned]
