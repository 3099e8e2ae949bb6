"""Counts the requests that run on each generation, where all of vLLM's routes come together."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from molehill.api.registry import AdapterRegistry

Stream = AsyncGenerator[Any, None]


def count_requests(engine_client: Any, registry: AdapterRegistry) -> None:
    """Puts the count in front of this engine client's `generate` and `encode`."""
    engine_client.generate = counted(engine_client.generate, registry)
    engine_client.encode = counted(engine_client.encode, registry)


def counted(call: Callable[..., Stream], registry: AdapterRegistry) -> Callable[..., Stream]:
    """`call` with its `lora_request` (a keyword on all of vLLM's routes) admitted and counted."""

    def start(*args: Any, lora_request: Any = None, **kwargs: Any) -> Stream:
        if lora_request is None:
            return call(*args, **kwargs)
        # A refusal must come before a streaming response has begun.
        registry.admit(lora_request)
        return run(lora_request, args, kwargs)

    async def run(request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stream:
        # Again: the adapter may have gone between the call and the first output's request. From
        # here to `enter` nothing else runs.
        generation = registry.admit(request)
        registry.enter(generation)
        try:
            async with aclosing(call(*args, lora_request=generation.request, **kwargs)) as outputs:
                async for output in outputs:
                    yield output
        finally:
            registry.leave(generation)

    return start
