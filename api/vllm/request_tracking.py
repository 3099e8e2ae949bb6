"""Leases generations to requests, where all of vLLM's routes come together.

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
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.errors import NotInvokedError
from molehill.api.adapters.events import LifecycleMetrics, Tier
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.lease import Lease
from molehill.api.adapters.registry import AdapterRegistry
from molehill.api.vllm.invocation import Decode, check_invoked, decoder
from molehill.api.vllm.read_ahead import ReadAhead
from molehill.api.vllm.request_scope import RequestScope, bring_in, request_scope
from molehill.api.vllm.routed_calls import RoutedCall, RoutingMemory, check_base, check_plain
from molehill.api.vllm.stop_tokens import stop_as_adapter_does
from molehill.api.vllm.token_bounds import TokenBounds
from molehill.api.vllm.token_charges import charged, is_later_beam, prompt_tokens
from molehill.engine.adapter.added_tokens import AddedTokens
from molehill.engine.vllm.protocol import Engine

HEADER = "Molehill-Generation"

# A client that has not come back for the next output by then is not waited for.
PATIENCE_SECONDS = 1.0

Outputs = AsyncGenerator[Any, None]


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
    lease.release()
    return lease.generation


def wrap_engine_client(
    engine_client: Any,
    registry: AdapterRegistry,
    workers: Engine | None = None,
    routing: RoutingMemory | None = None,
    bounds: TokenBounds | None = None,
) -> None:
    """Puts `with_lease` in front of this engine client's `generate` and `encode`.

    workers: of all engines, which know what routers chose; the client's own are those of the first.
    routing: for what requests may ask of their routing; None where they may not ask. bounds: ids
    that they may name; None for all that vLLM lets them.
    """
    decode = decoder(engine_client)

    def route(request: RequestScope, generation: Generation, given: Mapping[str, Any]) -> Any:
        check_plain(given)
        if request.routing is None:
            return None
        memory = routing or RoutingMemory(0, "found a server that keeps none, expected one")
        return RoutedCall(workers or engine_client, memory, request.routing, generation, given)

    check = (bounds or TokenBounds()).check
    engine_client.generate = with_lease(engine_client.generate, registry, decode, route, check)
    engine_client.encode = with_lease(engine_client.encode, registry, decode, route, check)


# Of a call's arguments by name, and the tokens that its adapter adds. Raises what vLLM's routes
# understand.
CheckTokens = Callable[[Mapping[str, Any], AddedTokens | None], None]
# Raises what vLLM's routes understand; None where a request asks nothing of its routing.
Route = Callable[[RequestScope, Generation, Mapping[str, Any]], RoutedCall | None]


def with_lease(
    call: Callable[..., Any],
    registry: AdapterRegistry,
    decode: Decode,
    route: Route,
    check_tokens: CheckTokens,
) -> Callable[..., Any]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted, and leased
    until its outputs end."""
    names = list(inspect.signature(call).parameters)

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        request = request_scope.get() or RequestScope(ended=True)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if lora_request is None:
            check_base(request.routing)
            check_tokens(given, None)
            return call(*args, **kwargs)
        # A refusal must come before a streaming response has begun.
        lease = request.lease(registry, lora_request)
        name = lease.generation.name
        try:
            check_tokens(given, lease.generation.content.added)
            invoked = is_invoked(lease.generation, registry.events, given, decode)
            if invoked:
                stop_as_adapter_does(lease.generation.content.chat, given)
            routed = route(request, lease.generation, given) if invoked else None
        except Exception:
            lease.release()
            raise
        if not is_later_beam(given.get("request_id", ""), first=name not in request.asked):
            lease.charge(prompt_tokens(given.get("prompt")))
        request.asked.add(name)

        def hit(tier: Tier) -> None:
            registry.events.hit(name, request.tiers.pop(name, tier))

        if request.routing is not None:
            request.routed.append(routed or samples_of(given))
        deltas = gives_deltas(*args, **kwargs)

        def charging(*args: Any, **kwargs: Any) -> Outputs:
            return charged(call(*args, **kwargs), lease.charge, deltas)

        outputs = (
            run(lease, hit, charging, args, kwargs, routed)
            if invoked
            else run_base(charging, args, kwargs)
        )
        leased = LeasedOutputs(lease, outputs, deltas)
        request.unread.add(leased)
        return leased

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


def samples_of(arguments: Mapping[str, Any]) -> int:
    """Choices of an answer that such a call gives."""
    return getattr(arguments.get("sampling_params"), "n", 1)


def gives_deltas(_: Any = None, sampling_params: Any = None, *__: Any, **___: Any) -> bool:
    """Whether such a call's outputs hold only what is new in them."""
    kind = getattr(sampling_params, "output_kind", None)
    return kind is RequestOutputKind.DELTA


async def run(
    lease: Lease,
    hit: Callable[[Tier], None],
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    routed: RoutedCall | None = None,
) -> Outputs:
    """None when the generation is in the workers, then the engine's outputs.

    hit: told where the generation was before. routed: has the call's arguments, and follows its
    outputs, if its routing is asked for.
    """
    # The engine may be at work for longer than whoever reads the outputs, or be done before.
    slot = lease.share()
    try:
        hit(await bring_in(slot))
        yield None
        request = lease.generation.request
        called = (
            call(*args, lora_request=request, **kwargs)
            if routed is None
            else routed.follow(call(lora_request=request, **routed.arguments))
        )
        async with aclosing(called) as outputs:
            async for output in outputs:
                if output.finished:
                    slot.release()
                yield output
    finally:
        slot.release()


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
        self._dropped = weakref.finalize(self, self._loop.call_soon_threadsafe, lease.release)
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
            self._lease.release()
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
        self._ahead = ReadAhead(self._outputs, self._deltas, self._lease.share().release)
        stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._ahead.cancel)
        stop.atexit = False


def check(call: weakref.ref[LeasedOutputs], reads: int) -> None:
    """What the timer calls: it holds no reference of its own, so that outputs which a route dropped
    unread are collected, and their lease ends, before it fires."""
    leased = call()
    if leased is not None:
        leased.check(reads)
