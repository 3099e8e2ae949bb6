"""The tiles of a step against its runs."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from molehill.kernels.interface import UNSERVED, Run
from molehill.kernels.triton import tiling


@st.composite
def steps(draw) -> tuple[list[Run], int]:
    runs, row = [], 0
    for _ in range(draw(st.integers(0, 8))):
        row += draw(st.integers(0, 40))
        stop = row + draw(st.integers(1, 90))
        runs.append(Run(draw(st.sampled_from([0, 1, 2, 5, UNSERVED])), row, stop))
        row = stop
    return runs, row


@settings(max_examples=200, deadline=None)
@given(steps())
def test_tiles_cover_every_row_once_and_fit_the_grid(step) -> None:
    runs, tokens = step
    adapters, stored = 3, {0, 1, 2}
    table = tiling.table(runs, stored, adapters, tokens).tolist()
    assert len(table) <= tiling.buffer_size(max(tokens, 1), adapters + 1)
    wanted = {
        row: run.slot if run.slot in stored else UNSERVED
        for run in runs
        for row in range(run.start, run.stop)
    }
    for place, size in ((0, tiling.SMALL_TILE), (2, tiling.LARGE_TILE)):
        count, first = table[place : place + 2]
        assert count <= tiling.max_tiles(max(tokens, 1), adapters + 1, size)
        found = {}
        for i in range(first, first + 3 * count, 3):
            slot, start, rows = table[i : i + 3]
            assert 0 < rows <= size
            for row in table[table[4] + start : table[4] + start + rows]:
                assert row not in found
                found[row] = slot
        long = any(run.stop > tiling.DECODE_TOKENS for run in runs)
        assert found == ({} if long and size == tiling.SMALL_TILE else wanted)


def test_the_grid_of_a_padded_step_has_room_for_every_shorter_one() -> None:
    for groups, size in ((1, 16), (4, 16), (9, 64)):
        bounds = [tiling.max_tiles(tokens, groups, size) for tokens in range(1, 400)]
        assert bounds == sorted(bounds)


def test_the_worked_example_of_the_tiles_holds(monkeypatch) -> None:
    monkeypatch.setattr(tiling, "SMALL_TILE", 4)
    runs = [Run(2, 0, 5), Run(0, 5, 6), Run(2, 9, 11)]
    table = tiling.table(runs, {0, 2}, 3, 11).tolist()
    head = SimpleNamespace(small=table[0:2], order=table[4])
    assert table[head.order :] == [0, 1, 2, 3, 4, 9, 10, 5]
    first = head.small[1]
    assert head.small[0] == 3
    assert table[first : first + 9] == [2, 0, 4, 2, 4, 3, 0, 7, 1]
