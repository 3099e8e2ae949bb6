"""What holds a generation: for a request, from its admission until all that works for it has ended,
or for a load or a pin.
"""

from collections.abc import Callable

from molehill.api.adapters.events import NotInvoked, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.slots import Residency


class Lease:
    """Counts as one request, however many prompts, beams or turns are made of it.

    It begins with one holder and is over when the last one has left. ended: called then. asked: for
    output of the engine. found: where the adapter was when it was brought in before that.
    """

    def __init__(
        self, residency: Residency, generation: Generation, ended: Callable[[Generation], None]
    ) -> None:
        self.generation = generation
        self.asked = False
        self.found: Tier | None = None
        self._residency = residency
        self._ended = ended
        self._holders = 1
        generation.status.enter()

    @property
    def over(self) -> bool:
        return not self._holders

    def join(self) -> None:
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1
        if not self._holders:
            self.generation.status.leave()
            self._ended(self.generation)

    async def take_slot(self) -> Tier:
        """See Residency.acquire; each is to be followed by one `give_slot_back`."""
        return await self._residency.acquire(self.generation)

    def give_slot_back(self) -> None:
        self._residency.release(self.generation)

    def not_invoked(self, outcome: NotInvoked) -> None:
        """Counts a prompt that does not activate the adapter."""
        self._residency.events.not_invoked(self.generation.name, outcome)

    def hit(self, tier: Tier) -> None:
        """Counts where the engine's output found the adapter, if it was not brought in before."""
        self._residency.events.hit(self.generation.name, self.found or tier)
        self.found = None
