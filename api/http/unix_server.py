"""An app on a Unix socket, beside the server that has the process's signals."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

# Connections that are not used are closed by who opened them, so that none is closed as it is used.
IDLE_SECONDS = 3600
START_SECONDS = 0.01


class UnixServer(uvicorn.Server):
    """path: in a directory that is nobody else's. The app has been started by another server."""

    def __init__(self, app: ASGIApp, path: Path) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                uds=str(path),
                lifespan="off",
                log_config=None,
                access_log=False,
                timeout_keep_alive=IDLE_SECONDS,
                h11_max_incomplete_event_size=4 << 20,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def start(self) -> "asyncio.Task[None]":
        """Returns what serves, once it listens. Raises OSError where it cannot."""
        serving = asyncio.create_task(self.serve())
        while not (self.started or serving.done()):
            await asyncio.sleep(START_SECONDS)
        if serving.done():
            raise OSError(f"the API process could not listen at {self.config.uds}")
        return serving
