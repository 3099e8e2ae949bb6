"""What a server that starts says of itself, asked again and again."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx


@dataclass
class Readiness:
    """Of `/health/ready` until it says 200. stages: as they were told, one after another.
    refused: connections that were refused after the first answer."""

    stages: list[str] = field(default_factory=list)
    refused: int = 0
    is_ready: bool = False


@contextmanager
def watching(port: int) -> Iterator[Readiness]:
    """Asks from another thread while the block starts the server."""
    found, over = Readiness(), threading.Event()

    def ask() -> None:
        while not over.is_set() and not found.is_ready:
            try:
                answer = httpx.get(f"http://127.0.0.1:{port}/health/ready", timeout=30)
            except httpx.ConnectError:
                found.refused += bool(found.stages)
                time.sleep(0.1)
                continue
            found.is_ready = answer.status_code == 200
            if not found.is_ready and answer.content:
                stage = answer.json()["stage"]
                if stage not in found.stages[-1:]:
                    found.stages.append(stage)
            time.sleep(0.05)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield found
        thread.join(60)
    finally:
        over.set()
        thread.join()
