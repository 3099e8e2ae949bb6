"""Questions to workers that may die, or fall behind, before they answer."""

import asyncio
import logging
import math
from collections.abc import Collection
from time import monotonic
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from molehill.api.adapters.tasks import failure

logger = logging.getLogger("vllm.molehill")

# Between two looks at whether the engine is still there.
LOOK_SECONDS = 0.5


class StragglerError(RuntimeError):
    """Some engines have not answered what others answered long ago."""


class EngineWatch:
    """An engine client's `collective_rpc`, which asks the workers of all its engines (of one, or
    with data parallelism of several) and ends when they do.

    What a dying engine has not begun, vLLM never answers. Whoever asked would wait for ever, and
    the server with them: it ends once it has answered all requests. vLLM's own `collective_rpc`
    asks all engines too, but hands on the answers of the first alone.

    engines: how many there are. straggler_seconds: how long the others have once one has answered.
    One that is late still does what it was asked, and after it what it is asked later, in that
    order.
    """

    def __init__(
        self, engine_client: Any, engines: int = 1, straggler_seconds: float = math.inf
    ) -> None:
        self._engine = engine_client
        self._ranks = range(engines)
        self._straggler_seconds = straggler_seconds

    async def collective_rpc(
        self, method: str, *, args: tuple[Any, ...] = (), ranks: Collection[int] = ()
    ) -> list[Any]:
        """One answer per worker, engine after engine. ranks: of the engines to ask, if not all.

        Raises with a worker's message once all engines have answered, StragglerError, or that the
        engine is dead.
        """
        answers: dict[int, asyncio.Future[Any]] = {
            rank: asyncio.ensure_future(self._ask(rank, method, args))
            for rank in sorted(ranks) or self._ranks
        }
        await self._all_answered(answers, method)
        replies: list[Any] = []
        for answer in answers.values():
            replies += answer.result()
        return replies

    async def _ask(self, rank: int, method: str, args: tuple[Any, ...]) -> list[Any]:
        """One answer per worker of one engine."""
        if len(self._ranks) == 1:
            replies: list[Any] = await self._engine.collective_rpc(method, args=args)
        else:
            client = self._engine.engine_core
            # vLLM's arguments of an engine's `collective_rpc`: method, timeout, args, kwargs.
            replies = await client._call_utility_async(
                "collective_rpc", method, None, args, None, engine=client.core_engines[rank]
            )
        return replies

    async def _all_answered(self, answers: dict[int, asyncio.Future[Any]], method: str) -> None:
        waiting = set(answers.values())
        first_answer: float | None = None
        while waiting:
            try:
                answered, waiting = await asyncio.wait(
                    waiting, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            except asyncio.CancelledError:
                # The question goes on: nobody else will look at its answers.
                give_up(answers.values())
                raise
            if answered and first_answer is None:
                first_answer = monotonic()
            if waiting and self._engine.errored:
                for answer in waiting:
                    answer.cancel()
                # Or asyncio would warn of those that failed with it.
                give_up(answers.values())
                raise self._engine.dead_error
            late = first_answer is not None and monotonic() - first_answer > self._straggler_seconds
            if waiting and late:
                give_up(answers.values())
                stragglers = [rank for rank, answer in answers.items() if answer in waiting]
                raise StragglerError(
                    f"{method}: found no answer of engines {stragglers} in "
                    f"{self._straggler_seconds:g} s after another's, expected one of each"
                )
        # The first failure is raised.
        give_up([answer for answer in answers.values() if failure(answer) is not None][1:])


async def is_alive(engine_client: Any) -> bool:
    """Whether the engine, or every one of several, can still answer."""
    try:
        await engine_client.check_health()
    except EngineDeadError:
        return False
    return True


def give_up(answers: Collection[asyncio.Future[Any]]) -> None:
    for answer in answers:
        answer.add_done_callback(log_failure)


def log_failure(answer: asyncio.Future[Any]) -> None:
    error = failure(answer)
    if error is not None:
        logger.error("The workers failed at a question that was given up", exc_info=error)
