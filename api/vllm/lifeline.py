"""Questions to workers that may die before they answer."""

import asyncio
import logging
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from molehill.api.adapters.tasks import failure

logger = logging.getLogger("vllm.molehill")

# Between two looks at whether the engine is still there.
LOOK_SECONDS = 0.5


class Lifeline:
    """An engine client's `collective_rpc`, which ends when the engine does.

    What a dying engine has not begun, vLLM never answers. Whoever asked would wait for ever, and
    the server with them: it ends once it has answered all requests.
    """

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """One answer per worker. Raises with a worker's message, or that the engine is dead."""
        answer = asyncio.ensure_future(self._engine.collective_rpc(method, args=args))
        while not answer.done():
            try:
                await asyncio.wait({answer}, timeout=LOOK_SECONDS)
            except asyncio.CancelledError:
                # The question goes on: nobody else will look at its answer.
                answer.add_done_callback(log_failure)
                raise
            if not answer.done() and self._engine.errored:
                answer.cancel()
                raise self._engine.dead_error
        replies: list[Any] = answer.result()
        return replies


async def is_alive(engine_client: Any) -> bool:
    """Whether an engine can still answer."""
    try:
        await engine_client.check_health()
    except EngineDeadError:
        return False
    return True


def log_failure(answer: asyncio.Future[Any]) -> None:
    error = failure(answer)
    if error is not None:
        logger.error("The workers failed at a question that was given up", exc_info=error)
