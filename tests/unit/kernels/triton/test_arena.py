"""The arena against a plain model of its bytes."""

import pickle
import random
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.kernels.triton.arena import ALIGNMENT, Arena, ArenaFullError, Extent, Reservation

CPU = torch.device("cpu")
UNITS = 64


def arena(units: int = UNITS) -> Arena:
    return Arena(units * ALIGNMENT, CPU)


class Model:
    """Which owner holds each unit."""

    def __init__(self) -> None:
        self.units: list[int | None] = [None] * UNITS

    def take(self, owner: int, extents: tuple[Extent, ...]) -> None:
        for start, size in extents:
            assert start % ALIGNMENT == size % ALIGNMENT == 0
            for i in range(start // ALIGNMENT, (start + size) // ALIGNMENT):
                assert self.units[i] is None, "an extent overlaps another"
                self.units[i] = owner

    def give(self, owner: int) -> None:
        self.units = [None if unit == owner else unit for unit in self.units]

    def free_runs(self) -> list[int]:
        runs, length = [], 0
        for unit in [*self.units, 0]:
            if unit is None:
                length += 1
            elif length:
                runs.append(length)
                length = 0
        return runs


sizes = st.lists(st.integers(0, 12 * ALIGNMENT), min_size=1, max_size=6)
actions = st.lists(st.one_of(sizes, st.integers(0, 20)), max_size=60)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(actions)
def test_any_sequence_of_loads_and_unloads_agrees_with_the_model(actions) -> None:
    memory, model, loaded = arena(), Model(), {}
    for step, action in enumerate(actions, start=1):
        if isinstance(action, int):
            if loaded:
                owner = sorted(loaded)[action % len(loaded)]
                memory.release(loaded.pop(owner))
                model.give(owner)
        else:
            before = model.free_runs()
            reservation = None
            with suppress(ArenaFullError):
                reservation = memory.reserve(action)
            largest = max(before, default=0) * ALIGNMENT
            if reservation is None:
                # One extent is refused only if no run can hold it.
                assert len(action) > 1 or action[0] > largest
            else:
                assert max(action) <= largest or not any(action)
                assert all(e.size >= s for e, s in zip(reservation.extents, action, strict=True))
                reservation.commit()
                loaded[step] = reservation.extents
                model.take(step, reservation.extents)
        runs = model.free_runs()
        assert memory.free_bytes == sum(runs) * ALIGNMENT
        assert memory.largest_free == max(runs, default=0) * ALIGNMENT
    for extents in loaded.values():
        memory.release(extents)
    assert memory.free_bytes == memory.largest_free == UNITS * ALIGNMENT


@pytest.mark.slow
def test_ten_thousand_cycles_neither_leak_nor_fragment() -> None:
    """Adapters of three ranks come and go at up to 80 % of the memory; none is ever refused."""
    units = 4000
    memory, random_ = arena(units), random.Random(0)
    loaded: list[tuple[Extent, ...]] = []
    for _ in range(10_000):
        rank = random_.choice([1, 2, 8])
        wanted = [rank * width * ALIGNMENT for width in (1, 3, 1, 4) * 8]
        while memory.free_bytes - sum(wanted) < units * ALIGNMENT // 5:
            memory.release(loaded.pop(random_.randrange(len(loaded))))
        with memory.reserve(wanted) as reservation:
            loaded.append(reservation.extents)
    for extents in loaded:
        memory.release(extents)
    assert memory.free_bytes == memory.largest_free == units * ALIGNMENT


def test_an_adapter_that_does_not_fit_takes_nothing() -> None:
    memory = arena(10)
    with pytest.raises(ArenaFullError, match="at most 2560 of 2560") as caught:
        memory.reserve([4 * ALIGNMENT, 4 * ALIGNMENT, 4 * ALIGNMENT])
    assert (caught.value.needed, caught.value.free) == (12 * ALIGNMENT, 10 * ALIGNMENT)
    assert memory.free_bytes == memory.largest_free == 10 * ALIGNMENT


def test_fragmented_memory_is_refused_by_its_largest_run() -> None:
    memory = arena(10)
    first = memory.reserve([6 * ALIGNMENT])
    second = memory.reserve([3 * ALIGNMENT])
    memory.release(first.extents)
    assert memory.reserve([4 * ALIGNMENT]).extents == (Extent(0, 4 * ALIGNMENT),)
    with pytest.raises(ArenaFullError) as caught:
        memory.reserve([3 * ALIGNMENT])
    assert (caught.value.free, caught.value.largest) == (3 * ALIGNMENT, 2 * ALIGNMENT)
    memory.release(second.extents)
    assert memory.largest_free == 6 * ALIGNMENT


def test_a_reservation_is_freed_by_an_error_and_kept_by_success() -> None:
    memory = arena(4)

    def write(reservation: Reservation) -> None:
        with reservation:
            raise OSError("a file went away")

    with pytest.raises(OSError, match="a file went away"):
        write(memory.reserve([ALIGNMENT]))
    assert memory.free_bytes == 4 * ALIGNMENT
    with memory.reserve([ALIGNMENT]) as kept:
        pass
    kept.abort()
    assert memory.free_bytes == 3 * ALIGNMENT


def test_an_aborted_reservation_is_freed_once() -> None:
    memory = arena(4)
    reservation = memory.reserve([ALIGNMENT])
    reservation.abort()
    reservation.abort()
    assert memory.free_bytes == 4 * ALIGNMENT


def test_best_fit_leaves_the_large_run_whole() -> None:
    memory = arena(10)
    hole, _wall = memory.reserve([2 * ALIGNMENT]), memory.reserve([ALIGNMENT])
    memory.release(hole.extents)
    memory.reserve([2 * ALIGNMENT])
    assert memory.largest_free == 7 * ALIGNMENT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
def test_rows_are_written_where_the_extent_says(dtype) -> None:
    memory = arena()
    memory.reserve([3])
    (extent,) = memory.reserve([5 * 16 * dtype.itemsize]).extents
    values = torch.arange(80).view(5, 16).to(dtype)
    memory.rows(extent, dtype, (5, 16)).copy_(values)
    first = extent.start // dtype.itemsize
    flat = memory.view(dtype)
    assert torch.equal(flat[first : first + 80], values.flatten())
    assert flat[:first].count_nonzero() == flat[first + 80 :].count_nonzero() == 0
    assert flat.data_ptr() == memory.view(torch.uint8).data_ptr()


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 256"):
        Arena(255, CPU)


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(ArenaFullError(4, 3, 2, 9)))
    assert (error.needed, error.free, error.largest, error.budget) == (4, 3, 2, 9)
