"""The tiles of a step against its runs."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.kernels.interface import UNSERVED, Run
from molehill.kernels.triton import tiling
from molehill.kernels.triton.layout import NO_TILE as EMPTY

NO_TILE = EMPTY.value


@st.composite
def steps(draw) -> tuple[list[Run], int]:
    runs, row = [], 0
    for _ in range(draw(st.integers(0, 8))):
        row += draw(st.integers(0, 40))
        stop = row + draw(st.integers(1, 90))
        runs.append(Run(draw(st.sampled_from([0, 1, 2, 5, UNSERVED])), row, stop))
        row = stop
    return runs, row


def tiles(table: list[int], begin: int, end: int) -> list[list[int]]:
    """The tiles that there are between two places; those after them are empty."""
    result = [table[i : i + 4] for i in range(begin, end, 4)]
    used = [tile for tile in result if tile[0] != NO_TILE]
    assert all(tile[0] == NO_TILE for tile in result[len(used) :])
    return used


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(steps())
def test_tiles_cover_every_row_once_and_fit_the_grid(step) -> None:
    runs, tokens = step
    adapters, stored = 3, {0, 1, 2}
    layout = tiling.StepLayout(max(tokens, 1), adapters + 1)
    table = tiling.step_table(runs, stored, adapters, max(tokens, 1)).tolist()
    assert len(table) <= layout.size
    wanted = {
        row: run.slot if run.slot in stored else UNSERVED
        for run in runs
        for row in range(run.start, run.stop)
    }
    few = sum(n for s, n in Counter(wanted.values()).items() if n <= 2 and s != UNSERVED)
    long = any(run.stop > tiling.DECODE_TOKENS for run in runs)
    assert table[0] == (few >= tiling.ROUTE_FIRST_ROWS and not long)
    for begin, end, size in (
        (layout.small, layout.large, tiling.SMALL_TILE),
        (layout.large, layout.order, tiling.LARGE_TILE),
    ):
        slot_tiles = tiles(table, begin, end)
        assert len(slot_tiles) <= tiling.max_tiles(max(tokens, 1), adapters + 1, size)
        result = {}
        for slot, place, rows, first in slot_tiles:
            assert 0 < rows <= size
            part = table[layout.order + place : layout.order + place + rows]
            assert part[0] == first
            for row in part:
                assert row not in result
                result[row] = slot
        assert result == ({} if long and size == tiling.SMALL_TILE else wanted)
    order = table[layout.order :]
    assert table[1:3] == [len(wanted), tokens]
    assert sorted(order) == list(range(tokens))
    assert order[len(wanted) :] == [row for row in range(tokens) if row not in wanted]


def test_the_grid_of_a_padded_step_has_room_for_every_shorter_one() -> None:
    for groups, size in ((1, 16), (4, 16), (9, 64)):
        bounds = [tiling.max_tiles(tokens, groups, size) for tokens in range(1, 400)]
        assert bounds == sorted(bounds)


def test_a_short_step_as_long_as_it_may_be_fits_the_small_tiles() -> None:
    """Of 200 adapters in 256 rows, 200 have few rows."""
    runs = [Run(slot, slot, slot + 1) for slot in range(200)] + [Run(200, 200, 256)]
    layout = tiling.StepLayout(8192, 257)
    table = tiling.step_table(runs, set(range(201)), 256, 8192).tolist()
    assert table[0] == 1
    assert len(tiles(table, layout.small, layout.large)) == 204


def test_the_worked_example_of_the_tiles_holds(monkeypatch) -> None:
    monkeypatch.setattr(tiling, "SMALL_TILE", 4)
    runs = [Run(2, 0, 5), Run(0, 5, 6), Run(2, 9, 11)]
    table = tiling.step_table(runs, {0, 2}, 3, 11).tolist()
    layout = tiling.StepLayout(11, 4)
    assert table[layout.order :] == [0, 1, 2, 3, 4, 9, 10, 5, 6, 7, 8]
    assert table[1:3] == [8, 11]
    assert tiles(table, layout.small, layout.large) == [[2, 0, 4, 0], [2, 4, 3, 4], [0, 7, 1, 5]]


def test_adapters_of_a_row_or_two_get_tiles_of_one_row() -> None:
    runs = [Run(0, 0, 1), Run(1, 1, 3), Run(2, 3, 6), Run(3, 6, 7)]
    table = tiling.step_table(runs, {0, 1, 2, 3}, 4, 7).tolist()
    layout = tiling.StepLayout(7, 5)
    result = [
        (slot, rows, first) for slot, _, rows, first in tiles(table, layout.small, layout.large)
    ]
    assert result == [(0, 1, 0), (1, 1, 1), (1, 1, 2), (2, 3, 3), (3, 1, 6)]
    assert table[0] == 1
