"""An adapter's place in the queue for the workers' slots."""

import asyncio
from dataclasses import dataclass, field

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation

Turn = asyncio.Future[Tier]


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
        return [turn for turn in self.turns if not turn.done()]

    def refuse(self, error: Exception) -> None:
        for turn in self.open():
            turn.set_exception(error)

    def admit(self, tier: Tier) -> None:
        for turn in self.open():
            turn.set_result(tier)
