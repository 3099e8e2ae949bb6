"""Activate: h = act(gate) * up of an FFN, in place of the base's launch, with what the adapters do.

gate and up are the halves of the gate_up linear's output. Rows of adapters get B z added first, as
molehill.kernels.triton.expand does for other linears and with the same roundings; rows of an FFN
mixture get its experts (molehill.kernels.triton.ffn); all others the base's activation. UNSERVED
rows become 0.

A program has BLOCK columns of h for one tile of an adapter's tokens or of the base's. Of a tile
with an FFN mixture it has a strip.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.activate_rows import (
    activate_rows,
    add_to_strip_columns,
    load_base_tokens,
)
from molehill.kernels.triton.activations import gated
from molehill.kernels.triton.ffn import mix_experts, strip_columns
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.shrink import load_tile, load_tokens


@triton.jit(do_not_specialize=["tokens", "tiles", "parts"])
def activate_kernel(
    h: tl.tensor,
    gate_up: tl.tensor,
    steps: tl.tensor,
    pieces: tl.tensor,
    records: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    pairs: tl.tensor,
    strips: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    tokens: tl.tensor,
    tiles: tl.tensor,
    parts: tl.tensor,
    width: tl.tensor,
    h_stride: tl.tensor,
    gate_up_stride: tl.tensor,
    piece_stride: tl.tensor,
    record_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    LIST: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    PAIR_RANK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(0) >= tiles:
        if tl.program_id(1) * BLOCK < width:
            tile = tl.program_id(0) - tiles
            token, valid = load_base_tokens(steps, tile, tokens, ORDER, TILE)
            inside = valid[:, None] & (column < width)[None, :]
            source = gate_up + (token.to(tl.int64) * gate_up_stride)[:, None] + column[None, :]
            gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
            up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
            value = gated(gate, up, h, ACTIVATION, ROUNDED)
            target = h + (token.to(tl.int64) * h_stride)[:, None] + column[None, :]
            tl.store(target, value.to(h.dtype.element_ty), mask=inside)
        return
    slot, place, size, first_token = load_tile(steps, LIST)
    if slot == at.NO_TILE:
        return
    if slot == at.UNSERVED:
        token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
        target = h + (token.to(tl.int64) * h_stride)[:, None] + column[None, :]
        nothing = tl.zeros((TILE, BLOCK), dtype=h.dtype.element_ty)
        tl.store(target, nothing, valid[:, None] & (column < width)[None, :])
        return
    slot = slot.to(tl.int64)
    record = records + slot * record_stride
    pieces += slot * piece_stride
    every = pieces + tl.arange(0, MAX_PIECES) * at.PIECE
    starts = tl.load(every + at.START).to(tl.int32)
    widths = tl.load(every + at.WIDTH).to(tl.int32)
    if tl.load(record + at.EXPERTS) != 0:
        if tl.program_id(1) < parts:
            if tl.max(widths, axis=0) > 0:
                token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
                span = strip_columns(width, parts, PAIR_BLOCK)
                begin = tl.program_id(1) * span
                add_to_strip_columns(
                    gate_up,
                    starts,
                    widths,
                    pieces,
                    finished,
                    gates,
                    weights,
                    floats,
                    token,
                    valid,
                    begin,
                    tl.minimum(begin + span, width),
                    width,
                    gate_up_stride,
                    MAX_FINISHED,
                    MAX_GATES,
                    BLOCK_RANK,
                    BLOCK,
                    PRECISION,
                )
            mix_experts(
                h,
                gate_up,
                steps,
                record,
                finished,
                gates,
                pairs,
                strips,
                weights,
                floats,
                ints,
                place,
                size,
                tokens,
                parts,
                width,
                h_stride,
                gate_up_stride,
                MAX_RANK,
                MAX_FINISHED,
                MAX_GATES,
                MAX_EXPERTS,
                ORDER,
                TILE,
                PAIR_TILE,
                PAIR_RANK,
                PAIR_BLOCK,
                PRECISION,
            )
        return
    if tl.program_id(1) * BLOCK >= width:
        return
    # Two conditions: the first is decided when it is compiled.
    if SINGLE:  # noqa: SIM102
        if size == 1:
            token = first_token + tl.arange(0, 1)
            activate_rows(
                h,
                gate_up,
                starts,
                widths,
                pieces,
                finished,
                gates,
                weights,
                floats,
                token,
                token < tokens,
                width,
                h_stride,
                gate_up_stride,
                MAX_FINISHED,
                MAX_GATES,
                BLOCK_RANK,
                BLOCK,
                ACTIVATION,
                ROUNDED,
                PRECISION,
            )
            return
    token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
    activate_rows(
        h,
        gate_up,
        starts,
        widths,
        pieces,
        finished,
        gates,
        weights,
        floats,
        token,
        valid,
        width,
        h_stride,
        gate_up_stride,
        MAX_FINISHED,
        MAX_GATES,
        BLOCK_RANK,
        BLOCK,
        ACTIVATION,
        ROUNDED,
        PRECISION,
    )


def activate(
    h: Tensor,
    gate_up: Tensor,
    steps: Tensor,
    records: tuple[Tensor, Tensor],
    arena: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
    pairs: Tensor,
    strips: Tensor,
    activation: tuple[int, bool],
    config: LaunchConfig,
) -> None:
    """Fills h `[T, I]` from gate_up `[T, 2 I]`, and `strips` where there is an FFN mixture, whose
    rows of gate_up it may change.

    records: the gate_up linear's pieces `[slots, pieces, PIECE]` and the FFN's `[slots, FFN]`.
    arena: its flat views in the serving dtype, in float32 and in int32. scratch, pairs: what gate
    left of the gate_up linear. activation: the base's, of layout, and whether it is rounded before
    it is multiplied.
    """
    tokens, width = h.shape
    pieces, ffns = records
    weights, floats, ints = arena
    kind, rounded = activation
    precise = h.element_size() == 4
    block = config.activate_columns // (2 if precise else 1)
    tiles, base_tiles = config.tiles(tokens), triton.cdiv(tokens, config.tile)
    programs = max(triton.cdiv(width, block), strips.shape[0])
    activate_kernel[(tiles + base_tiles, programs)](
        h,
        gate_up,
        steps,
        pieces,
        ffns,
        scratch.finished,
        scratch.gates,
        pairs,
        strips,
        weights,
        floats,
        ints,
        tokens,
        tiles,
        strips.shape[0],
        width,
        h.stride(0),
        gate_up.stride(0),
        pieces.stride(0),
        ffns.stride(0),
        MAX_RANK=config.max_rank,
        MAX_FINISHED=config.max_finished,
        MAX_GATES=config.max_gates,
        MAX_EXPERTS=config.max_experts,
        MAX_PIECES=config.max_pieces,
        LIST=config.tile_list,
        ORDER=config.order,
        TILE=config.tile,
        SINGLE=config.single,
        BLOCK_RANK=config.expand_rank,
        BLOCK=block,
        PAIR_TILE=16 if precise else config.pair_tile,
        PAIR_RANK=16 if precise else config.ffn_rank,
        PAIR_BLOCK=config.ffn_columns // (2 if precise else 1),
        ACTIVATION=kind,
        ROUNDED=rounded,
        PRECISION="ieee" if precise else "tf32",
        num_warps=config.activate_warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
