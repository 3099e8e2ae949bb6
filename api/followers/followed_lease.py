"""What a follower's request holds of an adapter; the owner of the registry knows the same of it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from molehill.api.adapters.errors import EngineRefusedError
from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.followers import messages
from molehill.api.followers.owner import Owner

# Generated tokens are told this often, not one by one.
CHARGE_SECONDS = 0.05

# Of this process's client of the engine: returns once the engine has done what it was asked before.
CaughtUp = Callable[[], Awaitable[Any]]


class AdmittedRequest:
    """A request that the owner has admitted, until all that works for it has ended.

    number: of its lease, for the owner. unprobed: see Lease, when it was admitted.
    """

    def __init__(
        self,
        owner: Owner,
        number: int,
        generation: Generation,
        unprobed: bool,
        caught_up: CaughtUp,
    ) -> None:
        self.owner, self.number = owner, number
        self.generation, self.unprobed = generation, unprobed
        self.caught_up = caught_up
        self._leases = 0
        self._uncharged = 0
        self._charging: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        self._leases += 1

    def end(self) -> None:
        """Once for each `begin`."""
        self._leases -= 1
        if not self._leases:
            self._charge()
            self.owner.send(messages.Release(self.number))

    def charge(self, tokens: int) -> None:
        self._uncharged += tokens
        if self._charging is None:
            loop = asyncio.get_running_loop()
            self._charging = loop.call_later(CHARGE_SECONDS, self._charge)

    def _charge(self) -> None:
        if self._charging is not None:
            self._charging.cancel()
            self._charging = None
        if self._uncharged:
            self.owner.send(messages.Charge(self.number, self._uncharged))
            self._uncharged = 0


class FollowedLease:
    """One hold of an admitted request. Implements RequestLease."""

    def __init__(self, admitted: AdmittedRequest) -> None:
        self._admitted = admitted
        self._slot: int | None = None
        self._over = False
        admitted.begin()

    @property
    def generation(self) -> Generation:
        return self._admitted.generation

    @property
    def unprobed(self) -> bool:
        return self._admitted.unprobed

    def share(self) -> "FollowedLease":
        return FollowedLease(self._admitted)

    def charge(self, tokens: int) -> None:
        self._admitted.charge(tokens)

    async def acquire_slot(self) -> Tier:
        """Raises EngineRefusedError."""
        owner = self._admitted.owner
        self._slot = number = owner.number()
        try:
            answer = await owner.ask(messages.AcquireSlot(number, self._admitted.number))
        except BaseException:
            self.release_slot()
            raise
        if isinstance(answer, messages.Entered):
            return answer.tier
        self.release_slot()
        message = answer.message if isinstance(answer, messages.SlotRefused) else ""
        raise EngineRefusedError(message)

    def release_slot(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            self._admitted.owner.send(messages.ReleaseSlot(slot))

    def release(self) -> None:
        """Also the slot. A second call does nothing."""
        if not self._over:
            self._over = True
            self.release_slot()
            self._admitted.end()

    def abandon(self) -> None:
        """See Lease. The engine hears from this process that the request ends, from the owner that
        the adapter leaves: it is asked in between, so that it hears them in this order."""
        if self._over or self._slot is None:
            self.release()
            return
        _abandoned.add(task := asyncio.ensure_future(self._release_after_the_engine()))
        task.add_done_callback(_abandoned.discard)

    async def _release_after_the_engine(self) -> None:
        with suppress(Exception):
            # One that is gone ends the server.
            await self._admitted.caught_up()
        self.release()


# Kept until they are done: nobody else has them.
_abandoned: set[asyncio.Future[None]] = set()
