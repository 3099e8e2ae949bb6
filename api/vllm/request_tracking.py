"""Counts the requests that run on each generation, where all of vLLM's routes come together.

A request is admitted to its generation when its route looks its model up, or else when it first
asks the engine for output: before a response begins. From then on, until the response has ended,
the generation is its own, whatever happens to the name and however often the route asks; the
response says which it is.

Its slot in the workers it has from when it needs it to the engine's last output, whether or not a
client reads that.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError
from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.errors import EngineRefusedError, UnknownModelError
from molehill.api.adapters.events import Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm.lease import Stay
from molehill.api.vllm.read_ahead import ReadAhead

HEADER = "Molehill-Generation"

# A client that has not come back for the next output by then is not waited for.
PATIENCE_SECONDS = 1.0

Outputs = AsyncGenerator[Any, None]


@dataclass
class Answering:
    """The HTTP request that is being answered. stays: by adapter. unread: its calls of the engine
    that have not begun."""

    stays: dict[str, Stay] = field(default_factory=dict)
    unread: "weakref.WeakSet[Counted]" = field(default_factory=weakref.WeakSet)
    ended: bool = False

    def stay(self, registry: AdapterRegistry, lora_request: Any) -> Stay:
        """One more holder of this request's stay. What goes on after the response is counted while
        it lasts."""
        found = self.stays.get(lora_request.lora_name)
        if found is not None and not found.over:
            found.join()
            return found
        new = Stay(registry, admitted(registry, lora_request))
        if not self.ended:
            new.join()
            self.stays[lora_request.lora_name] = new
        return new

    async def begin(self, events: bool) -> None:
        """Returns once all that a stream will read is in the workers. Raises GracefulHTTPError.

        events: it is a stream of events, whose route may ask the engine only when it has begun; the
        adapter was in the workers then, at least.
        """
        for call in list(self.unread):
            await call.begin()
        for stay in self.stays.values():
            if events and not stay.asked:
                stay.found = await bring_in(stay)
                stay.registry.residency.release(stay.generation)

    def end(self) -> None:
        self.ended = True
        for stay in self.stays.values():
            stay.leave()


answering: ContextVar[Answering | None] = ContextVar("answering", default=None)


class Refused(Exception):
    """Ends a route whose answer must not begin."""


class GenerationHeader:
    """Names the generation in the header of every answer that an adapter gave (pure ASGI).

    A stream begins when its adapter is there, so that a refusal has its own status.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Answering()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and request.stays:
                try:
                    if message["status"] == HTTPStatus.OK:
                        await request.begin(begins_events(message))
                except GracefulHTTPError as error:
                    await refusal(error)(scope, receive, send)
                    raise Refused from error
                generation = next(iter(request.stays.values())).generation
                MutableHeaders(scope=message)[HEADER] = generation.digest
            await send(message)

        token = answering.set(request)
        try:
            await self._app(scope, receive, named)
        except Refused:
            pass
        finally:
            answering.reset(token)
            request.end()


def begins_events(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def refusal(error: GracefulHTTPError) -> Response:
    """As vLLM's routes answer it where they do not stream."""
    body = create_error_response(error)
    return JSONResponse(body.model_dump(), body.error.code)


def admitted(registry: AdapterRegistry, lora_request: Any) -> Generation:
    """See AdapterRegistry.admit. Raises VLLMNotFoundError, as vLLM's routes understand it."""
    try:
        return registry.admit(lora_request)
    except UnknownModelError as error:
        raise VLLMNotFoundError(str(error)) from error


def admit(registry: AdapterRegistry, lora_request: Any) -> None:
    """A route has looked its request's model up."""
    request = answering.get()
    if request is not None:
        request.stay(registry, lora_request).leave()


def count_requests(engine_client: Any, registry: AdapterRegistry) -> None:
    """Puts the count in front of this engine client's `generate` and `encode`."""
    engine_client.generate = counted(engine_client.generate, registry)
    engine_client.encode = counted(engine_client.encode, registry)


def counted(call: Callable[..., Any], registry: AdapterRegistry) -> Callable[..., Any]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted and counted."""

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        if lora_request is None:
            return call(*args, **kwargs)
        request = answering.get()
        # A refusal must come before a streaming response has begun.
        if request is None:
            stay = Stay(registry, admitted(registry, lora_request))
        else:
            stay = request.stay(registry, lora_request)
        stay.asked = True
        outputs = run(stay, call, args, kwargs)
        counted = Counted(stay, outputs, gives_deltas(*args, **kwargs))
        if request is not None:
            request.unread.add(counted)
        return counted

    return start


def gives_deltas(_: Any = None, sampling_params: Any = None, *__: Any, **___: Any) -> bool:
    """Whether such a call's outputs hold only what is new in them."""
    kind = getattr(sampling_params, "output_kind", None)
    return kind is RequestOutputKind.DELTA


async def bring_in(stay: Stay) -> Tier:
    """Takes the generation's slot; where it was found. Raises GracefulHTTPError, as vLLM's routes
    understand it."""
    generation = stay.generation
    try:
        return await stay.registry.residency.acquire(generation)
    except EngineRefusedError as error:
        message = str(error).replace(generation.request.lora_path, generation.name)
        raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from error


async def run(
    stay: Stay, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outputs:
    """None when the generation is in the workers, then the engine's outputs."""
    registry, generation = stay.registry, stay.generation
    tier = await bring_in(stay)
    registry.events.hit(generation.name, stay.found or tier)
    stay.found = None
    in_engine = True
    try:
        yield None
        async with aclosing(call(*args, lora_request=generation.request, **kwargs)) as outputs:
            async for output in outputs:
                if in_engine and output.finished:
                    in_engine = False
                    registry.residency.release(generation)
                yield output
    finally:
        if in_engine:
            registry.residency.release(generation)


class Counted:
    """Outputs of one call, which holds a stay until they end, are closed or dropped.

    A route may drop them unread, when its next prompt turns out to be bad. A client may stop
    reading: the engine does not, so its outputs are then read ahead.
    """

    def __init__(self, stay: Stay, outputs: Outputs, deltas: bool) -> None:
        self._stay = stay
        self._outputs = outputs
        self._deltas = deltas
        self._ahead: ReadAhead | None = None
        self._begun = self._reading = False
        self._reads = 0
        self._loop = asyncio.get_running_loop()
        # Garbage is collected in any thread.
        self._dropped = weakref.finalize(self, self._loop.call_soon_threadsafe, stay.leave)
        self._dropped.atexit = False

    async def begin(self) -> None:
        """Returns once the generation is in the workers. Raises GracefulHTTPError."""
        if self._begun:
            return
        self._begun = True
        try:
            await anext(self._outputs)
        except BaseException:
            self._finish()
            raise
        self._look_later()

    def __aiter__(self) -> "Counted":
        return self

    async def __anext__(self) -> Any:
        if not self._begun:
            await self.begin()
        self._reading = True
        try:
            return await (self._ahead.next() if self._ahead else anext(self._outputs))
        except BaseException:
            self._finish()
            raise
        finally:
            self._reading = False
            self._reads += 1

    async def aclose(self) -> None:
        try:
            if self._ahead is not None:
                await self._ahead.stop()
            await self._outputs.aclose()
        finally:
            self._finish()

    def _finish(self) -> None:
        if self._dropped.detach() is not None:
            self._stay.leave()
            if self._ahead is not None:
                self._ahead.cancel()

    def _look_later(self) -> None:
        self._loop.call_later(PATIENCE_SECONDS, look, weakref.ref(self), self._reads)

    def look(self, reads: int) -> None:
        """Reads ahead if nobody has come for an output since there were `reads`."""
        if not self._dropped.alive:
            return
        if self._reading or self._reads != reads:
            self._look_later()
            return
        self._stay.join()
        self._ahead = ReadAhead(self._outputs, self._deltas, self._stay.leave)
        stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._ahead.cancel)
        stop.atexit = False


def look(call: weakref.ref[Counted], reads: int) -> None:
    """A timer must not keep what nobody else has any more."""
    found = call()
    if found is not None:
        found.look(reads)
