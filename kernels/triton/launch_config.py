"""Sizes that the kernels are compiled for and launched with, and the scratch between them.

Everything here depends on the number of (padded) tokens and on the capacity of the server alone,
never on what adapters are loaded, so that a captured CUDA graph stays right.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.tiling import (
    DECODE_TOKENS,
    LARGE_TILE,
    SMALL_TILE,
    StepLayout,
    max_tiles,
)

# Inputs that one split of a short step adds up, and the most splits that are made.
SPLIT_INPUTS = 512
MAX_SPLITS = 16
# Splits times tokens of a long step, and the most splits that are made.
LONG_SPLIT_TOKENS = 8192
MAX_LONG_SPLITS = 4
# Strips times tokens of an FFN launch, and programs: that many are resident at once on a large GPU,
# so that a launch without any FFN mixture ends as soon as it has begun.
STRIP_TOKENS = 16384
FFN_PROGRAMS = 2048

# Given to ptxas where its own choice would rather spill a little than keep fewer programs resident.
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Capacity:
    """What a server is built for. Fixed when it starts: addresses and grids follow from it.

    adapters: different ones in one step (vLLM's max_loras). slots: loaded at once. tokens: of the
    longest step. rank: stacked rank rows of one adapter on one (fused) linear. experts: of one
    router, at most 32 are tested. gates: stacked router rows of one adapter on one linear, with
    those of Sparsegen's hidden layers. pieces: original projections of one linear, and its FFN's
    mixture. memory: bytes for adapter weights. vectors: whether mixtures of vectors may come, which
    only eager mode can run. captures: whether gate weights may be asked for, row by row; then every
    step keeps those of all rows, also inside a graph: 8 * linears * tokens * gates bytes.
    """

    adapters: int
    tokens: int
    slots: int = 64
    rank: int = 1024
    experts: int = 32
    gates: int = 1024
    pieces: int = 8
    memory: int = 2 << 30
    vectors: bool = False
    captures: bool = False


@dataclass(frozen=True)
class BlockSizes:
    """What programs take at a time, and how many share a tile, in steps of one kind.

    rank, rank_programs, gates, gate_programs, inputs, shrink_warps: shrink's rank rows, router rows
    and inputs. route_rank, route_programs, gate_warps: gate's rank rows; single_rank,
    single_inputs: of tiles that route first. expand_rank, columns, expand_warps: expand's rank rows
    and outputs; activate_columns, activate_warps: where it is the FFN's activation too, columns of
    each half. pair_tile, ffn_columns, ffn_rank, ffn_warps: an FFN mixture's (token, expert)
    pairs, columns and rank rows.
    """

    tile: int
    rank: int
    rank_programs: int
    gates: int
    gate_programs: int
    inputs: int
    shrink_warps: int
    route_rank: int
    route_programs: int
    gate_warps: int
    single_rank: int
    single_inputs: int
    expand_rank: int
    columns: int
    expand_warps: int
    activate_columns: int
    activate_warps: int
    pair_tile: int
    ffn_columns: int
    ffn_rank: int
    ffn_warps: int


# Measured on an H200 at Llama-3.1-8B's shape (E 8, rank 8, bf16) with the kernels of 2026-11-27,
# which routed in expand: shrink's sizes, splits and warps of both kinds (qkv at 32 tokens 9.3 us ->
# 5.9, at 1024 tokens 102 -> 24), and of long steps expand's (qkv at 1024 tokens 130 us -> 39).
# All others are arithmetic and what compiles without spills: with routing gone from expand, short
# steps want more programs, not fewer, than the 24 that 256 columns leave of qkv's 6144.
SHORT = BlockSizes(
    tile=SMALL_TILE,
    rank=16,
    rank_programs=12,
    gates=16,
    gate_programs=2,
    inputs=128,
    shrink_warps=4,
    route_rank=32,
    route_programs=8,
    gate_warps=4,
    single_rank=8,
    single_inputs=1024,
    expand_rank=32,
    columns=128,
    expand_warps=4,
    activate_columns=64,
    activate_warps=4,
    pair_tile=16,
    ffn_columns=64,
    ffn_rank=32,
    ffn_warps=4,
)
LONG = BlockSizes(
    tile=LARGE_TILE,
    rank=64,
    rank_programs=3,
    gates=32,
    gate_programs=1,
    inputs=64,
    shrink_warps=8,
    route_rank=32,
    route_programs=4,
    gate_warps=4,
    single_rank=8,
    single_inputs=1024,
    expand_rank=32,
    columns=256,
    expand_warps=8,
    activate_columns=64,
    activate_warps=8,
    pair_tile=32,
    ffn_columns=64,
    ffn_rank=32,
    ffn_warps=8,
)


@dataclass(frozen=True)
class LaunchConfig(BlockSizes):
    """Constants of one launch's kernels.

    tile_list, order: where the steps buffer has the tiles that they read, and the tokens. single:
    whether tiles of one row have a path of their own. counters: int64 of one router. max_finished:
    a token's finished rows of all pieces.
    """

    tile_list: int
    order: int
    groups: int
    single: bool
    max_rank: int
    max_finished: int
    max_gates: int
    max_experts: int
    max_pieces: int
    counters: int

    def tiles(self, tokens: int) -> int:
        """Programs that a step of `tokens` needs for its tiles."""
        return max_tiles(tokens, self.groups, self.tile)

    def splits(self, tokens: int, features: int) -> int:
        """Parts that the inputs of a linear are cut into, for more programs where tiles are few."""
        if tokens <= DECODE_TOKENS:
            return min(MAX_SPLITS, -(-features // SPLIT_INPUTS))
        most = max(1, min(MAX_LONG_SPLITS, LONG_SPLIT_TOKENS // tokens))
        return min(most, -(-features // SPLIT_INPUTS))

    def strips(self, tokens: int, intermediate: int) -> int:
        """Parts that an FFN's intermediate is cut into."""
        most = min(STRIP_TOKENS // tokens, FFN_PROGRAMS // self.tiles(tokens))
        return min(max(1, most), -(-intermediate // self.ffn_columns))


@lru_cache
def launch_config_for(tokens: int, capacity: Capacity) -> LaunchConfig:
    """Short steps have small tiles; long ones large tiles."""
    sizes = SHORT if tokens <= DECODE_TOKENS else LONG
    steps = StepLayout(capacity.tokens, capacity.adapters + 1)
    max_rank, max_pieces = _round_up(capacity.rank, 16), 1 << (capacity.pieces - 1).bit_length()
    max_experts = _power_of_two(capacity.experts)
    return LaunchConfig(
        **asdict(sizes),
        tile_list=steps.small if sizes is SHORT else steps.large,
        order=steps.order,
        groups=capacity.adapters + 1,
        single=sizes is SHORT,
        max_rank=max_rank,
        max_finished=max_rank + at.PITCH.value * max_pieces,
        max_gates=_round_up(capacity.gates, 16),
        max_experts=max_experts,
        max_pieces=max_pieces,
        # Records start at multiples of 16 bytes, so that every kernel is compiled once.
        counters=_round_up(max_experts + at.TOTALS.value, 2),
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
    finished `[T, max_finished]` in the serving dtype, rank rows times their gate weights, and those
    weights, gates float32 `[T, max_gates]`, where the logits were.
    """

    splits: int
    rows: Tensor
    logits: Tensor
    finished: Tensor
    gates: Tensor


class ScratchMemory:
    """Room for the scratch of any step, at a fixed address."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self._capacity = capacity
        short = min(capacity.tokens, DECODE_TOKENS) * MAX_SPLITS
        long = min(capacity.tokens * MAX_LONG_SPLITS, LONG_SPLIT_TOKENS)
        most = max(short, long, capacity.tokens)
        config = launch_config_for(capacity.tokens, capacity)
        self._rows = torch.zeros(most * config.max_rank, device=device)
        self._logits = torch.zeros(most * config.max_gates, device=device)
        self._finished = torch.zeros(capacity.tokens * config.max_finished, device=device)
        self._gates = torch.zeros(capacity.tokens * config.max_gates, device=device)

    def of(self, tokens: int, features: int, dtype: torch.dtype) -> Scratch:
        """The scratch of a linear with `features` inputs of `dtype`."""
        config = launch_config_for(tokens, self._capacity)
        splits = config.splits(tokens, features)
        return Scratch(
            splits,
            _shaped(self._rows, splits, tokens, config.max_rank),
            _shaped(self._logits, splits, tokens, config.max_gates),
            _shaped(self._finished.view(dtype), 1, tokens, config.max_finished)[0],
            _shaped(self._gates, 1, tokens, config.max_gates)[0],
        )


class StripMemory:
    """Room for the strips of an FFN launch, partial sums of down's rank rows, and for its pairs."""

    def __init__(self, capacity: Capacity, device: torch.device) -> None:
        self._capacity = capacity
        config = launch_config_for(capacity.tokens, capacity)
        most = max(STRIP_TOKENS, capacity.tokens)
        self._rows = torch.zeros(most * config.max_rank, device=device)
        # A number of pairs and the pairs, for each tile at its first token's place.
        size = capacity.tokens * (config.max_experts + 1)
        self.pairs = torch.zeros(size, dtype=torch.int32, device=device)

    def of(self, tokens: int, intermediate: int) -> Tensor:
        """float32 `[strips, T, max_rank]`."""
        config = launch_config_for(tokens, self._capacity)
        strips = config.strips(tokens, intermediate)
        return _shaped(self._rows, strips, tokens, config.max_rank)


def _shaped(flat: Tensor, *shape: int) -> Tensor:
    size = shape[0] * shape[1] * shape[2]
    return flat[:size].view(shape)
