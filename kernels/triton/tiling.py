"""Which rows of a step a kernel's programs work on: tiles of one adapter's tokens.

Tokens are sorted by slot, and each slot's are cut into tiles. Example with tiles of 4: runs
(slot 2, rows 0-5), (slot 0, rows 5-6), (slot 2, rows 9-11) give the order 0 1 2 3 4 9 10 | 5 and
the tiles (slot 2, place 0, 4 tokens), (slot 2, place 4, 3 tokens), (slot 0, place 7, 1 token).
Rows 6-8 belong to the base and are in no tile. The number of tiles that a step of T tokens can need
has a bound that depends on T alone: that is a launch's grid, and the programs beyond the tiles
that there are return at once.
"""

from array import array
from collections.abc import Container, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from molehill.kernels.interface import UNSERVED, Run
from molehill.kernels.triton import layout as at

# Tokens of a tile in steps of at most DECODE_TOKENS, and in longer ones.
SMALL_TILE = 16
LARGE_TILE = 64
DECODE_TOKENS = 256


def max_tiles(tokens: int, groups: int, tile: int) -> int:
    """Tiles of `tile` tokens that `tokens` of at most `groups` different slots can need."""
    groups = min(groups, tokens)
    return (tokens - groups) // tile + groups


def buffer_size(tokens: int, groups: int) -> int:
    """int32 elements of the largest table that `table` makes for a step of `tokens`."""
    tiles = max_tiles(tokens, groups, SMALL_TILE) + max_tiles(tokens, groups, LARGE_TILE)
    return int(at.STEP_HEAD.value) + int(at.TILE.value) * tiles + tokens


def table(runs: Sequence[Run], stored: Container[int], adapters: int, tokens: int) -> Tensor:
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
    order = array("i")
    small, large = array("i"), array("i")
    rows = _rows(tokens)
    # A short step may be padded to a long one, but a long one is never run as a short one.
    short = all(run.stop <= DECODE_TOKENS for run in runs)
    for slot, parts in places.items():
        start = len(order)
        for part in parts:
            order += rows[part.start : part.stop]
        if short:
            _cut(small, slot, start, len(order), SMALL_TILE)
        _cut(large, slot, start, len(order), LARGE_TILE)
    head = array("i", bytes(4 * at.STEP_HEAD.value))
    width = at.TILE.value
    head[0:2] = array("i", [len(small) // width, len(head)])
    head[2:4] = array("i", [len(large) // width, len(head) + len(small)])
    head[4] = len(head) + len(small) + len(large)
    return torch.frombuffer(head + small + large + order, dtype=torch.int32)


@lru_cache(1)
def _rows(tokens: int) -> "array[int]":
    """0 .. tokens - 1: copying a part of it is faster than counting."""
    return array("i", range(tokens))


def _cut(tiles: "array[int]", slot: int, start: int, stop: int, size: int) -> None:
    for place in range(start, stop, size):
        tiles.extend((slot, place, min(size, stop - place)))
