"""Sizes that the kernels are compiled for and launched with, and the scratch between them.

Everything here depends on the number of (padded) tokens and on the capacity of the server alone,
never on what adapters are loaded, so that a captured CUDA graph stays right.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.tiling import DECODE_TOKENS, LARGE_TILE, SMALL_TILE, max_tiles

# Inputs that one split of a short step adds up, and the most splits that are made.
SPLIT_INPUTS = 512
MAX_SPLITS = 16
# Programs that an FFN launch aims at: about two for each multiprocessor of a large GPU.
FFN_PROGRAMS = 256

# Given to ptxas where its own choice would rather spill a little than keep fewer programs resident.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Capacity:
    """What a server is built for. Fixed when it starts: addresses and grids follow from it.

    adapters: different ones in one step (vLLM's max_loras). slots: loaded at once. tokens: of the
    longest step. rank: stacked rank rows of one adapter on one (fused) linear. experts: of one
    router, at most 32 are tested. gates: stacked router rows of one adapter on one linear.
    pieces: original projections of one linear. memory: bytes for adapter weights.
    """

    adapters: int
    tokens: int
    slots: int = 64
    rank: int = 1024
    experts: int = 32
    gates: int = 128
    pieces: int = 8
    memory: int = 2 << 30


@dataclass(frozen=True)
class LaunchConfig:
    """Constants of one launch's kernels. tile_list: which tiles of the steps buffer they read.

    rank_programs, gate_programs, route_programs: that share a tile's rank rows and router rows in
    shrink, and its rank rows in gate, block by block. counters: int64 of one router.
    """

    tile: int
    tile_list: int
    groups: int
    max_rank: int
    max_gates: int
    max_experts: int
    max_pieces: int
    counters: int
    rank: int
    expand_rank: int
    rank_programs: int
    gates: int
    gate_programs: int
    route_programs: int
    route_rank: int
    inputs: int
    columns: int
    warps: int

    def tiles(self, tokens: int) -> int:
        """Programs that a step of `tokens` needs for its tiles."""
        return max_tiles(tokens, self.groups, self.tile)

    def splits(self, tokens: int, features: int) -> int:
        """Parts that the inputs of a linear are cut into: where tokens are few, more programs."""
        if tokens > DECODE_TOKENS:
            return 1
        return min(MAX_SPLITS, -(-features // SPLIT_INPUTS))

    def strips(self, tokens: int, intermediate: int) -> int:
        """Parts that an FFN's intermediate is cut into."""
        wanted = max(1, FFN_PROGRAMS // self.tiles(tokens))
        return min(wanted, -(-intermediate // self.columns))


@lru_cache
def launch_config_for(tokens: int, capacity: Capacity) -> LaunchConfig:
    """Short steps have small tiles; long ones large tiles."""
    short = tokens <= DECODE_TOKENS
    return LaunchConfig(
        tile=SMALL_TILE if short else LARGE_TILE,
        tile_list=(at.SMALL if short else at.LARGE).value,
        groups=capacity.adapters + 1,
        max_rank=_round_up(capacity.rank, 16),
        max_gates=_round_up(capacity.gates, 16),
        max_experts=_power_of_two(capacity.experts),
        max_pieces=1 << (capacity.pieces - 1).bit_length(),
        # Records start at multiples of 16 bytes, so that every kernel is compiled once.
        counters=_round_up(_power_of_two(capacity.experts) + at.FIGURES.value, 2),
        rank=32 if short else 64,
        expand_rank=32,
        rank_programs=8 if short else 4,
        gates=32,
        gate_programs=2,
        route_programs=8,
        route_rank=32,
        inputs=64,
        columns=64,
        warps=4 if short else 8,
    )


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


@dataclass(frozen=True)
class Scratch:
    """What passes from one launch to the next.

    From shrink to gate, partial sums of rank rows and of router logits: rows float32
    `[splits, T, max_rank]`, logits float32 `[splits, T, max_gates]`. From gate to expand and ffn:
    gated `[T, max_rank]` in the serving dtype, rank rows times their gate weights, and those
    weights, gates float32 `[T, max_gates]`, where the logits were.
    """

    splits: int
    rows: Tensor
    logits: Tensor
    gated: Tensor
    gates: Tensor


class ScratchMemory:
    """Room for the scratch of any step, at a fixed address."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self._capacity = capacity
        most = max(min(capacity.tokens, DECODE_TOKENS) * MAX_SPLITS, capacity.tokens)
        config = launch_config_for(capacity.tokens, capacity)
        self._rows = torch.zeros(most * config.max_rank, device=device)
        self._logits = torch.zeros(most * config.max_gates, device=device)
        self._gated = torch.zeros(capacity.tokens * config.max_rank, device=device)
        self._gates = torch.zeros(capacity.tokens * config.max_gates, device=device)

    def of(self, tokens: int, features: int, dtype: torch.dtype) -> Scratch:
        """The scratch of a linear with `features` inputs of `dtype`."""
        config = launch_config_for(tokens, self._capacity)
        splits = config.splits(tokens, features)
        return Scratch(
            splits,
            _shaped(self._rows, splits, tokens, config.max_rank),
            _shaped(self._logits, splits, tokens, config.max_gates),
            _shaped(self._gated.view(dtype), 1, tokens, config.max_rank)[0],
            _shaped(self._gates, 1, tokens, config.max_gates)[0],
        )


class StripMemory:
    """Room for the strips of an FFN launch: partial sums of down's rank rows."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self._capacity = capacity
        config = launch_config_for(capacity.tokens, capacity)
        # strips * tokens is at most FFN_PROGRAMS * tile, or tokens with one strip.
        most = max(FFN_PROGRAMS * LARGE_TILE, capacity.tokens)
        self._rows = torch.zeros(most * config.max_rank, device=device)

    def of(self, tokens: int, intermediate: int) -> Tensor:
        """float32 `[strips, T, max_rank]`."""
        config = launch_config_for(tokens, self._capacity)
        strips = config.strips(tokens, intermediate)
        return _shaped(self._rows, strips, tokens, config.max_rank)


def _shaped(flat: Tensor, *shape: int) -> Tensor:
    size = shape[0] * shape[1] * shape[2]
    return flat[:size].view(shape)
