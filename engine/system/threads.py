"""Threads beside an engine's steps."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


def started(threads: int, name: str, initializer: Callable[[], None]) -> ThreadPoolExecutor:
    """A pool whose threads all run already: when they are needed, there may be no memory for new
    ones. Raises RuntimeError where they cannot be started."""
    pool = ThreadPoolExecutor(threads, name, initializer)
    together = Barrier(threads)
    for waiting in [pool.submit(together.wait) for _ in range(threads)]:
        waiting.result()
    return pool
