"""The queue for the workers' slots, in which every adapter has one place."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.status import Hold


@dataclass(eq=False)
class Turn:
    """hold: of whoever waits. tier: where the adapter was, once it is in a slot."""

    hold: Hold
    tier: "asyncio.Future[Tier]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


@dataclass(eq=False)
class Waiting:
    """One adapter and the turns of the requests that wait for it.

    reading: the workers read it now. prepared: they have, and hold it ready for a slot.
    checking: it has one, and what must be made sure of first is on its way.
    crowded: how many adapters had left their slots when memory had no room for it.
    overtaken: ids of what went before it, which fitted when it did not; each does so once.
    overtakes: what it goes before, if it goes before any.
    """

    generation: Generation
    turns: list[Turn] = field(default_factory=list)
    reading: bool = False
    prepared: bool = False
    checking: bool = False
    crowded: int | None = None
    overtaken: set[int] = field(default_factory=set)
    overtakes: "Waiting | None" = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits for it any more."""
        return not self.open()

    def open(self) -> list[Turn]:
        """Of the requests that still wait."""
        return [turn for turn in self.turns if not turn.tier.done()]

    @property
    def requests(self) -> int:
        """That still wait, each once; a load is none."""
        return len({turn.hold.request for turn in self.open()} - {None})

    def refuse(self, error: Exception) -> None:
        for turn in self.open():
            turn.tier.set_exception(error)

    def admit(self, tier: Tier) -> None:
        """Each keeps the adapter in its slot from here on, also before it hears of it."""
        for turn in self.open():
            self.generation.status.slot.run(turn.hold)
            turn.tier.set_result(tier)


class Queue:
    """All that wait, in the order of their turns."""

    def __init__(self) -> None:
        self._places: dict[int, Waiting] = {}

    def __bool__(self) -> bool:
        return bool(self._places)

    def __iter__(self) -> Iterator[Waiting]:
        """Of those that wait now, whatever becomes of them meanwhile."""
        return iter(list(self._places.values()))

    def __contains__(self, generation: Generation) -> bool:
        return generation.lora_int_id in self._places

    def join(self, generation: Generation, hold: Hold) -> Turn:
        """At the generation's place, else behind all others."""
        turn = Turn(hold)
        self._places.setdefault(generation.lora_int_id, Waiting(generation)).turns.append(turn)
        return turn

    def holds(self, waiting: Waiting) -> bool:
        """Whether that very place is still waited at."""
        return self._places.get(waiting.generation.lora_int_id) is waiting

    def leave(self, waiting: Waiting) -> None:
        """Those that join from here on have a new place."""
        self._places.pop(waiting.generation.lora_int_id, None)

    def refuse(self, waiting: Waiting, error: Exception) -> None:
        """All who wait there."""
        self.leave(waiting)
        waiting.generation.status.slot.give_way(False)
        waiting.refuse(error)
