"""What holds a generation: for a request, from its admission until all that works for it has ended,
or for a load or a pin.
"""

from collections.abc import Callable

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.status import Hold


class Lease(Hold):
    """One hold of a generation. What works for one request has a lease each, all of that request.

    ended: called when it is over.
    """

    def __init__(
        self,
        residency: Residency,
        generation: Generation,
        ended: Callable[[Generation], None],
        request: object | None = None,
    ) -> None:
        super().__init__(request)
        self.generation = generation
        self._residency = residency
        self._ended = ended
        generation.status.hold(self)

    @property
    def over(self) -> bool:
        return self not in self.generation.status.holds

    def share(self) -> "Lease":
        """One more of the same generation and request."""
        return Lease(self._residency, self.generation, self._ended, self.request)

    async def acquire_slot(self) -> Tier:
        """See Residency.acquire."""
        return await self._residency.acquire(self.generation, self)

    def release_slot(self) -> None:
        if self.in_slot:
            self._residency.release(self.generation, self)

    def release(self) -> None:
        """Also the slot. A second call does nothing."""
        if not self.over:
            self.release_slot()
            self.generation.status.release(self)
            self._ended(self.generation)
