"""Reads adapters in a thread, so that what a worker does between two steps is short."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import monotonic, sleep
from typing import Generic, TypeVar

from molehill.engine.cores import compute_with, keep_off, own_cores

T = TypeVar("T")

# Without a step for so long, a worker has nothing to do.
IDLE_SECONDS = 0.2
PAUSE_SECONDS = 0.002


def leave_to_steps() -> None:
    """Moves the calling thread to cores of the engine that this worker does not compute on.

    It computes alone: others of its OpenMP threads would be bound, and it with them, to the cores
    that vLLM gave the worker's.
    """
    keep_off(own_cores(), own_cores(os.getppid()))
    compute_with(1)


class Pulse:
    """A worker's steps, for the thread beside them: both need the interpreter's lock, so the thread
    spreads its work over several steps and none of them waits for all of it."""

    def __init__(self) -> None:
        self._steps = 0
        self._last = -IDLE_SECONDS

    def beat(self) -> None:
        """A step begins."""
        self._steps += 1
        self._last = monotonic()

    def wait(self) -> None:
        """Until the next step begins; not at all while there are none."""
        steps = self._steps
        while steps == self._steps and monotonic() < self._last + IDLE_SECONDS:
            sleep(PAUSE_SECONDS)


class Preparation(Generic[T]):
    """What was prepared last, by path. Loads come one at a time, so there is never more to keep.

    prepare: of a path, and whether it runs in the thread, beside steps. What it raises, `take`
    raises.
    """

    def __init__(self, prepare: Callable[[str, bool], T]) -> None:
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, "molehill-prepare", leave_to_steps)
        self._path = ""
        self._result: Future[T] | None = None

    def start(self, path: str) -> None:
        """Returns at once. Drops what was prepared before, unless it is the same."""
        if path != self._path or self._failed():
            self._path = path
            self._result = self._thread.submit(self._prepare, path, True)

    def done(self, path: str) -> bool:
        """Whether `take` would answer at once."""
        return path != self._path or self._result is None or self._result.done()

    def take(self, path: str) -> T:
        """What was prepared for `path`, or prepares it here and now. Raises what `prepare` does."""
        if path == self._path and self._result is not None:
            return self._result.result()
        return self._prepare(path, False)

    def drop(self, path: str) -> None:
        if path == self._path:
            self._path, self._result = "", None

    def _failed(self) -> bool:
        result = self._result
        return result is None or (result.done() and result.exception() is not None)
