"""Work in tasks that nobody awaits, and whose end somebody has to see all the same."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from molehill.api.adapters.errors import RequestError
from molehill.api.adapters.events import LifecycleMetrics, TaskKind
from molehill.engine.adapter.errors import AdapterError

logger = logging.getLogger("vllm.molehill")

T = TypeVar("T")


class Tasks:
    """Keeps tasks while they run, which the event loop does not; one that fails is logged and
    counted, as `kind`. A refusal is logged: whoever refuses counts."""

    def __init__(self, kind: TaskKind, events: LifecycleMetrics) -> None:
        self._kind: TaskKind = kind
        self._events = events
        self._running: set[asyncio.Task[Any]] = set()

    def start(
        self, work: Coroutine[Any, Any, T], failed: Callable[[], None] = lambda: None
    ) -> asyncio.Task[T]:
        """failed: called if `work` raises, once that is logged."""
        task = self._keep(work)
        task.add_done_callback(lambda task: self._log(task, failed))
        return task

    async def shield(
        self, work: Coroutine[Any, Any, T], unclaimed: Callable[[T], None] = lambda _: None
    ) -> T:
        """Awaits `work`, which goes on to its end if the caller is cancelled (client gone).

        unclaimed: called with what comes of it then.
        """
        task = self._keep(work)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            # Who would have been told is gone.
            task.add_done_callback(self._log)
            task.add_done_callback(lambda task: hand_over(task, unclaimed))
            raise

    def _keep(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _log(self, task: asyncio.Task[Any], failed: Callable[[], None] = lambda: None) -> None:
        error = failure(task)
        if isinstance(error, RequestError | AdapterError):
            logger.warning("A task of the %s was refused: %s", self._kind, error)
        elif error is not None:
            logger.error("A task of the %s failed", self._kind, exc_info=error)
            self._events.task_failed(self._kind)
            failed()


def hand_over(ended: "asyncio.Future[T]", take: Callable[[T], None]) -> None:
    """To `take`, what came of it; nothing of what was cancelled or failed."""
    if not ended.cancelled() and ended.exception() is None:
        take(ended.result())


def failure(ended: "asyncio.Future[Any]") -> BaseException | None:
    """What ended it; None if it was cancelled, which somebody asked for."""
    return None if ended.cancelled() else ended.exception()
