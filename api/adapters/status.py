"""What becomes of a generation. It is read everywhere and written by this module's methods alone:
GenerationStatus' are called by the registry, SlotStatus' by those who give the slots out.
"""

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from molehill.api.adapters.invocation import WhenNotInvoked
from molehill.api.adapters.source import Source
from molehill.api.adapters.traffic import AdapterTraffic


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
class SlotStatus:
    """What the slots' scheduling knows of a generation.

    pinned: it is not taken out of the workers. last_used: Unix seconds. loads: how often it came
    into the workers.
    resident: in the workers' slots.
    yielding: resident, but its next requests wait until others have had a turn. turn: number of
    the one that brought it in.
    """

    pinned: bool = False
    last_used: float | None = None
    loads: int = 0
    resident: bool = False
    yielding: bool = False
    turn: int = 0

    def enter(self) -> None:
        self.resident = True
        self.loads += 1

    def leave(self) -> None:
        self.resident = self.yielding = False

    def step_back(self) -> None:
        """It keeps its slot, but is nobody's until it has been checked; then it enters again."""
        self.resident = False
        self.loads -= 1

    def take_turn(self, number: int, yielding: bool) -> None:
        self.turn, self.yielding = number, yielding

    def give_way(self, yielding: bool = True) -> None:
        self.yielding = yielding

    def pin(self, pinned: bool) -> None:
        self.pinned = pinned

    def run(self, hold: Hold) -> None:
        """The engine gets the request."""
        hold.in_slot = True
        self.last_used = time.time()

    def stop(self, hold: Hold) -> None:
        """The engine is done with it."""
        hold.in_slot = False


@dataclass(eq=False)
class GenerationStatus:
    """source: where it was last loaded from. traffic: of its name, whose generations share one.
    note: what has become of the source since, where known.

    state: loading until its name points at it; draining when no new request may be admitted.
    holds: all that need it; it is freed when there are none and no more can come.
    check: what must still be made sure of before the first request gets it, or None; raises
    EngineRefusedError.
    when_not_invoked: None of an adapter that acts on every token.
    """

    source: Source
    traffic: AdapterTraffic
    state: AdapterState = AdapterState.LOADING
    note: str | None = None
    holds: set[Hold] = field(default_factory=set)
    check: Callable[[], Awaitable[None]] | None = None
    when_not_invoked: WhenNotInvoked | None = None
    slot: SlotStatus = field(default_factory=SlotStatus)

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

    def serve(self) -> None:
        self.state = AdapterState.SERVING

    def drain(self) -> None:
        self.state = AdapterState.DRAINING

    def succeed(self, old: "GenerationStatus") -> None:
        """It takes the place of `old`, whose requests count on."""
        self.traffic = old.traffic

    def set_source(self, source: Source, note: str | None = None) -> None:
        """Where the same weights come from now."""
        self.source, self.note = source, note

    def hold(self, hold: Hold) -> None:
        self.holds.add(hold)

    def release(self, hold: Hold) -> None:
        """Out of the slot before, if it is in one."""
        self.holds.discard(hold)

    def check_with(self, check: Callable[[], Awaitable[None]] | None) -> None:
        """None once nothing is left to be made sure of."""
        self.check = check

    def answer_not_invoked(self, when: WhenNotInvoked) -> None:
        """How, from the next request on."""
        self.when_not_invoked = when
