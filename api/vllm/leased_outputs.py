"""The outputs of one call of the engine, with the lease that it holds."""

import asyncio
import weakref
from collections.abc import AsyncGenerator
from typing import Any

from molehill.api.adapters.request_admission import RequestLease
from molehill.api.vllm.read_ahead import ReadAhead

# A client that has not come back for the next output by then is not waited for.
PATIENCE_SECONDS = 1.0

Outputs = AsyncGenerator[Any, None]


class LeasedOutputs:
    """Outputs of one call, which holds a lease until they end, are closed or dropped.

    A route may drop them unread, when its next prompt turns out to be bad. A client may stop
    reading: the engine does not, so its outputs are then read ahead.
    """

    def __init__(self, lease: RequestLease, outputs: Outputs, deltas: bool) -> None:
        self._lease = lease
        self._outputs = outputs
        self._deltas = deltas
        self._ahead: ReadAhead | None = None
        self._begun = self._reading = False
        self._reads = 0
        self._loop = asyncio.get_running_loop()
        # Garbage is collected in any thread.
        self._dropped = weakref.finalize(self, self._loop.call_soon_threadsafe, lease.release)
        self._dropped.atexit = False

    async def begin(self) -> None:
        """Returns once the generation is in the workers. Raises GracefulHTTPError."""
        if self._begun:
            return
        self._begun = True
        try:
            await anext(self._outputs)
        except BaseException:
            self._finish()
            raise
        self._check_later()

    def __aiter__(self) -> "LeasedOutputs":
        return self

    async def __anext__(self) -> Any:
        if not self._begun:
            await self.begin()
        self._reading = True
        try:
            return await (self._ahead.next() if self._ahead else anext(self._outputs))
        except BaseException:
            self._finish()
            raise
        finally:
            self._reading = False
            self._reads += 1

    async def aclose(self) -> None:
        try:
            if self._ahead is not None:
                await self._ahead.stop()
            await self._outputs.aclose()
        finally:
            self._finish()

    def _finish(self) -> None:
        if self._dropped.detach() is not None:
            self._lease.release()
            if self._ahead is not None:
                self._ahead.cancel()

    def _check_later(self) -> None:
        self._loop.call_later(PATIENCE_SECONDS, check, weakref.ref(self), self._reads)

    def check(self, reads: int) -> None:
        """Reads ahead if nobody has come for an output since there were `reads`."""
        if not self._dropped.alive:
            return
        if self._reading or self._reads != reads:
            self._check_later()
            return
        self._ahead = ReadAhead(self._outputs, self._deltas, self._lease.share().release)
        stop = weakref.finalize(self, self._loop.call_soon_threadsafe, self._ahead.cancel)
        stop.atexit = False


def check(call: weakref.ref[LeasedOutputs], reads: int) -> None:
    """What the timer calls: it holds no reference of its own, so that outputs which a route dropped
    unread are collected, and their lease ends, before it fires."""
    leased = call()
    if leased is not None:
        leased.check(reads)
