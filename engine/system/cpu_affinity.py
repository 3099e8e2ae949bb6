"""Keeps work beside the engine off the cores that CPU workers compute on.

vLLM binds a CPU worker to cores of its own. A thread of the worker inherits that, and the system
may put a thread of any other process there: either way a step takes up to twice as long.

A thread that was moved to fewer cores must compute with fewer threads too: OpenMP's wait for each
other by spinning, on one core for as long as the system lets them.
"""

import ctypes
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import torch

_LIBRARIES = re.compile(r"/\S*/lib(?:[gi]?omp\d*|torch_cpu)\b[^/\s]*\.so[.\d]*$", re.MULTILINE)


def affinity(process: int = 0) -> set[int]:
    """Where a process's main thread may run, by default the calling thread; empty if unknown."""
    if not hasattr(os, "sched_getaffinity"):
        return set()
    return set(os.sched_getaffinity(process))


def avoid(cores: Collection[int], allowed: Collection[int]) -> None:
    """Moves the calling thread to the allowed cores but for these, if any are left."""
    others = set(allowed) - set(cores)
    if others:
        with suppress(OSError):
            os.sched_setaffinity(0, others)


def compute_with(threads: int) -> None:
    """Has torch compute with so many threads where the calling thread does, and only there.

    `torch.set_num_threads` is for all threads to come as well, and takes from MKL, in the whole
    process, the choice of using fewer.
    """
    # A thread that has not computed yet gets torch's number when it first does, or is asked.
    torch.get_num_threads()
    for library in _libraries():
        for name in ("omp_set_num_threads", "MKL_Set_Num_Threads_Local"):
            if hasattr(library, name):
                getattr(library, name)(threads)


def _libraries() -> Iterator[ctypes.CDLL]:
    """OpenMP's and torch's, which may hold MKL, as they are in this process's memory."""
    with suppress(OSError):
        for path in set(_LIBRARIES.findall(Path("/proc/self/maps").read_text())):
            yield ctypes.CDLL(path)
