"""Calls of the engine, in which all of vLLM's routes come together, each with a lease of its
adapter's generation.

A request is admitted to its generation when its route looks its model up, or else when it first
asks the engine for output: before a response begins. From then on, until the response has ended,
the generation is its own, whatever happens to the name and however often the route asks; the
response says which it is.

Its slot in the workers it has from when it needs it to the engine's last output, whether or not a
client reads that.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from molehill.api.adapters.errors import NotInvokedError, RoutingBusyError
from molehill.api.adapters.generation import Generation
from molehill.api.adapters.request_admission import (
    RequestAdmission,
    RequestEvents,
    RequestLease,
)
from molehill.api.vllm.adapter_tokenizers import check_written
from molehill.api.vllm.invocation import Decode, check_invoked, decoder
from molehill.api.vllm.leased_outputs import LeasedOutputs, Outputs
from molehill.api.vllm.request_engines import Placements
from molehill.api.vllm.request_scope import RequestScope, SlotWait, bring_in, request_scope
from molehill.api.vllm.routed_calls import (
    RoutedCall,
    RoutingAsked,
    RoutingMemory,
    check_base,
    check_plain,
    refused,
)
from molehill.api.vllm.routed_experts import RoutedExperts
from molehill.api.vllm.spans import Spans
from molehill.api.vllm.stop_tokens import stop_as_adapter_does
from molehill.api.vllm.token_bounds import TokenBounds
from molehill.api.vllm.token_charges import charged, is_later_beam, prompt_tokens
from molehill.engine.adapter.added_tokens import AddedTokens

# A call's arguments by name.
Arguments = Mapping[str, Any]

# Of a call's arguments, and the tokens that its adapter adds. Raises what vLLM's routes understand.
CheckTokens = Callable[[Arguments, AddedTokens | None], None]

# Takes the slot; what the engine is to be asked besides.
Enter = Callable[[RequestLease], Awaitable[Arguments]]

# Raises what vLLM's routes understand; None where a request asks nothing of its routing.
Route = Callable[[RequestScope, Generation, Arguments], RoutedCall | None]


def wrap_engine_client(
    engine_client: Any,
    registry: RequestAdmission,
    placements: Placements | None = None,
    routing: RoutingMemory | None = None,
    routed_experts: RoutedExperts | None = None,
    spans: Spans | None = None,
    bounds: TokenBounds | None = None,
) -> None:
    """Puts `with_lease` in front of this engine client's `generate` and `encode`.

    placements: in which engines requests run, whose workers know what routers chose.
    routing: for what requests may ask of their routing. Without the two they may not ask.
    routed_experts: of a server that gives mixtures' choices as vLLM gives a base's. spans: None
    where nothing is traced. bounds: ids that requests may name; None for all that vLLM lets them.
    """
    decode = decoder(engine_client)

    def route(request: RequestScope, generation: Generation, given: Arguments) -> Any:
        check_plain(given)
        choices = None
        if routed_experts is not None:
            choices = routed_experts.of_call(request, generation.content, given)
        if request.routing is None and choices is None:
            return None
        if placements is None or routing is None:
            raise refused("found a server that keeps none, expected one")
        asked = request.routing or RoutingAsked()
        return RoutedCall(placements.of, routing, asked, generation, given, choices)

    check = (bounds or TokenBounds()).check
    for name in ("generate", "encode"):
        call = getattr(engine_client, name)
        setattr(engine_client, name, with_lease(call, registry, decode, route, spans, check))


def with_lease(
    call: Callable[..., Any],
    registry: RequestAdmission,
    decode: Decode,
    route: Route,
    spans: Spans | None,
    check_tokens: CheckTokens,
) -> Callable[..., Any]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted, and leased
    until its outputs end."""
    names = list(inspect.signature(call).parameters)

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        request = request_scope.get() or RequestScope(ended=True)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        request.request_id = request.request_id or given.get("request_id", "")
        if lora_request is None:
            check_base(request.routing)
            check_tokens(given, None)
            return call(*args, **kwargs)
        # A refusal must come before a streaming response has begun.
        lease = request.lease(registry, lora_request)
        try:
            check_tokens(given, lease.generation.content.added)
            check_written(lease.generation.content.token_texts, given)
            invoked = is_invoked(lease.generation, registry.events, given, decode)
            if invoked:
                stop_as_adapter_does(lease.generation.content.chat, given)
            routed = route(request, lease.generation, given) if invoked else None
        except RoutingBusyError as error:
            lease.release()
            request.refused = error
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error
        except Exception:
            lease.release()
            raise
        later_beam = note_call(request, lease, given, routed)
        deltas = gives_deltas(*args, **kwargs)

        def charging(*args: Any, **kwargs: Any) -> Outputs:
            return charged(call(*args, **kwargs), lease.charge, deltas)

        if invoked:
            traced = None if later_beam else spans
            enter = entering(request, registry.events, given, traced)
            outputs = run(lease, enter, charging, args, kwargs, routed)
        else:
            outputs = run_base(charging, args, kwargs)
        leased = LeasedOutputs(lease, outputs, deltas)
        request.unread.add(leased)
        return leased

    return start


def note_call(
    request: RequestScope, lease: RequestLease, given: Arguments, routed: RoutedCall | None
) -> bool:
    """Charges the prompt, and keeps what the request's answer will be asked for.

    Whether it is a later beam of a search, which was charged."""
    name = lease.generation.name
    later_beam = is_later_beam(given, first=name not in request.asked)
    if not later_beam:
        lease.charge(prompt_tokens(given.get("prompt")))
    request.asked.add(name)
    if request.routing is not None or routed is not None:
        request.routed.append(routed or samples_of(given))
    return later_beam


def entering(
    request: RequestScope, events: RequestEvents, given: Arguments, spans: Spans | None
) -> Enter:
    """Counts the tier where the request found the adapter, before a stream had it brought in, and
    traces the wait."""

    async def wait(slot: RequestLease) -> SlotWait:
        name = slot.generation.name
        waited = await bring_in(slot)
        waited = request.waits.pop(name, waited)
        events.hit(name, waited.tier, waited.seconds)
        return waited

    async def enter(slot: RequestLease) -> Arguments:
        if spans is None:
            await wait(slot)
            return {}
        with spans.residency(slot.generation, given) as entered:
            return {"trace_headers": entered(await wait(slot))}

    return enter


def is_invoked(
    generation: Generation, events: RequestEvents, given: Arguments, decode: Decode
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


def samples_of(arguments: Arguments) -> int:
    """Choices of an answer that such a call gives."""
    return getattr(arguments.get("sampling_params"), "n", 1)


def gives_deltas(_: Any = None, sampling_params: Any = None, *__: Any, **___: Any) -> bool:
    """Whether such a call's outputs hold only what is new in them."""
    kind = getattr(sampling_params, "output_kind", None)
    return kind is RequestOutputKind.DELTA


async def run(
    lease: RequestLease,
    enter: Enter,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    routed: RoutedCall | None = None,
) -> Outputs:
    """None when the generation is in the workers, then the engine's outputs.

    routed: has the call's arguments, and follows its outputs, if its routing is asked for.
    """
    # The engine may be at work for longer than whoever reads the outputs, or be done before.
    slot = lease.share()
    try:
        more = await enter(slot)
        yield None
        request = lease.generation.request
        called = (
            call(*args, lora_request=request, **{**kwargs, **more})
            if routed is None
            else routed.follow(call(lora_request=request, **{**routed.arguments, **more}))
        )
        async with aclosing(called) as outputs:
            async for output in outputs:
                if output.finished:
                    slot.release()
                yield output
    finally:
        slot.abandon()


async def run_base(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outputs:
    """As `run`, where the base answers: it needs no slot."""
    yield None
    async with aclosing(call(*args, **kwargs)) as outputs:
        async for output in outputs:
            yield output
