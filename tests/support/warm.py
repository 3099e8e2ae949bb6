"""Starts vLLM's processes from one that has vLLM imported, in a third of the time.

On CPU vLLM spawns its engine and workers, and each imports vLLM anew. Here the engine is forked
from a server process that has imported it and done nothing else, and workers from their engine, as
vLLM does on GPUs. Servers of tests that end processes or count their memory start as they do for
users.
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import context, forkserver
from pathlib import Path
from typing import Any
from unittest.mock import patch

PRELOADED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    "molehill.engine.vllm.worker",
]
# For another process: the warm server's address, and the end of a pipe by which it sees that the
# process lives. The group that its processes join, so that they can be ended with it, and the file
# to which they write, as they would if they were its children.
ADDRESS = "MOLEHILL_TEST_FORKSERVER"
GROUP = "MOLEHILL_TEST_GROUP"
LOG = "MOLEHILL_TEST_LOG"


@contextmanager
def start() -> Iterator[None]:
    """Processes that are to be spawned are forked from the warm server, inside the block."""
    _ensure_running()
    with patch.object(multiprocessing, "get_context", _instead_of_spawning(_Warm())):
        yield


def lent(log: Path) -> tuple[dict[str, str], tuple[int, ...]]:
    """What a new process of this one's session needs to `borrow`: environment, and open files.

    log: appended to by whatever is forked for it."""
    _ensure_running()
    server: Any = forkserver._forkserver
    alive: int = server._forkserver_alive_fd
    address = os.fsdecode(server._forkserver_address)
    return {ADDRESS: f"{alive} {address}", LOG: str(log)}, (alive,)


def borrow() -> None:
    """From now on, what this process would spawn is forked from the warm server of its parent."""
    alive, _, address = os.environ.pop(ADDRESS).partition(" ")
    server: Any = forkserver._forkserver
    server._forkserver_alive_fd, server._forkserver_address = int(alive), address
    server.ensure_running = lambda: None
    os.environ[GROUP] = str(os.getpgrp())
    multiprocessing.get_context = _instead_of_spawning(_Warm())  # type: ignore[assignment]


def _ensure_running() -> None:
    multiprocessing.set_forkserver_preload(PRELOADED)
    # OpenMP is set up where it is imported. vLLM would give a worker one core of two. It also reads
    # the interval of a warning then, for which `molehill serve` has this value.
    read_early = {"OMP_NUM_THREADS": "1", "VLLM_RINGBUFFER_WARNING_INTERVAL": "600"}
    with patch.dict(os.environ, read_early):
        forkserver.ensure_running()


def _instead_of_spawning(other: context.BaseContext) -> Callable[..., context.BaseContext]:
    original = multiprocessing.get_context

    def get_context(method: str | None = None) -> context.BaseContext:
        return other if method == "spawn" else original(method)

    return get_context


class _Warm(context.ForkServerContext):
    @staticmethod
    def Process(  # type: ignore[override]
        *, target: Callable[..., Any], kwargs: dict[str, Any], **options: Any
    ) -> context.ForkServerProcess:
        arguments = {"environment": dict(os.environ), "target": target, "kwargs": kwargs}
        return context.ForkServerProcess(target=_run, kwargs=arguments, **options)


def _run(environment: dict[str, str], target: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    """In the new process: the environment is the starting process's, not the warm server's."""
    os.environ.clear()
    os.environ.update(environment)
    if GROUP in environment:
        os.setpgid(0, int(environment[GROUP]))
    if LOG in environment:
        with open(environment[LOG], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
    multiprocessing.get_context = _instead_of_spawning(  # type: ignore[assignment]
        context.ForkContext()
    )
    target(**kwargs)
