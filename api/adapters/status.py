"""What becomes of a generation. It is read everywhere and written by this module's methods alone:
of what is served by the registry, of the slots by those who give them out.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.source import Source


class AdapterState(StrEnum):
    """How an adapter stands, in the words of GET /v1/adapters."""

    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"
    FAILED = "failed"


@dataclass(eq=False)
class Hold:
    """Keeps a generation from being freed, and in its slot while it has one.

    request: what it is part of; holds of one request have the same object here. None for what is no
    request: a load, a pin. in_slot: whether the engine needs the adapter for it now.
    """

    request: object | None = None
    in_slot: bool = False


@dataclass(eq=False)
class GenerationStatus:
    """source: where it was last loaded from. note: what has become of that since, where known.

    state: loading until its name points at it; draining when no new request may be admitted.
    holds: all that need it; it is freed when there are none and no more can come.
    check: what must still be made sure of when it first comes into the workers, or None; raises
    EngineRefusedError.
    when_not_invoked: None of an adapter that acts on every token.
    pinned: it is not taken out of the workers. last_used: Unix seconds. loads: how often it came
    into the workers.
    resident: in the workers' slots.
    yielding: resident, but its next requests wait until others have had a turn. since: number of
    the turn that brought it in.
    """

    source: Source
    state: AdapterState = AdapterState.LOADING
    note: str | None = None
    holds: set[Hold] = field(default_factory=set)
    check: Callable[[], Awaitable[None]] | None = None
    when_not_invoked: WhenNotInvoked | None = None
    pinned: bool = False
    last_used: float | None = None
    loads: int = 0
    resident: bool = False
    yielding: bool = False
    since: int = 0

    @property
    def draining(self) -> bool:
        return self.state is AdapterState.DRAINING

    # Two numbers of the one set: a request is in flight before it has a slot, and still is when the
    # engine is done and its client reads on. Only a hold in the slot keeps others out of that.

    @property
    def in_flight(self) -> int:
        """Requests that hold it, each once."""
        return len({hold.request for hold in self.holds} - {None})

    @property
    def running(self) -> int:
        """Holds that keep it in its slot."""
        return sum(hold.in_slot for hold in self.holds)

    # By the registry

    def serve(self) -> None:
        self.state = AdapterState.SERVING

    def drain(self) -> None:
        self.state = AdapterState.DRAINING

    def load_again(self, source: Source) -> None:
        """The same weights, from there."""
        self.source, self.note = source, None

    def remark(self, note: str) -> None:
        """On what has become of the source."""
        self.note = note

    def hold(self, hold: Hold) -> None:
        self.holds.add(hold)

    def let_go(self, hold: Hold) -> None:
        """Out of the slot before, if it is in one."""
        self.holds.discard(hold)

    def check_later(self, check: Callable[[], Awaitable[None]]) -> None:
        self.check = check

    def pass_check(self) -> None:
        self.check = None

    def answer_not_invoked(self, when: WhenNotInvoked) -> None:
        """How, from the next request on."""
        self.when_not_invoked = when

    # By the slots

    def pin(self, pinned: bool) -> None:
        self.pinned = pinned

    def come_in(self) -> None:
        """Into a slot."""
        self.resident = True
        self.loads += 1

    def go_out(self) -> None:
        self.resident = self.yielding = False

    def take_turn(self, number: int, yielding: bool) -> None:
        self.since, self.yielding = number, yielding

    def give_way(self, yielding: bool = True) -> None:
        self.yielding = yielding

    def run(self, hold: Hold) -> None:
        """The engine gets the request."""
        hold.in_slot = True
        self.last_used = time.time()

    def stop(self, hold: Hold) -> None:
        """The engine is done with it."""
        hold.in_slot = False
