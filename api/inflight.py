"""Counts the requests that run on each generation, where all of vLLM's routes come together.

A request is admitted to its generation when a route asks the engine for output, before a response
begins. From then on the generation is its own, whatever happens to the name; the response says
which it is.
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from molehill.api.errors import EngineRefusedError
from molehill.api.generation import Generation
from molehill.api.registry import AdapterRegistry

HEADER = "Molehill-Generation"

Outputs = AsyncGenerator[Any, None]


@dataclass
class Answering:
    """The HTTP request that is being answered, and what it was admitted to."""

    generation: Generation | None = None


answering: ContextVar[Answering | None] = ContextVar("answering", default=None)


class GenerationHeader:
    """Names the generation in the header of every answer that an adapter gave (pure ASGI)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Answering()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start" and request.generation is not None:
                MutableHeaders(scope=message)[HEADER] = request.generation.digest
            await send(message)

        token = answering.set(request)
        try:
            await self._app(scope, receive, named)
        finally:
            answering.reset(token)


def count_requests(engine_client: Any, registry: AdapterRegistry) -> None:
    """Puts the count in front of this engine client's `generate` and `encode`."""
    engine_client.generate = counted(engine_client.generate, registry)
    engine_client.encode = counted(engine_client.encode, registry)


def counted(call: Callable[..., Any], registry: AdapterRegistry) -> Callable[..., Any]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted and counted."""

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Any:
        if lora_request is None:
            return call(*args, **kwargs)
        # A refusal must come before a streaming response has begun.
        generation = admit(registry, lora_request)
        return Counted(registry, generation, run(registry, generation, call, args, kwargs))

    return start


def admit(registry: AdapterRegistry, lora_request: Any) -> Generation:
    """Several prompts of one HTTP request run on one generation."""
    request = answering.get()
    first = None if request is None else request.generation
    if first is not None and first.name == lora_request.lora_name and first.in_flight:
        return first
    generation = registry.admit(lora_request)
    if request is not None:
        request.generation = generation
    return generation


async def run(
    registry: AdapterRegistry,
    generation: Generation,
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Outputs:
    """The engine's outputs, from when the generation is in the workers."""
    try:
        registry.events.hit(await registry.residency.acquire(generation))
    except EngineRefusedError as error:
        # As vLLM's routes understand it.
        message = str(error).replace(generation.request.lora_path, generation.name)
        raise GracefulHTTPError(message, error.status) from error
    try:
        async with aclosing(call(*args, lora_request=generation.request, **kwargs)) as outputs:
            async for output in outputs:
                yield output
    finally:
        registry.residency.release(generation)


class Counted:
    """Outputs whose generation has one more request in flight, until they end or are closed.

    A route may drop them unread, when its next prompt turns out to be bad: that ends them too.
    """

    def __init__(self, registry: AdapterRegistry, generation: Generation, outputs: Outputs) -> None:
        registry.enter(generation)
        self._outputs = outputs
        self._registry = registry
        self._generation = generation
        loop = asyncio.get_running_loop()
        # Garbage is collected in any thread.
        self._dropped = weakref.finalize(
            self, loop.call_soon_threadsafe, registry.leave, generation
        )
        self._dropped.atexit = False

    def __aiter__(self) -> "Counted":
        return self

    async def __anext__(self) -> Any:
        try:
            return await anext(self._outputs)
        except BaseException:
            self._finish()
            raise

    async def aclose(self) -> None:
        try:
            await self._outputs.aclose()
        finally:
            self._finish()

    def _finish(self) -> None:
        if self._dropped.detach() is not None:
            self._registry.leave(self._generation)
