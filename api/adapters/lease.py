"""What holds a generation: for a request, from its admission until all that works for it has ended,
or for a load or a pin.
"""

from collections.abc import Callable, Sequence

from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.residency import Residency
from molehill.api.adapters.status import Hold
from molehill.api.adapters.traffic import AdapterTraffic


class Lease(Hold):
    """One hold of a generation. What works for one request has a lease each, all of that request.

    ended: called when it is over. traffics: of the names that the request asked for, for whom it
    counts as one in flight.
    """

    def __init__(
        self,
        residency: Residency,
        generation: Generation,
        ended: Callable[[Generation], None],
        request: object | None = None,
        traffics: Sequence[AdapterTraffic] = (),
    ) -> None:
        super().__init__(request)
        self.generation = generation
        self._residency = residency
        self._ended = ended
        self._traffics = traffics
        generation.status.hold(self)
        for traffic in traffics:
            traffic.begin(request)

    @property
    def over(self) -> bool:
        return self not in self.generation.status.holds

    @property
    def unprobed(self) -> bool:
        """Whether something must still be made sure of before it gets its slot."""
        return self.generation.status.check is not None

    def share(self) -> "Lease":
        """One more of the same generation and request."""
        return Lease(self._residency, self.generation, self._ended, self.request, self._traffics)

    def charge(self, tokens: int) -> None:
        """The names that the request asked for."""
        for traffic in self._traffics:
            traffic.charge(tokens)

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
            for traffic in self._traffics:
                traffic.end(self.request)
            self._ended(self.generation)

    def abandon(self) -> None:
        """`release`, of one whose request the engine has been told to end and may not have yet. It
        does so before anything that it is asked later, and so before the adapter leaves."""
        self.release()
