"""Reads on where a client has stopped reading.

Outputs are then merged as vLLM itself merges them for a slow reader, so that what waits for the
client takes the memory of its text, not of an object per token.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any

from vllm.outputs import RequestOutput


class ReadAhead:
    """Reads `outputs` to their end, in a task of its own.

    deltas: whether each output holds only what is new, or replaces the one before it. ended: called
    when there is nothing more to read, or reading was stopped.
    """

    def __init__(
        self, outputs: AsyncGenerator[Any, None], deltas: bool, ended: Callable[[], None]
    ) -> None:
        self._deltas = deltas
        self._unread: list[Any] = []
        self._error: Exception | None = None
        self._news = asyncio.Event()
        self._ended = ended
        self._task = asyncio.create_task(self._read(outputs))
        # Also of a task that is cancelled before it begins.
        self._task.add_done_callback(self._end)

    async def next(self) -> Any:
        """Raises StopAsyncIteration after the last one, and what the engine raised."""
        while not self._unread:
            if self._task.done():
                error, self._error = self._error, None
                raise error or StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._unread.pop(0)

    def cancel(self) -> None:
        self._task.cancel()

    async def stop(self) -> None:
        self.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def _end(self, _: asyncio.Task[None]) -> None:
        self._news.set()
        self._ended()

    async def _read(self, outputs: AsyncGenerator[Any, None]) -> None:
        try:
            async for output in outputs:
                self._put(output)
        except Exception as error:
            self._error = error

    def _put(self, output: Any) -> None:
        last = self._unread[-1] if self._unread else None
        if isinstance(last, RequestOutput) and isinstance(output, RequestOutput):
            last.add(output, aggregate=self._deltas)
        else:
            self._unread.append(output)
        self._news.set()
