"""A worker's slots on a real backend: ids, memory, what is refused, and two ranks that agree."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.slot_worker import BYTES, RANK, Worker

from molehill.engine.adapter.errors import LimitError
from molehill.engine.vllm.slot_table import BASE, FullError


def test_a_slot_is_taken_given_back_and_taken_again() -> None:
    worker = Worker()
    slots = worker.slots
    assert [slots.store(number, worker.adapter()) for number in (7, 8)] == [0, 1]
    assert slots.adapters() == {7, 8}
    assert slots.resident_bytes(0) == BYTES
    assert slots.free_bytes == 0
    slots.erase(7)
    assert 7 not in slots
    assert slots.slot(7) is None
    assert slots.free_bytes == BYTES
    assert slots.store(9, worker.adapter()) == 0


def test_full_memory_and_an_adapter_that_never_fits_are_told_apart() -> None:
    worker = Worker()
    with pytest.raises(LimitError, match=f"{3 * BYTES} bytes") as alone:
        worker.slots.store(7, worker.adapter(3 * RANK))
    assert not isinstance(alone.value, FullError)
    worker.slots.store(7, worker.adapter())
    with pytest.raises(FullError, match=f"at most {BYTES} of {2 * BYTES}"):
        worker.slots.store(8, worker.adapter(2 * RANK))
    with pytest.raises(LimitError) as beside:
        worker.slots.store(8, worker.adapter(3 * RANK))
    assert not isinstance(beside.value, FullError)
    assert worker.slots.adapters() == {7}
    assert worker.slots.free_bytes == worker.backend.resident_bytes(0) == BYTES


def test_the_bases_rows_have_a_slot_and_are_no_adapter() -> None:
    worker = Worker()
    worker.slots.store(BASE, worker.adapter())
    assert worker.slots.slot(BASE) == 0
    assert worker.slots.adapters() == set()
    # Nobody could leave to make room beside them.
    with pytest.raises(LimitError) as refused:
        worker.slots.store(7, worker.adapter(2 * RANK))
    assert not isinstance(refused.value, FullError)


def test_tokens_of_a_slot_without_weights_are_counted_until_it_is_erased() -> None:
    worker = Worker()
    slot = worker.slots.store(7, worker.nothing())
    assert worker.slots.is_idle(slot)
    worker.slots.count_idle_tokens(slot, 5)
    assert worker.slots.counters(slot).tokens == 5
    worker.slots.erase(7)
    assert not worker.slots.is_idle(slot)
    worker.slots.store(8, worker.nothing())
    assert worker.slots.counters(slot).tokens == 0


RANKS = """
import sys
import torch.distributed as dist
from support.slot_worker import RANK, Worker
from molehill.engine.vllm.rank_agreement import RankAgreement

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
worker = Worker(RankAgreement(2, dist.group.WORLD))
worker.slots.store(7, worker.adapter())
try:
    worker.slots.store(8, worker.adapter(2 * RANK if rank else RANK))
except Exception as error:
    print(type(error).__name__, sorted(worker.slots.adapters()), worker.backend.resident_bytes(1))
worker.slots.store(9, worker.adapter())
print(worker.slots.slot(9))
"""


@pytest.mark.slow
def test_where_one_rank_refuses_no_rank_keeps_anything(tmp_path: Path) -> None:
    """Two processes: the second has no memory for what the first has stored."""
    command = [sys.executable, "-c", RANKS]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "ranks")],
            cwd=Path(__file__).parents[2],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    answers = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert answers == [["OtherRankError [7] 0", "1"], ["FullError [7] 0", "1"]]
