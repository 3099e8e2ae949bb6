"""Counts the requests that run on each generation, where all of vLLM's routes come together.

A request is admitted to its generation when its route looks its model up, or else when it first
asks the engine for output: before a response begins. From then on, until the response has ended,
the generation is its own, whatever happens to the name and however often the route asks; the
response says which it is.

Its slot in the workers it has from when it needs it to the engine's last output, whether or not a
client reads that.
"""

import asyncio
import inspect
import weakref
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.errors import EngineRefusedError, NotInvokedError, UnknownModelError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm.invocation import Decode, check_invoked, decoder
from molehill.api.vllm.read_ahead import ReadAhead
from molehill.api.vllm.stop_tokens import stop_as_adapter_does

HEADER = "Molehill-Generation"

# A client that has not come back for the next output by then is not waited for.
PATIENCE_SECONDS = 1.0

Outputs = AsyncGenerator[Any, None]


@dataclass(frozen=True)
class Mixed:
    """A mix that a request asks for. models: what it may name as its model, which is then the mix.
    lora_request: the engine's, of the mix."""

    models: Collection[str | None]
    lora_request: Any


@dataclass
class RequestScope:
    """The HTTP request that is being answered, or a call of the engine outside of one.

    leases: by adapter, each held until the answer has ended. asked: adapters that the engine was
    asked for. tiers: where those were that were brought in before that. mixed: what it asks for in
    the place of its model. unread: calls of the engine that have not begun.
    """

    leases: dict[str, Lease] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    tiers: dict[str, Tier] = field(default_factory=dict)
    mixed: Mixed | None = None
    unread: "weakref.WeakSet[LeasedOutputs]" = field(default_factory=weakref.WeakSet)
    ended: bool = False
    # What its leases have in common; not itself, which holds them.
    request: object = field(default_factory=object)

    def lease(self, registry: AdapterRegistry, lora_request: Any) -> Lease:
        """One more on the generation that the answer runs on. What goes on after the response is
        counted while it lasts. Raises VLLMNotFoundError, as vLLM's routes understand it."""
        name = lora_request.lora_name
        if name in self.leases and not self.ended:
            return self.leases[name].share()
        try:
            lease = registry.admit(lora_request, self.request)
        except UnknownModelError as error:
            raise VLLMNotFoundError(str(error)) from error
        if not self.ended:
            self.leases[name] = lease.share()
        return lease

    def run_on(self, mix: Lease, models: Collection[str | None]) -> None:
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
                self.tiers[name] = await bring_in(lease)
                lease.give_slot_back()

    def end(self) -> None:
        self.ended = True
        for lease in self.leases.values():
            lease.leave()


request_scope: ContextVar[RequestScope | None] = ContextVar("request_scope", default=None)


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
        request = RequestScope()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and request.leases:
                try:
                    if message["status"] == HTTPStatus.OK:
                        await request.begin(begins_events(message))
                except GracefulHTTPError as error:
                    await refusal(error)(scope, receive, send)
                    raise Refused from error
                generation = next(iter(request.leases.values())).generation
                MutableHeaders(scope=message)[HEADER] = generation.digest
            await send(message)

        token = request_scope.set(request)
        try:
            await self._app(scope, receive, named)
        except Refused:
            pass
        finally:
            request_scope.reset(token)
            request.end()


def begins_events(start: Message) -> bool:
    return Headers(raw=start["headers"]).get("content-type", "").startswith("text/event-stream")


def refusal(error: GracefulHTTPError) -> Response:
    """As vLLM's routes answer it where they do not stream."""
    body = create_error_response(error)
    return JSONResponse(body.model_dump(), body.error.code)


def mix_for(model: object) -> Any:
    """What the request that is being answered runs on in the place of its model; None for that
    itself."""
    request = request_scope.get()
    if request is None or request.mixed is None or model not in request.mixed.models:
        return None
    return request.mixed.lora_request


def check_model(model: str) -> None:
    """Raises VLLMValidationError, as vLLM's routes understand it, where a request names another
    adapter than those of its mix."""
    request = request_scope.get()
    if request is not None and request.mixed is not None and model not in request.mixed.models:
        raise VLLMValidationError(
            f"model: found {model!a} beside a mix, expected the base model or an adapter of the "
            "mix",
            parameter="model",
        )


def admit(registry: AdapterRegistry, lora_request: Any) -> Generation | None:
    """A route has looked its request's model up. The generation that the answer runs on; outside of
    a request the name's, if there is one."""
    request = request_scope.get()
    if request is None:
        return registry.get(lora_request.lora_name)
    lease = request.lease(registry, lora_request)
    lease.leave()
    return lease.generation


def count_requests(engine_client: Any, registry: AdapterRegistry) -> None:
    """Puts the count in front of this engine client's `generate` and `encode`."""
    decode = decoder(engine_client)
    engine_client.generate = counted(engine_client.generate, registry, decode)
    engine_client.encode = counted(engine_client.encode, registry, decode)


def counted(
    call: Callable[..., Any], registry: AdapterRegistry, decode: Decode
) -> Callable[..., Any]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted and counted."""
    names = list(inspect.signature(call).parameters)

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        if lora_request is None:
            return call(*args, **kwargs)
        request = request_scope.get() or RequestScope(ended=True)
        # A refusal must come before a streaming response has begun.
        lease = request.lease(registry, lora_request)
        name = lease.generation.name
        try:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            invoked = is_invoked(lease.generation, registry.events, given, decode)
            if invoked:
                stop_as_adapter_does(lease.generation.content.chat, given)
        except Exception:
            lease.leave()
            raise
        request.asked.add(name)

        def hit(tier: Tier) -> None:
            registry.events.hit(name, request.tiers.pop(name, tier))

        outputs = run(lease, hit, call, args, kwargs) if invoked else run_base(call, args, kwargs)
        counted = LeasedOutputs(lease, outputs, gives_deltas(*args, **kwargs))
        request.unread.add(counted)
        return counted

    return start


def is_invoked(
    generation: Generation, events: LifecycleMetrics, given: Mapping[str, Any], decode: Decode
) -> bool:
    """Whether the adapter acts on any token; False if the base is to answer for it.

    given: the call's arguments by name. Raises VLLMValidationError, as vLLM's routes understand it.
    """
    try:
        check_invoked(generation.name, generation.content.invocation_tokens, given, decode)
    except NotInvokedError as error:
        if generation.status.when_not_invoked == "base":
            events.not_invoked(generation.name, "base")
            return False
        events.not_invoked(generation.name, "refused")
        raise VLLMValidationError(str(error), parameter="prompt") from error
    return True


def gives_deltas(_: Any = None, sampling_params: Any = None, *__: Any, **___: Any) -> bool:
    """Whether such a call's outputs hold only what is new in them."""
    kind = getattr(sampling_params, "output_kind", None)
    return kind is RequestOutputKind.DELTA


async def bring_in(lease: Lease) -> Tier:
    """Takes the generation's slot; where it was before. Raises GracefulHTTPError, as vLLM's routes
    understand it."""
    generation = lease.generation
    try:
        return await lease.take_slot()
    except EngineRefusedError as error:
        message = str(error).replace(generation.request.lora_path, generation.name)
        raise GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE) from error


async def run(
    lease: Lease,
    hit: Callable[[Tier], None],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Outputs:
    """None when the generation is in the workers, then the engine's outputs.

    hit: told where the generation was before.
    """
    # The engine may be at work for longer than whoever reads the outputs, or be done before.
    slot = lease.share()
    try:
        hit(await bring_in(slot))
        yield None
        request = lease.generation.request
        async with aclosing(call(*args, lora_request=request, **kwargs)) as outputs:
            async for output in outputs:
                if output.finished:
                    slot.leave()
                yield output
    finally:
        slot.leave()


async def run_base(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outputs:
    """As `run`, where the base answers: it needs no slot."""
    yield None
    async with aclosing(call(*args, **kwargs)) as outputs:
        async for output in outputs:
            yield output


class LeasedOutputs:
    """Outputs of one call, which holds a lease until they end, are closed or dropped.

    A route may drop them unread, when its next prompt turns out to be bad. A client may stop
    reading: the engine does not, so its outputs are then read ahead.
    """

    def __init__(self, lease: Lease, outputs: Outputs, deltas: bool) -> None:
        self._lease = lease
        self._outputs = outputs
        self._deltas = deltas
        self._ahead: ReadAhead | None = None
        self._begun = self._reading = False
        self._reads = 0
        self._loop = asyncio.get_running_loop()
        # Garbage is collected in any thread.
        self._dropped = weakref.finalize(self, self._loop.call_soon_threadsafe, lease.leave)
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
        self._check_later()

    def __aiter__(self) -> "LeasedOutputs":
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
            self._lease.leave()
            if self._ahead is not None:
                self._ahead.cancel()

    def _check_later(self) -> None:
        self._loop.call_later(PATIENCE_SECONDS, check, weakref.ref(self), self._reads)

    def check(self, reads: int) -> None:
        """Reads ahead if nobody has come for an output since there were `reads`."""
        if not self._dropped.alive:
            return
        if self._reading or self._reads != reads:
            self._check_later()
            return
        self._ahead = ReadAhead(self._outputs, self._deltas, self._lease.share().leave)
        stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._ahead.cancel)
        stop.atexit = False


def check(call: weakref.ref[LeasedOutputs], reads: int) -> None:
    """What the timer calls: it holds no reference of its own, so that outputs which a route dropped
    unread are collected, and their lease ends, before it fires."""
    counted = call()
    if counted is not None:
        counted.check(reads)
