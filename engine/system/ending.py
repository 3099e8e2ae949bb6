"""The end of a process that has done its work. Python puts it off for as long as a thread works."""

import atexit
import logging
import os
import sys
import threading
import time

logger = logging.getLogger("vllm.molehill")

PATIENCE_SECONDS = 10.0


def end_with_status(status: int, seconds: float = PATIENCE_SECONDS) -> None:
    """From here on the process ends with `status` after so many seconds at the latest, whatever its
    threads do, or twice as many where what is to be done at its end takes as long. Returns at once.

    A chat template may render without an end, or an adapter's source send without one: the next
    server would find their stores in use.
    """
    threading.Thread(target=_end, args=(status, seconds), daemon=True).start()


def _end(status: int, seconds: float) -> None:
    time.sleep(seconds)
    logger.warning("A thread still works %g s after the server's end; it is left", seconds)
    tidying = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    tidying.start()
    tidying.join(seconds)
    sys.stdout.flush()
    os._exit(status)
