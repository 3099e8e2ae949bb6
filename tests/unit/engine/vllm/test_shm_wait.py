"""How a process waits for what another writes into vLLM's shared memory."""

import logging
import multiprocessing
import subprocess
import sys
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from support import warm

from molehill.engine.vllm import compat, shm_wait

STEPS, STEP_SECONDS = 8, 0.1
# A reader that spins looks tens of thousands of times a step, also where it gets a tenth of a core.
LOOKS = 1000


def read(handle: Any, answer: Connection) -> None:
    """An engine core, as far as it waits: sends how often it looked for STEPS messages."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue, SpinCondition
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    looks = 0
    wait = SpinCondition.wait

    def counted(self: Any, timeout_ms: int | None = None) -> None:
        nonlocal looks
        looks += 1
        wait(self, timeout_ms)

    SpinCondition.wait = counted
    queue = MessageQueue.create_from_handle(handle, 0)
    queue.wait_until_ready()
    read = [queue.dequeue() for _ in range(STEPS)]
    answer.send((read, looks))


@pytest.mark.slow
def test_who_waits_for_a_step_looks_now_and_then(tmp_path: Path) -> None:
    """In a process of its own, where vLLM loads the plugin as it does in its engine core."""
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    queue = MessageQueue(1, 1)
    here, there = multiprocessing.Pipe()
    reader = warm.run(partial(read, queue.export_handle(), there), tmp_path / "log")
    queue.wait_until_ready()
    for step in range(STEPS):
        time.sleep(STEP_SECONDS)
        queue.enqueue(step)
    assert here.poll(60)
    result, looks = here.recv()
    reader.wait()
    assert result == list(range(STEPS))
    assert STEPS < looks < STEPS * LOOKS


@pytest.mark.slow
def test_a_process_that_reads_no_shared_memory_does_not_import_it() -> None:
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins(); "
        "print('molehill.engine.vllm.shm_wait' in sys.modules, "
        "'vllm.distributed.device_communicators.shm_broadcast' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


@pytest.fixture
def spinning(monkeypatch: pytest.MonkeyPatch) -> type:
    """vLLM's class in a process that another one started; what is replaced comes back."""
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    monkeypatch.setattr(SpinCondition, "wait", SpinCondition.wait)
    return SpinCondition


def test_it_is_installed_once_and_is_no_changed_seam(spinning: Any) -> None:
    original_wait = spinning.wait
    shm_wait.install()
    installed = spinning.wait
    assert installed is not original_wait
    shm_wait.install()
    assert spinning.wait is installed
    compat.check_seams()


def test_a_gpu_keeps_vllms_own(spinning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform

    original_wait = spinning.wait
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    shm_wait.install()
    assert spinning.wait is original_wait


def test_a_vllm_that_waits_otherwise_is_left_alone_and_named(
    spinning: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Plain vLLM goes on; molehill's worker, which checks all seams at its start, does not."""

    def wait(self: Any, timeout_ms: int | None = None) -> None: ...

    monkeypatch.setattr(spinning, "wait", wait)
    with caplog.at_level(logging.WARNING, "vllm.molehill"):
        shm_wait.install()
    assert spinning.wait is wait
    assert "SpinCondition.wait has no self.last_read + self.busy_loop_s" in caplog.text
    with pytest.raises(RuntimeError, match=r"SpinCondition\.wait has no"):
        compat.check_seams()


def test_a_wait_that_is_gone_is_named(spinning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(spinning, "wait")
    with pytest.raises(RuntimeError, match=r"SpinCondition\.wait takes None"):
        compat.check_waiting()
