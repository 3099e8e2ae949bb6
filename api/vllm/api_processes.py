"""Several processes that answer clients on one socket (`--api-server-count`), as vLLM starts them.

The first one owns the registry and is what the one of other servers is. The others follow it
(`molehill.api.followers`). One that ends, whyever, ends the server: vLLM's own process, which
starts and watches them, asks for that.
"""

import os
import signal
import socket
import sys
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from prometheus_client import values

from molehill.api.adapters.errors import RequestError, encodable
from molehill.api.adapters.store_lock import LockedError
from molehill.api.vllm import starting
from molehill.api.vllm.options import ApiProcess
from molehill.engine.adapter.errors import AdapterError
from molehill.engine.system import startup
from molehill.engine.vllm import compilation

# Of a process that ends before the server does, so that the others are ended.
ENDED = 1
# Where a process writes what the user can put right, in the directory of the sockets.
REFUSAL = "refusal"
# Of metrics that one process counts alone, and may end.
PREFIX = "molehill_"


class RefusedStartError(ValueError):
    """What a process found that the user can put right."""


def run_processes(args: Namespace) -> None:
    """Serves until stopped. args: with molehill's Options. Raises RefusedStartError, and
    RuntimeError where a process ends for another reason."""
    from vllm.entrypoints.cli import serve

    with tempfile.TemporaryDirectory(prefix="molehill-") as folder:
        process = ApiProcess(0, Path(folder))
        os.environ[startup.FILE] = str(process.directory / "stage")
        args.molehill = replace(args.molehill, process=process)
        serve.APIServerProcessManager = partial(
            serve.APIServerProcessManager, target_server_fn=serve_process
        )
        try:
            serve.run_multi_api_server(args)
        except RuntimeError:
            refusal = process.directory / REFUSAL
            if refusal.exists():
                raise RefusedStartError(refusal.read_text()) from None
            raise


def serve_process(
    address: str, sock: socket.socket, args: Namespace, client_config: dict[str, Any]
) -> NoReturn:
    """What each of them does, in place of vLLM's `run_api_server_worker_proc` and by it."""
    from vllm.v1.utils import run_api_server_worker_proc

    options, index = args.molehill, client_config["client_index"]
    args.molehill = replace(options, process=replace(options.process, index=index))
    compilation.allow_compilation()
    keep_values_apart()
    signal.signal(signal.SIGTERM, interrupt)
    if index == 0:
        startup.follow()
        starting.begin(sock, args)
    try:
        run_api_server_worker_proc(address, sock, args, client_config)
    except (AdapterError, RequestError, LockedError) as error:
        # Of a start adapter, and of the store.
        (args.molehill.process.directory / REFUSAL).write_text(encodable(str(error)))
    except KeyboardInterrupt:
        pass
    sys.exit(ENDED)


def keep_values_apart() -> None:
    """vLLM's metrics add up over the processes: their values are in files, which prometheus_client
    reads together and of which no series can be taken away. molehill's are counted in one process,
    whose memory has their values, as where there is one process."""
    shared: Callable[..., Any] = values.MultiProcessValue()  # type: ignore[no-untyped-call]

    def value(kind: str, metric: str, *args: Any, **kwargs: Any) -> Any:
        made = values.MutexValue if metric.startswith(PREFIX) else shared
        return made(kind, metric, *args, **kwargs)

    values.ValueClass = value
    warnings.filterwarnings("ignore", "Removal of labels has not been implemented", UserWarning)


def interrupt(*_: Any) -> NoReturn:
    """Until uvicorn has handlers of its own."""
    raise KeyboardInterrupt("terminated")


def keeps_answers() -> bool:
    """Whether vLLM keeps answers of /v1/responses, each in the process that gave it."""
    from vllm import envs

    return bool(envs.VLLM_ENABLE_RESPONSES_API_STORE)
