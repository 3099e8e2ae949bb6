"""The thread beside the engine's steps computes on the cores that are its own."""

import asyncio
import threading

import pytest
import torch

from molehill.api.adapters.background import Background
from molehill.engine.system.cpu_affinity import affinity


def asked(background: Background) -> tuple[set[int], int]:
    """Where the thread runs, and with how many threads torch computes there."""

    def ask() -> tuple[set[int], int]:
        torch.ones(1 << 20).add(1)
        return affinity(), torch.get_num_threads()

    return asyncio.run(background.run(ask))


@pytest.mark.skipif(len(affinity()) < 2, reason="needs two cores, and a system that binds to them")
def test_its_thread_has_as_many_threads_as_cores_and_others_keep_theirs() -> None:
    cores, threads = affinity(), torch.get_num_threads()
    one = {min(cores)}
    background = Background(cores - one)
    assert asked(background) == (one, 1)
    assert torch.get_num_threads() == threads
    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert result == [threads]
    assert asked(background) == (one, 1)


def test_a_thread_with_all_cores_computes_on_all_that_torch_would() -> None:
    assert asked(Background()) == (affinity(), torch.get_num_threads())
