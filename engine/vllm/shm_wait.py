"""How vLLM's processes wait for each other on CPU, where the waiting core is the others' too.

vLLM's readers of shared memory spin on `os.sched_yield()`. Each call drops the interpreter's lock
for less than a microsecond, which wakes a thread that waits for the lock and takes it back before
that thread runs; and as no wait times out, the thread never asks for the lock either. The engine
core's thread that sends answers then starves for seconds while the steps go on, and so does a
worker's thread beside its steps for a second after them. A sleep leaves the lock, and the core, to
whoever wants it.
"""

import functools
import logging
import multiprocessing
import time
from typing import Any

from molehill.engine.vllm import compat

# Seconds. Shorter than the system sleeps at all; of a longer wait it is a part, so that neither the
# wake-ups nor what is waited too long matter beside it.
SHORTEST, LONGEST, PART = 50e-6, 0.5e-3, 1 / 64

# Below vLLM's logger, whose handlers are the only ones that a server has.
logger = logging.getLogger("vllm.molehill")


def install() -> None:
    """vLLM's general plugin: engine core and workers on CPU sleep where vLLM spins.

    Only they read shared memory, so other processes do not import it. Without effect a second time,
    on GPUs, and with a warning where vLLM waits otherwise than expected, for vLLM may run without
    molehill here: molehill's worker is what refuses that.
    """
    if multiprocessing.parent_process() is None:
        return
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    try:
        compat.check_waiting()
    except (ImportError, RuntimeError) as error:
        logger.warning("vLLM waits as it does without molehill: %s", error)
        return
    sleep_while_waiting()


def sleep_while_waiting() -> None:
    """Replaces `SpinCondition.wait` in this process."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    original = SpinCondition.wait
    if hasattr(original, "sleeps"):
        return

    @functools.wraps(original)
    def wait(self: Any, timeout_ms: int | None = None) -> None:
        waited = time.monotonic() - self.last_read
        if waited > self.busy_loop_s:
            original(self, timeout_ms)
        else:
            time.sleep(min(max(SHORTEST, waited * PART), LONGEST))

    wait.sleeps = True  # type: ignore[attr-defined]
    SpinCondition.wait = wait
