"""Expand: y += B z, with z the gated rank rows, for every piece of a linear.

One launch for all slots, the only one that waits for the base's output. Where a piece has an output
scale (DoRA), y is first replaced by (y - bias) * sum_e w_e scale_e + bias. Rank rows that are 0 for
a whole tile, as those of experts that none of its tokens chose, are not read. Rows of UNSERVED
tokens become 0.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.gate import find_block
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.shrink import load_tile


@triton.jit
def low_rank(
    gated: tl.tensor,
    record: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    column: tl.tensor,
    MAX_RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """B z at a piece's outputs `column`: float32 `[T, columns]`."""
    rank = tl.load(record + at.RANK).to(tl.int32)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    b_first = tl.multiple_of(tl.load(record + at.B), at.PITCH)
    source = (token * MAX_RANK + tl.load(record + at.ROW).to(tl.int32))[:, None]
    total = tl.zeros((token.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        z = tl.load(gated + source + row[None, :], own[:, None] & (row < rank)[None, :], 0.0)
        used = tl.max((z != 0).to(tl.int32), axis=0) > 0
        if tl.max(used.to(tl.int32), axis=0) > 0:
            b = tl.load(
                weights + b_first + (row[:, None] * pitch + column[None, :]),
                mask=used[:, None] & (column < pitch)[None, :],
                other=0.0,
            )
            total = tl.dot(z, b, total, input_precision=PRECISION)
    return total


@triton.jit
def scaled(
    y: tl.tensor,
    record: tl.tensor,
    gates: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    floats: tl.tensor,
    column: tl.tensor,
    MAX_GATES: tl.constexpr,
) -> tl.tensor:
    """(y - bias) * sum_e w_e scale_e + bias, for a piece with an output scale."""
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.cdiv(width, at.PITCH) * at.PITCH
    scale = tl.load(record + at.SCALE)
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    weight = gates + token * MAX_GATES + tl.load(record + at.GATE)
    factor = tl.zeros_like(y)
    for e in range(tl.maximum(experts, 1)):
        w_e = tl.where(experts > 0, tl.load(weight + e, mask=own, other=0.0), 1.0)
        scale_e = tl.load(floats + scale + e * pitch + column, mask=column < width, other=0.0)
        factor += w_e[:, None] * scale_e[None, :]
    bias_first = tl.load(record + at.BIAS)
    if bias_first >= 0:
        bias = tl.load(floats + bias_first + column, mask=column < width, other=0.0)[None, :]
        y = (y - bias) * factor + bias
    else:
        y = y * factor
    return y


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    out: tl.tensor,
    steps: tl.tensor,
    pieces: tl.tensor,
    gated: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    out_stride: tl.tensor,
    piece_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    slot, token, own = load_tile(steps, tokens, LIST, TILE)
    block = tl.program_id(1)
    out_row = (out + token.to(tl.int64) * out_stride)[:, None]
    if slot == at.UNSERVED:
        column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        nothing = tl.zeros((TILE, BLOCK_OUT), dtype=out.dtype.element_ty)
        tl.store(out_row + column[None, :], nothing, own[:, None] & (column < features)[None, :])
    if slot < 0:
        return
    pieces += slot.to(tl.int64) * piece_stride
    widths = tl.load(pieces + tl.arange(0, MAX_PIECES) * at.PIECE + at.WIDTH).to(tl.int32)
    piece, local = find_block(widths, block, BLOCK_OUT)
    if piece == MAX_PIECES:
        return
    record = pieces + piece * at.PIECE
    column = local * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = own[:, None] & (column < tl.load(record + at.WIDTH).to(tl.int32))[None, :]
    total = low_rank(gated, record, weights, token, own, column, MAX_RANK, BLOCK_RANK, PRECISION)
    target = out_row + tl.load(record + at.START) + column[None, :]
    y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    if tl.load(record + at.SCALE) >= 0:
        y = scaled(y, record, gates, token, own, floats, column, MAX_GATES)
    tl.store(target, (y + total).to(out.dtype.element_ty), mask=inside)


def expand(
    out: Tensor,
    steps: Tensor,
    pieces: Tensor,
    arena: tuple[Tensor, Tensor],
    scratch: Scratch,
    config: LaunchConfig,
) -> None:
    """Changes out `[T, out]` in place, from what `gate` left in `scratch`.

    pieces: the linear's records `[slots, pieces, PIECE]`. arena: its flat views in the serving
    dtype and in float32.
    """
    tokens, features = out.shape
    weights, floats = arena
    columns = triton.cdiv(features, config.columns) + config.max_pieces - 1
    expand_kernel[(config.tiles(tokens), columns)](
        out,
        steps,
        pieces,
        scratch.gated,
        scratch.gates,
        weights,
        floats,
        tokens,
        features,
        out.stride(0),
        pieces.stride(0),
        MAX_RANK=config.max_rank,
        MAX_GATES=config.max_gates,
        MAX_PIECES=config.max_pieces,
        LIST=config.tile_list,
        TILE=config.tile,
        BLOCK_RANK=config.expand_rank,
        BLOCK_OUT=config.columns,
        PRECISION="ieee" if out.element_size() == 4 else "tf32",
        num_warps=config.warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
