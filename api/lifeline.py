"""Questions to workers that may die before they answer."""

import asyncio
from typing import Any

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
            await asyncio.wait({answer}, timeout=LOOK_SECONDS)
            if not answer.done() and self._engine.errored:
                answer.cancel()
                raise self._engine.dead_error
        found: list[Any] = answer.result()
        return found
