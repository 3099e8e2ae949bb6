"""What a starting server is doing: a line in the log of the process that does it, and a stage in a
file for the process that answers HTTP meanwhile.

A record of the log that has a `stage` (`extra={"stage": "compiling ..."}`) names what has begun, in
words for clients: without a path of this machine.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from time import monotonic

# The environment reaches every process of the engine on this machine. Without it nobody reads.
FILE = "MOLEHILL_STARTUP_FILE"

# Between two lines about something that goes on.
PROGRESS_SECONDS = 10.0

logger = logging.getLogger("vllm.molehill")


class StageFile(logging.Handler):
    """Keeps the last stage that was logged."""

    def emit(self, record: logging.LogRecord) -> None:
        stage = getattr(record, "stage", None)
        if stage is not None:
            enter(stage)


def follow() -> None:
    """From here on the stages of this process's log are told. A second call changes nothing."""
    if os.environ.get(FILE) and not any(isinstance(h, StageFile) for h in logger.handlers):
        logger.addHandler(StageFile())


def enter(stage: str) -> None:
    """Tells a stage without a line of the log. Never fails: a start does not hang on it."""
    path = os.environ.get(FILE)
    if path:
        partial = Path(f"{path}.{os.getpid()}")
        with suppress(OSError):
            partial.write_text(stage)
            partial.replace(path)


def stage() -> str:
    """What was told last by any process; empty if nothing was."""
    with suppress(OSError):
        return Path(os.environ.get(FILE, "")).read_text()
    return ""


@contextmanager
def long_step(stage: str, line: str) -> Iterator[Callable[[], float]]:
    """Logs `line` at once and `stage` every few seconds until the body ends.

    The body gets what tells the seconds so far.
    """
    start, over = monotonic(), Event()

    def seconds() -> float:
        return monotonic() - start

    def log_progress() -> None:
        while not over.wait(PROGRESS_SECONDS):
            now = f"{stage}: {seconds():.0f} s so far"
            logger.info("molehill: %s", now, extra={"stage": now})

    logger.info("molehill: %s", line, extra={"stage": stage})
    thread = Thread(target=log_progress, name="molehill-startup", daemon=True)
    thread.start()
    try:
        yield seconds
    finally:
        over.set()
        thread.join()
