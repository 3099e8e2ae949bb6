"""Answers clients while the engine starts: 503, and what the server is doing.

vLLM binds the socket before it builds the engine and listens when all is ready. A small server of
its own listens there until then, in a thread, for the engine's start blocks the event loop. Clients
that come between the two wait in the socket's queue.
"""

import asyncio
import os
import signal
import socket
import tempfile
from argparse import Namespace
from http import HTTPStatus
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import Any, NoReturn

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocketClose
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

from molehill.engine.system import startup

# Of clients that ask again by themselves, seconds.
RETRY_AFTER = 5
# For answers that are on their way when the real server takes over.
GRACE_SECONDS = 2
PROBES = ("/health", "/health/ready", "/ping")
BEFORE = "starting the engine"


class StartingApp:
    """An ASGI app that answers everything alike, whatever the key: it knows nothing to guard."""

    def __init__(self) -> None:
        self._start = monotonic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocketClose(code=1013)(scope, receive, send)
            return
        status, stage = HTTPStatus.SERVICE_UNAVAILABLE, startup.stage() or BEFORE
        message = f"The server is starting: {stage}."
        body = create_error_response(message, "starting", status).model_dump()
        if scope["path"] in PROBES:
            seconds = round(monotonic() - self._start)
            body = {"status": "starting", "stage": stage, "seconds": seconds}
        # The connection would outlive this server.
        headers = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
        await JSONResponse(body, status.value, headers)(scope, receive, send)


class StartingServer:
    """A StartingApp on a bound socket, over TLS where the server will be."""

    def __init__(self, sock: socket.socket, args: Namespace) -> None:
        config = uvicorn.Config(
            StartingApp(),
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            ssl_keyfile=args.ssl_keyfile,
            ssl_certfile=args.ssl_certfile,
            ssl_ca_certs=args.ssl_ca_certs,
            ssl_cert_reqs=args.ssl_cert_reqs,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        self._server = uvicorn.Server(config)
        # It closes what it was given, and the real server needs the socket.
        duplicate = sock.dup()
        self._thread = Thread(
            target=self._server.run, args=([duplicate],), name="molehill-starting", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Returns when what was asked is answered; the socket listens on."""
        self._server.should_exit = True
        self._thread.join()


_running: list[StartingServer] = []


def begin(sock: socket.socket, args: Namespace) -> None:
    """A StartingServer on the socket, until `hand_over` or the process's end."""
    _running.append(StartingServer(sock, args))


async def hand_over() -> None:
    """The real server listens next. Without a starting one, nothing happens."""
    while _running:
        await asyncio.to_thread(_running.pop().stop)


async def run_server(args: Namespace) -> None:
    """vLLM's `run_server`, with a StartingServer on its socket until `hand_over`."""
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.utils.system_utils import decorate_logs

    decorate_logs("APIServer", skip_if_decorated=True)
    # Until uvicorn has handlers of its own.
    signal.signal(signal.SIGTERM, _interrupt)
    address, sock = setup_server(args, reuse_port=False)
    with tempfile.TemporaryDirectory(prefix="molehill-") as folder:
        os.environ[startup.FILE] = str(Path(folder) / "stage")
        startup.follow()
        begin(sock, args)
        try:
            await run_server_worker(address, sock, args)
        finally:
            for server in _running:
                server.stop()


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt("terminated")
