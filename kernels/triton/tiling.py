"""Which rows of a step a kernel's programs work on: tiles of one adapter's tokens.

Tokens are sorted by slot, and each slot's are cut into tiles. Example with tiles of 4: runs
(slot 2, rows 0-5), (slot 0, rows 5-6), (slot 2, rows 9-11) give the order 0 1 2 3 4 9 10 | 5 and
the tiles (slot 2, place 0, 4 tokens), (slot 2, place 4, 3 tokens), (slot 0, place 7, 1 token).
Rows 6-8 belong to the base and are in no tile; they come last in the order, for the launch that
takes every row (molehill.kernels.triton.activate). The number of tiles that a step of T tokens can
need has a bound that depends on T alone: that is a launch's grid, and the programs beyond the tiles
that there are return at once. Where many adapters have a row or two each, such rows are tiles of
their own (FEW_ROWS).
"""

from array import array
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from molehill.kernels.interface import UNSERVED, Run
from molehill.kernels.triton import layout as at

# Tokens of a tile in steps of at most DECODE_TOKENS, and in longer ones.
SMALL_TILE = 16
LARGE_TILE = 64
DECODE_TOKENS = 256

# Of an adapter with at most FEW_ROWS rows in a short step each row is a tile, if all of those
# adapters together have at least ROUTE_FIRST_ROWS: with fewer, reading A of every expert takes less
# time than waiting for the router before A is read. Arithmetic, not measured.
FEW_ROWS = 2
ROUTE_FIRST_ROWS = 4


def max_tiles(tokens: int, groups: int, tile: int) -> int:
    """Tiles of `tile` tokens that `tokens` of at most `groups` different slots can need."""
    if tile == SMALL_TILE:
        groups *= FEW_ROWS
    groups = min(groups, tokens)
    return (tokens - groups) // tile + groups


@dataclass(frozen=True)
class StepLayout:
    """Where the parts of the steps buffer begin; steps have at most `tokens` of `groups` slots."""

    tokens: int
    groups: int

    @property
    def small(self) -> int:
        return int(at.STEP_HEAD.value)

    @property
    def large(self) -> int:
        tiles = max_tiles(min(self.tokens, DECODE_TOKENS), self.groups, SMALL_TILE)
        return self.small + int(at.TILE.value) * tiles

    @property
    def order(self) -> int:
        tiles = max_tiles(self.tokens, self.groups, LARGE_TILE)
        return self.large + int(at.TILE.value) * tiles

    @property
    def size(self) -> int:
        """int32 elements."""
        return self.order + self.tokens


def step_table(runs: Sequence[Run], stored: Container[int], adapters: int, tokens: int) -> Tensor:
    """The steps buffer of molehill.kernels.triton.layout, int32, on the CPU.

    Rows of a slot that holds nothing, and of adapters beyond the first `adapters` different ones,
    are UNSERVED; rows from `tokens` on are dropped.
    """
    places: dict[int, list[Run]] = {}
    served = 0
    for run in runs:
        slot = run.slot if run.slot in stored else UNSERVED
        if slot not in places:
            if slot != UNSERVED and served == adapters:
                slot = UNSERVED
            served += slot != UNSERVED
            places.setdefault(slot, [])
        places[slot].append(run)
    # A short step may be padded to a long one, but a long one is never run as a short one.
    short = all(run.stop <= DECODE_TOKENS for run in runs)
    few = _slots_of_few_rows(places) if short else set()
    order = array("i")
    small, large = array("i"), array("i")
    rows = _rows(tokens)
    for slot, parts in places.items():
        start = len(order)
        for part in parts:
            order += rows[part.start : part.stop]
        if short:
            _cut(small, slot, start, order, 1 if slot in few else SMALL_TILE)
        _cut(large, slot, start, order, LARGE_TILE)
    adapted = len(order)
    _add_base_rows(order, runs, rows)
    layout = StepLayout(tokens, adapters + 1)
    steps = array("i", bytes(4 * at.STEP_HEAD.value))
    steps[at.ROUTE_FIRST.value] = bool(few)
    steps[at.ADAPTED.value], steps[at.ANNOUNCED.value] = adapted, len(order)
    nothing = array("i", [at.NO_TILE.value])
    for tiles, end in ((small, layout.large), (large, layout.order)):
        steps += tiles
        steps += nothing * (end - len(steps))
    return torch.frombuffer(steps + order, dtype=torch.int32)


def _slots_of_few_rows(places: Mapping[int, Sequence[Run]]) -> set[int]:
    """Slots whose rows are tiles of their own."""
    lengths = {slot: sum(run.stop - run.start for run in runs) for slot, runs in places.items()}
    few = {slot for slot, n in lengths.items() if n <= FEW_ROWS and slot != UNSERVED}
    return few if sum(lengths[slot] for slot in few) >= ROUTE_FIRST_ROWS else set()


def _add_base_rows(order: "array[int]", runs: Sequence[Run], rows: "array[int]") -> None:
    """Rows before the last run's end that are in no run, ascending. rows: as `_rows` has them."""
    free = 0
    for run in sorted(runs, key=lambda run: run.start):
        order += rows[free : run.start]
        free = max(free, run.stop)


@lru_cache(1)
def _rows(tokens: int) -> "array[int]":
    """0 .. tokens - 1: copying a part of it is faster than counting."""
    return array("i", range(tokens))


def _cut(tiles: "array[int]", slot: int, start: int, order: "array[int]", size: int) -> None:
    """Tiles of the places from `start` on."""
    for place in range(start, len(order), size):
        tiles.extend((slot, place, min(size, len(order) - place), order[place]))
