"""Reads adapters in threads, so that what a worker does between two steps is short."""

import logging
import os
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from functools import partial
from time import monotonic, sleep
from typing import Any, Generic, TypeVar

from molehill.engine.system.cpu_affinity import affinity, avoid, compute_with
from molehill.engine.system.threads import started

logger = logging.getLogger("vllm.molehill")

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")

# Adapters that a worker prepares beside each other: what reads fast need not wait for what reads
# slowly, or for what waits for room. Each takes the memory of one serving copy more.
AT_ONCE = 2

# Without a step for so long, a worker has nothing to do.
IDLE_SECONDS = 0.2
PAUSE_SECONDS = 0.002


def leave_to_steps() -> None:
    """Moves the calling thread to cores of the engine that this worker does not compute on.

    It computes alone: others of its OpenMP threads would be bound, and it with them, to the cores
    that vLLM gave the worker's.
    """
    avoid(affinity(), affinity(os.getppid()))
    compute_with(1)


class StepPacer:
    """A worker's steps, for the thread beside them: both need the interpreter's lock, so the thread
    spreads its work over several steps and none of them waits for all of it."""

    def __init__(self) -> None:
        self._steps = 0
        self._last = -IDLE_SECONDS

    def step_begins(self) -> None:
        """A step begins."""
        self._steps += 1
        self._last = monotonic()

    def wait_for_step(self) -> None:
        """Until the next step begins; not at all while there are none."""
        steps = self._steps
        while steps == self._steps and monotonic() < self._last + IDLE_SECONDS:
            sleep(PAUSE_SECONDS)


class Prefetcher(Generic[Key, T]):
    """What was prepared and not discarded yet: the `most` that were begun last, each in a thread.

    prepare: of a key, and whether it runs in a thread, beside steps. What it raises, `result` does.
    """

    def __init__(self, prepare: Callable[[Key, bool], T], most: int = 1) -> None:
        self._prepare = prepare
        self._most = most
        self._threads = started(most, "molehill-prepare", leave_to_steps)
        # In the order in which they were begun.
        self._results: dict[Key, Future[T]] = {}

    def start(self, key: Key) -> None:
        """Returns at once. Discards what was begun first, where there would be too many."""
        if key in self._results and not failed(self._results[key]):
            return
        self.discard(key)
        while len(self._results) >= self._most:
            self.discard(next(iter(self._results)))
        self._results[key] = self._threads.submit(self._prepare, key, True)

    def done(self, key: Key) -> bool:
        """Whether no thread is at it: `result` has the answer, or prepares it there and then."""
        return key not in self._results or self._results[key].done()

    def result(self, key: Key) -> T:
        """What was prepared for `key`, or prepares it here and now. Raises what `prepare` does."""
        result = self._results.get(key)
        return self._prepare(key, False) if result is None else result.result()

    def discard(self, key: Key) -> None:
        """Lets go of it. What still runs goes on to its end, for nobody."""
        result = self._results.pop(key, None)
        if result is not None:
            result.add_done_callback(partial(log_failure, key))


def failed(result: Future[T]) -> bool:
    return result.done() and result.exception() is not None


def log_failure(key: Any, result: Future[Any]) -> None:
    """Of what nobody asks for any more: a fault of it would be seen nowhere else."""
    error = result.exception()
    if error is not None:
        logger.warning("molehill: %s was prepared for nobody and failed: %s", key, error)
