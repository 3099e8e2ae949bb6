"""Adapters in the engine's workers. Reading happens beside their steps, not between them."""

import asyncio
from typing import Any

from molehill.api.adapters.backoff import Backoff
from molehill.api.adapters.errors import EngineRefusedError, NoRoomError
from molehill.api.adapters.events import Tier
from molehill.api.adapters.workers import Uninstalled
from molehill.engine.vllm import protocol
from molehill.engine.vllm.prefetch import AT_ONCE
from molehill.engine.vllm.protocol import Engine, ReplyT, RequestT, Rpc

# Seconds between questions to the workers, which answer between two steps.
FIRST_PAUSE = 0.005
LAST_PAUSE = 0.1


class WorkerClient:
    """The Workers of all engines, which it asks between two of their steps."""

    at_once = AT_ONCE

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def start_prepare(self, request: Any) -> bool:
        """See Workers."""
        replies = await self._ask(protocol.PREPARE, adapter_request(request))
        return any(reply.reads for reply in replies)

    async def prepare(self, request: Any) -> Tier:
        """See Workers."""
        if not await self.start_prepare(request):
            return "host"
        backoff = Backoff(FIRST_PAUSE, LAST_PAUSE)
        while not await self._is_prepared(request):
            await asyncio.sleep(backoff.postpone())
        return "disk"

    async def discard(self, request: Any) -> None:
        """See Workers."""
        await self._ask(protocol.DISCARD, adapter_request(request))

    async def install(self, request: Any) -> None:
        """See Workers."""
        asked = protocol.InstallRequest(request.lora_name, request.lora_int_id, request.lora_path)
        replies = await self._ask(protocol.INSTALL, asked)
        refusals = [reply for reply in replies if reply.refusal]
        if not refusals:
            return
        final = [reply.refusal for reply in refusals if not reply.full]
        if final:
            raise EngineRefusedError(final[0])
        raise NoRoomError(refusals[0].refusal)

    async def uninstall(self, request: Any, keep: bool) -> Uninstalled:
        """See Workers."""
        asked = protocol.UninstallRequest(request.lora_int_id, request.lora_path, keep)
        replies = await self._ask(protocol.UNINSTALL, asked)
        evicted = {lora_int_id for reply in replies for lora_int_id in reply.evicted}
        return Uninstalled(all(reply.kept for reply in replies), evicted)

    async def _is_prepared(self, request: Any) -> bool:
        replies = await self._ask(protocol.PREPARED, adapter_request(request))
        return all(reply.done for reply in replies)

    async def _ask(self, rpc: Rpc[RequestT, ReplyT], request: RequestT) -> list[ReplyT]:
        try:
            return await rpc.ask(self._engine, request)
        except Exception as error:
            raise EngineRefusedError(str(error)) from error


def adapter_request(request: Any) -> protocol.AdapterRequest:
    """request: vLLM's LoRARequest."""
    return protocol.AdapterRequest(request.lora_int_id, request.lora_path)
