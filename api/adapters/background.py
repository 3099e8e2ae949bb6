"""Work of the API process beside the engine's steps: adapters are read, checked and written, and
metrics put into text."""

import asyncio
import sys
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

import torch

from molehill.engine.system.cpu_affinity import affinity, avoid, compute_with
from molehill.engine.system.threads import started

P = ParamSpec("P")
T = TypeVar("T")

SWITCH_SECONDS = 0.0005


class Background:
    """Threads, each of which does one thing at a time.

    taken: cores that workers compute on, which the threads leave alone. They compute on all others.
    """

    def __init__(
        self, taken: Collection[int] = (), name: str = "molehill-background", threads: int = 1
    ) -> None:
        def leave_to_workers() -> None:
            avoid(taken, affinity())
            if cores := affinity():
                compute_with(min(torch.get_num_threads(), len(cores)))

        # The event loop streams to clients meanwhile, and may wait so long for its turn.
        sys.setswitchinterval(SWITCH_SECONDS)

        self._threads = started(threads, name, leave_to_workers)

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `work` returns or raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: work(*args, **kwargs))
