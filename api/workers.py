"""Adapters in the engine's workers. Reading happens beside their steps, not between them."""

import asyncio
from itertools import chain
from typing import Any, Protocol

from molehill.api.errors import EngineRefusedError
from molehill.api.events import Tier

# Seconds between questions to the workers, which answer between two steps.
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


class NoRoomError(EngineRefusedError):
    """The workers' memory for adapters is spent, for now."""


class Workers:
    """Puts adapters of the store into all workers and takes them out."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def prepare(self, path: str) -> Tier:
        """Has every worker read `path` in a thread, or find it in host memory; where it was.

        Raises EngineRefusedError.
        """
        if not any(await self._ask("molehill_prepare", path)):
            return "host"
        pause = FIRST_PAUSE
        while not all(await self._ask("molehill_prepared", path)):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LAST_PAUSE)
        return "disk"

    async def install(self, request: Any) -> None:
        """Copies what was prepared into a slot of every worker.

        Raises NoRoomError if it would fit beside fewer adapters, EngineRefusedError if it never
        will. Some of several workers may have taken it then; `remove` makes sure.
        """
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

    async def remove(self, request: Any, keep: bool) -> set[str]:
        """Frees the adapter's slots. keep: it may come back.

        Returns the paths of what had to leave host memory for it. Raises EngineRefusedError.
        """
        answers = await self._ask("molehill_remove", request.lora_int_id, request.lora_path, keep)
        return set(chain(*answers))

    async def _ask(self, method: str, *args: Any) -> list[Any]:
        try:
            return await self._engine.collective_rpc(method, args=args)
        except Exception as error:
            raise EngineRefusedError(str(error)) from error
