"""Adapters in the engine's workers. Reading happens beside their steps, not between them."""

import asyncio
from itertools import chain
from typing import Any, Protocol

from molehill.api.adapters.errors import EngineRefusedError, NoRoomError
from molehill.api.adapters.events import Tier
from molehill.engine.vllm.prefetch import AT_ONCE

# Seconds between questions to the workers, which answer between two steps. The same
# pauses take more lines with tenacity.
FIRST_PAUSE = 0.005
LAST_PAUSE = 0.1


# Why several engines are refused: vLLM asks all of them and hands on the answer of the first.
ONE_ENGINE = (
    "an adapter that another engine refused would be served as the base model; "
    "start a server for each replica"
)


class Engine(Protocol):
    """What is asked of vLLM's engine client."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer per worker; raises with a worker's message."""


class WorkerClient:
    """The Workers of an engine, which it asks between two of their steps."""

    at_once = AT_ONCE

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def begin(self, request: Any) -> bool:
        """See Workers."""
        return any(await self._ask("molehill_prepare", request.lora_int_id, request.lora_path))

    async def prepare(self, request: Any) -> Tier:
        """See Workers."""
        if not await self.begin(request):
            return "host"
        wanted = (request.lora_int_id, request.lora_path)
        pause = FIRST_PAUSE
        while not all(await self._ask("molehill_prepared", *wanted)):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        return "disk"

    async def discard(self, request: Any) -> None:
        """See Workers."""
        await self._ask("molehill_discard", request.lora_int_id, request.lora_path)

    async def install(self, request: Any) -> None:
        """See Workers."""
        # As plain values: vLLM's wire format does not carry its own classes inside arguments.
        plain = (request.lora_name, request.lora_int_id, request.lora_path)
        refusals = await self._ask("molehill_install", *plain)
        refusals = [answer for answer in refusals if answer["refusal"]]
        if not refusals:
            return
        hopeless = [answer["refusal"] for answer in refusals if not answer["full"]]
        if hopeless:
            raise EngineRefusedError(hopeless[0])
        raise NoRoomError(refusals[0]["refusal"])

    async def remove(self, request: Any, keep: bool) -> set[int]:
        """See Workers."""
        answers = await self._ask("molehill_remove", request.lora_int_id, request.lora_path, keep)
        return set(chain(*answers))

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        try:
            return await self._engine.collective_rpc(method, args=args)
        except Exception as error:
            raise EngineRefusedError(str(error)) from error
