"""Starts vLLM's processes from one that has vLLM imported, in a third of the time.

On CPU vLLM spawns its engine and workers, and each imports vLLM anew. Here servers and engines are
forked from a server process that has imported it and done nothing else, and workers from their
engine, as vLLM does on GPUs. Servers of tests that end processes or count their memory start as
they do for users.
"""

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import connection, context, forkserver, process
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import patch

from filelock import FileLock

PRELOADED = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.mixtral",
    # What these import in their functions.
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.fused_moe.experts.cpu_moe",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.engine.async_llm",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.generative_scoring.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.cohere.api_router",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.scale_out.derender.api_router",
    "vllm.entrypoints.scale_out.render.api_router",
    "vllm.entrypoints.scale_out.token_in_token_out.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.collect_env",
    "molehill.engine.vllm.worker",
    "vllm.entrypoints.cli.serve",
    "molehill.api.app",
    "molehill.api.vllm.launcher",
    "molehill.api.vllm.starting",
    "molehill.api.vllm.api_processes",
    "support.kernel_overrides",
]
# For the processes of a server: the group that they join, so that they can be ended with it, and
# the file to which they write, as they would if they were its children.
GROUP = "MOLEHILL_TEST_GROUP"
LOG = "MOLEHILL_TEST_LOG"
# A folder of all processes that run these tests, where there are several.
shared: Path | None = None


@contextmanager
def start() -> Iterator[None]:
    """Processes that are to be spawned are forked from the warm server, inside the block."""
    _ensure_running()
    with patch.object(multiprocessing, "get_context", _instead_of_spawning(_Warm())):
        yield


class Forked:
    """Of a process of the warm server's, what tests use of `subprocess.Popen`."""

    def __init__(self, forked: context.ForkServerProcess) -> None:
        self._forked = forked
        assert forked.pid is not None
        self.pid = forked.pid

    @property
    def returncode(self) -> int | None:
        return self._forked.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        self._forked.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._forked.name, timeout or 0)

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def molehill(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Forked:
    """Runs the command, in a process group of its own.

    log: appended to by it and by what is forked for it."""
    _ensure_running()
    server: Any = forkserver._forkserver
    return _forked(
        _command, list(arguments), {**environment, LOG: str(log)}, server._forkserver_address
    )


def run(function: Callable[[], object], log: Path) -> Forked:
    """Runs a function of a module in a process that has imported vLLM and no plugin of it.

    log: appended to by it."""
    _ensure_running()
    return _forked(_call, function, {**os.environ, LOG: str(log)})


def _forked(target: Callable[..., object], *arguments: object) -> Forked:
    forked = context.ForkServerProcess(target=target, args=arguments)
    forked.start()
    return Forked(forked)


def _call(function: Callable[[], object], environment: dict[str, str]) -> None:
    _take(environment)
    function()


def _command(arguments: list[str], environment: dict[str, str], address: str) -> None:
    """In the new process, which is nobody's child for multiprocessing, as a command is. What it
    would spawn is forked from the warm server."""
    _take(environment)
    os.setpgid(0, 0)
    os.environ[GROUP] = str(os.getpgrp())
    tests: Any = process.parent_process()
    Thread(target=_end_with, args=(tests.sentinel,), daemon=True).start()
    process._parent_process = None  # type: ignore[attr-defined]
    server: Any = forkserver._forkserver
    server._forkserver_address, server.ensure_running = address, lambda: None
    multiprocessing.get_context = _instead_of_spawning(_Warm())  # type: ignore[assignment]
    from molehill.api.cli.main import main

    sys.exit(main(arguments))


def _ensure_running() -> None:
    """One warm server for all of pytest-xdist's processes: it takes a quarter of a minute."""
    server: Any = forkserver._forkserver
    if shared is None or server._forkserver_address is not None:
        _ensure_own_running()
        return
    announced = shared / "warm.json"
    with FileLock(f"{announced}.lock"):
        if not (announced.exists() and _join(server, announced)):
            _ensure_own_running()
            place = (server._forkserver_address, os.getpid(), server._forkserver_alive_fd)
            announced.write_text(json.dumps(place))


def _join(server: Any, announced: Path) -> bool:
    """Whether the process that started the warm server is there. The server lives as long as
    somebody holds the pipe that it was given, and so as long as this process does, too."""
    address, starter, pipe = json.loads(announced.read_text())
    try:
        server._forkserver_alive_fd = os.open(f"/proc/{starter}/fd/{pipe}", os.O_WRONLY)
    except OSError:
        return False
    server._forkserver_address, server.ensure_running = address, lambda: None
    return True


def _ensure_own_running() -> None:
    server: Any = forkserver._forkserver
    if server._forkserver_address is not None and server._forkserver_pid is None:
        return  # Another's.
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
        *,
        target: Callable[..., Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> context.ForkServerProcess:
        arguments = {
            "environment": dict(os.environ),
            "target": target,
            "args": args,
            "kwargs": kwargs or {},
        }
        return context.ForkServerProcess(target=_run, kwargs=arguments, **options)


def _end_with(sentinel: int) -> None:
    """Tests that are killed leave no servers behind."""
    connection.wait([sentinel])
    os.killpg(os.getpgrp(), signal.SIGKILL)


def _run(
    environment: dict[str, str],
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """In the new process."""
    _take(environment)
    if GROUP in environment:
        os.setpgid(0, int(environment[GROUP]))
    multiprocessing.get_context = _instead_of_spawning(  # type: ignore[assignment]
        context.ForkContext()
    )
    target(*args, **kwargs)


def _take(environment: dict[str, str]) -> None:
    """The environment is the starting process's, not the warm server's. What is imported is left
    out of garbage collections, which would write into, and so copy, every page of it; vLLM takes
    that back as its processes end, for one more collection."""
    gc.freeze()
    gc.unfreeze = lambda: None  # type: ignore[assignment]
    os.environ.clear()
    os.environ.update(environment)
    if LOG in environment:
        with open(environment[LOG], "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
