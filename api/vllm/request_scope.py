"""The HTTP request that is being answered: what it holds and asks for, until its answer ends."""

import weakref
from collections.abc import Collection, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter
from typing import Any, NamedTuple, Protocol

from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError

from molehill.api.adapters.errors import (
    EngineRefusedError,
    LimitReachedError,
    RoutingBusyError,
    UnknownModelError,
)
from molehill.api.adapters.events import Tier
from molehill.api.adapters.request_admission import RequestAdmission, RequestLease
from molehill.api.vllm.routed_calls import RoutedCall, RoutedTokens, RoutingAsked
from molehill.engine.vllm.protocol import RoutingUsage


class SlotWait(NamedTuple):
    """tier: where an adapter was that is now in a slot. seconds: until it was there. probed: it was
    meanwhile."""

    tier: Tier
    seconds: float
    probed: bool = False


class Unread(Protocol):
    """Outputs that nobody has asked for yet."""

    async def begin(self) -> None:
        """Returns once the generation is in the workers. Raises GracefulHTTPError."""


@dataclass(frozen=True)
class Mixed:
    """A mix that a request asks for. models: what it may name as its model, which is then the mix.
    lora_request: the engine's, of the mix."""

    models: Collection[str | None]
    lora_request: Any


@dataclass
class RequestScope:
    """The HTTP request that is being answered, or a call of the engine outside of one.

    path: of the route, None outside of a request. leases: by adapter, each held until the answer
    has ended. asked: adapters that the engine was asked for. waits: of those that were brought in
    before that. mixed: what it asks for in the place of its model. routing: what it asks to be told
    of its routing. routed: calls of the engine whose routing is kept. unread: calls of the engine
    that have not begun. refused: why it is not answered, where a limit says so. request_id: the
    client's, or else the first that the engine was asked with. trace_headers: W3C's trace context,
    as the client sent it.
    """

    path: str | None = None
    leases: dict[str, RequestLease] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    waits: dict[str, SlotWait] = field(default_factory=dict)
    mixed: Mixed | None = None
    routing: RoutingAsked | None = None
    # Or how many choices another one has, of which nothing is told.
    routed: list[RoutedCall | int] = field(default_factory=list)
    unread: "weakref.WeakSet[Unread]" = field(default_factory=weakref.WeakSet)
    refused: LimitReachedError | RoutingBusyError | None = None
    request_id: str = ""
    trace_headers: Mapping[str, str] | None = None
    ended: bool = False
    # What its leases have in common; not itself, which holds them.
    request: object = field(default_factory=object)

    def lease(self, registry: RequestAdmission, lora_request: Any) -> RequestLease:
        """One more on the generation that the answer runs on. What goes on after the response is
        counted while it lasts. Raises, as vLLM's routes understand them, VLLMNotFoundError, and
        GracefulHTTPError where a limit is reached."""
        name = lora_request.lora_name
        if name in self.leases and not self.ended:
            return self.leases[name].share()
        try:
            lease = registry.admit(lora_request, self.request)
        except UnknownModelError as error:
            raise VLLMNotFoundError(str(error)) from error
        except LimitReachedError as error:
            self.refused = error
            raise GracefulHTTPError(str(error), HTTPStatus.TOO_MANY_REQUESTS) from error
        if not self.ended:
            self.leases[name] = lease.share()
        return lease

    def run_on(self, mix: RequestLease, models: Collection[str | None]) -> None:
        """In the place of the model that the request names, one of `models`."""
        self.leases[mix.generation.name] = mix
        self.mixed = Mixed(models, mix.generation.request)

    async def begin(self, events: bool) -> None:
        """Returns once all that a stream will read is in the workers. Raises GracefulHTTPError.

        events: it is a stream of events, whose route may ask the engine only when it has begun; the
        adapter was in the workers then, at least.
        """
        for call in list(self.unread):
            await call.begin()
        for name, lease in self.leases.items():
            if events and name not in self.asked:
                self.waits[name] = await bring_in(lease)
                lease.release_slot()

    def routed_tokens(self, choice: int) -> RoutedTokens | None:
        """Of one of the answer's choices, what was not taken yet: there are as many for each prompt
        as samples were asked for."""
        for call in self.routed:
            samples = call if isinstance(call, int) else call.samples
            if choice < samples:
                return None if isinstance(call, int) else call.take(choice)
            choice -= samples
        return None

    def routing_usage(self) -> RoutingUsage | None:
        """Of the whole answer, once it is complete; None before, and where it is not asked for."""
        if self.routing is None or not self.routing.usage:
            return None
        usages = [call.usage for call in self.routed if not isinstance(call, int)]
        if any(usage is None for usage in usages):
            return None
        return sum((usage for usage in usages if usage is not None), RoutingUsage())

    def end(self) -> None:
        self.ended = True
        for call in self.routed:
            if not isinstance(call, int):
                call.end()
        for lease in self.leases.values():
            lease.release()


request_scope: ContextVar[RequestScope | None] = ContextVar("request_scope", default=None)


async def bring_in(lease: RequestLease) -> SlotWait:
    """Takes the generation's slot. Raises GracefulHTTPError, as vLLM's routes understand it."""
    generation, start = lease.generation, perf_counter()
    unprobed = lease.unprobed
    try:
        tier = await lease.acquire_slot()
        return SlotWait(tier, perf_counter() - start, unprobed)
    except EngineRefusedError as error:
        message = str(error).replace(generation.request.lora_path, generation.name)
        raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from error
