"""A worker prepares an adapter beside its steps, and keeps no more than one."""

import ast
import os
import subprocess
import sys
import threading

import pytest

from molehill.engine.adapter.errors import CorruptFileError
from molehill.engine.system.cpu_affinity import affinity, avoid
from molehill.engine.vllm import prefetch
from molehill.engine.vllm.prefetch import IDLE_SECONDS, PAUSE_SECONDS, Prefetcher, StepPacer


class Reader:
    """Reads when it is let."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.proceed = threading.Event()
        self.broken = False

    def __call__(self, path: str, beside: bool) -> str:
        self.proceed.wait(10)
        self.read.append(path)
        if self.broken:
            raise CorruptFileError(path, "half a file", "a whole one")
        return f"content of {path}"


def test_starting_does_not_wait_and_taking_does() -> None:
    reader = Reader()
    prefetcher = Prefetcher(reader)
    prefetcher.start("a")
    assert not prefetcher.done("a")
    assert reader.read == []
    reader.proceed.set()
    assert prefetcher.result("a") == "content of a"
    assert prefetcher.done("a")
    assert reader.read == ["a"]


def test_what_was_prepared_is_read_once_however_often_it_is_taken() -> None:
    reader = Reader()
    reader.proceed.set()
    prefetcher = Prefetcher(reader)
    prefetcher.start("a")
    assert [prefetcher.result("a") for _ in range(3)] == ["content of a"] * 3
    prefetcher.start("a")
    assert reader.read == ["a"]
    prefetcher.discard("a")
    assert prefetcher.result("a") == "content of a"
    assert reader.read == ["a", "a"]


def test_what_nobody_prepared_is_read_when_it_is_taken() -> None:
    reader = Reader()
    reader.proceed.set()
    prefetcher = Prefetcher(reader)
    prefetcher.start("a")
    assert prefetcher.result("b") == "content of b"
    assert prefetcher.result("a") == "content of a"


def test_the_last_one_replaces_the_one_before() -> None:
    reader = Reader()
    reader.proceed.set()
    prefetcher = Prefetcher(reader)
    prefetcher.start("a")
    prefetcher.start("b")
    assert prefetcher.result("b") == "content of b"
    assert prefetcher.result("a") == "content of a"
    assert reader.read == ["a", "b", "a"]


def test_an_error_is_raised_where_it_is_taken_and_the_next_start_reads_again() -> None:
    reader = Reader()
    reader.proceed.set()
    reader.broken = True
    prefetcher = Prefetcher(reader)
    prefetcher.start("a")
    with pytest.raises(CorruptFileError, match="half a file"):
        prefetcher.result("a")
    assert prefetcher.done("a")
    reader.broken = False
    prefetcher.start("a")
    assert prefetcher.result("a") == "content of a"


def test_a_thread_waits_for_the_next_step_and_not_at_all_without_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock that only its own pauses move."""
    pacer = StepPacer()
    now, pauses, next_step = 100.0, 0, 5

    def sleep(seconds: float) -> None:
        nonlocal now, pauses
        now += seconds
        pauses += 1
        if pauses == next_step:
            pacer.step_begins()

    monkeypatch.setattr(prefetch, "monotonic", lambda: now)
    monkeypatch.setattr(prefetch, "sleep", sleep)
    pacer.wait_for_step()
    assert pauses == 0
    pacer.step_begins()
    pacer.wait_for_step()
    assert pauses == next_step
    # That step was the last: it does not wait for ever.
    start = now
    pacer.wait_for_step()
    assert now - start == pytest.approx(IDLE_SECONDS, abs=2 * PAUSE_SECONDS)


@pytest.mark.skipif(len(affinity()) < 2, reason="needs two cores, and a system that binds to them")
def test_a_thread_leaves_cores_and_its_process_stays() -> None:
    before = affinity()
    taken = {min(before)}
    result: list[set[int]] = []

    def leave(cores: set[int]) -> None:
        avoid(cores, before)
        result.append(affinity())

    for cores in (taken, before):
        thread = threading.Thread(target=leave, args=(cores,))
        thread.start()
        thread.join()
    # Where all cores are taken, it stays where it is.
    assert result == [before - taken, before]
    assert affinity() == before


BOUND = """
import torch
from molehill.engine.system.cpu_affinity import affinity
from molehill.engine.vllm.prefetch import Prefetcher

def prepare(path, beside):
    torch.ones(1 << 22).add(1)
    return affinity(), torch.get_num_threads()

prefetcher = Prefetcher(prepare)
prefetcher.start("a")
print([prefetcher.result("a"), prepare("b", False)])
"""


@pytest.mark.slow
@pytest.mark.skipif(len(affinity()) < 2, reason="needs two cores, and a system that binds to them")
def test_what_it_computes_stays_off_the_cores_that_openmp_is_bound_to() -> None:
    """vLLM binds a CPU worker by OpenMP's variables. What a thread computes with others binds them,
    and it, in the same way."""
    cores = affinity()
    one_core = {min(cores)}
    bound = {
        "OMP_NUM_THREADS": "2",
        "OMP_PLACES": str(one_core).replace(" ", ""),
        "OMP_PROC_BIND": "true",
    }
    command = [sys.executable, "-c", BOUND]
    done = subprocess.run(command, env=os.environ | bound, stdout=subprocess.PIPE, check=True)
    beside, between = ast.literal_eval(done.stdout.decode())
    assert between == (one_core, 2)
    assert beside == (cores - one_core, 1)
