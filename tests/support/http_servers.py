"""Runs an HTTP server of a test beside it."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager

# How often a server looks whether it is to end; half a second would be every test's.
POLL_SECONDS = 0.02


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    """It answers inside the block, and is closed at its end."""
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
