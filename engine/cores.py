"""Keeps work beside the engine off the cores that CPU workers compute on.

vLLM binds a CPU worker to cores of its own. A thread of the worker inherits that, and the system
may put a thread of any other process there: either way a step takes up to twice as long.
"""

import os
from collections.abc import Collection
from contextlib import suppress


def own_cores(process: int = 0) -> set[int]:
    """Where a process's main thread may run, by default the calling thread; empty if unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    return set(os.sched_getaffinity(process))


def keep_off(cores: Collection[int], allowed: Collection[int]) -> None:
    """Moves the calling thread to the allowed cores but for these, if any are left."""
    others = set(allowed) - set(cores)
    if others:
        with suppress(OSError):
            os.sched_setaffinity(0, others)
