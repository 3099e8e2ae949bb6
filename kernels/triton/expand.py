"""Expand: y += B z, with z the finished rank rows, for every piece of a linear.

One launch for all slots, the only one that waits for the base's output. Where a piece has an output
scale (DoRA), y is first replaced by (y - bias) * sum_e w_e scale_e + bias; where it has an added
bias, that is added. Rank rows that are 0 for
a whole tile, as those of experts that none of its tokens chose, are not read. Rows of UNSERVED
tokens become 0.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.gate import find_block
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.shrink import load_tile, load_tokens

# Outputs that a program takes at a time of pieces with a scale, an added bias or odd widths.
PART = 64


@triton.jit
def low_rank(
    finished: tl.tensor,
    record: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    column: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """B z at a piece's outputs `column`: float32 `[T, columns]`."""
    rank = tl.load(record + at.RANK).to(tl.int32)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    b = weights + tl.multiple_of(tl.load(record + at.B), at.PITCH) + column[None, :]
    place = tl.multiple_of(tl.load(record + at.FINISHED).to(tl.int32), at.PITCH)
    z_row = (finished + token * MAX_FINISHED)[:, None] + place
    # Rows up to the multiple are there, and 0: reads are vectors.
    stop = tl.cdiv(rank, at.PITCH) * at.PITCH
    total = tl.zeros((token.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        z = tl.load(z_row + row[None, :], mask=valid[:, None] & (row < stop)[None, :], other=0.0)
        used = tl.max((z != 0).to(tl.int32), axis=0) > 0
        if tl.max(used.to(tl.int32), axis=0) > 0:
            where = used[:, None] & (column < pitch)[None, :]
            b_rows = tl.load(b + row[:, None] * pitch, mask=where, other=0.0)
            total = tl.dot(z, b_rows, total, input_precision=PRECISION)
    return total


@triton.jit
def low_rank_of_one(
    finished: tl.tensor,
    record: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    column: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
) -> tl.tensor:
    """As `low_rank`, of one token and without tensor cores: float32 `[1, columns]`."""
    rank = tl.load(record + at.RANK).to(tl.int32)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    b = weights + tl.multiple_of(tl.load(record + at.B), at.PITCH) + column[None, :]
    z_row = finished + token * MAX_FINISHED + tl.load(record + at.FINISHED)
    sums = tl.zeros((BLOCK_RANK, column.shape[0]), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        z = tl.load(z_row + row, mask=row < rank, other=0.0).to(tl.float32)
        where = (z != 0)[:, None] & (column < pitch)[None, :]
        b_rows = tl.load(b + row[:, None] * pitch, mask=where, other=0.0).to(tl.float32)
        sums += z[:, None] * b_rows
    return tl.sum(sums, axis=0)[None, :]


@triton.jit
def scaled(
    y: tl.tensor,
    record: tl.tensor,
    gates: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
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
        w_e = tl.where(experts > 0, tl.load(weight + e, mask=valid, other=0.0), 1.0)
        scale_e = tl.load(floats + scale + e * pitch + column, mask=column < width, other=0.0)
        factor += w_e[:, None] * scale_e[None, :]
    bias_first = tl.load(record + at.BIAS)
    if bias_first >= 0:
        bias = tl.load(floats + bias_first + column, mask=column < width, other=0.0)[None, :]
        y = (y - bias) * factor + bias
    else:
        y = y * factor
    return y


@triton.jit
def with_added_bias(
    y: tl.tensor, record: tl.tensor, floats: tl.tensor, column: tl.tensor
) -> tl.tensor:
    """y + the bias that a piece adds, if it has one."""
    first = tl.load(record + at.ADDED_BIAS)
    if first >= 0:
        width = tl.load(record + at.WIDTH).to(tl.int32)
        y += tl.load(floats + first + column, mask=column < width, other=0.0)[None, :]
    return y


@triton.jit
def product(
    finished: tl.tensor,
    record: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    column: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """B z at a piece's outputs `column`: float32 `[T, columns]`."""
    if token.shape[0] == 1:
        return low_rank_of_one(finished, record, weights, token, column, MAX_FINISHED, BLOCK_RANK)
    else:
        return low_rank(
            finished, record, weights, token, valid, column, MAX_FINISHED, BLOCK_RANK, PRECISION
        )


@triton.jit
def add_to_piece(
    out: tl.tensor,
    out_stride: tl.tensor,
    record: tl.tensor,
    first: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Adds B z to BLOCK_OUT outputs of a piece, from its output `first` on.

    In vectors if the piece begins and ends at multiples of PITCH. Otherwise, and where it has an
    output scale or an added bias, PART outputs at a time, so that the others do not pay with
    registers.
    """
    out_row = (out + token.to(tl.int64) * out_stride)[:, None]
    start = tl.load(record + at.START)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    scale = tl.load(record + at.SCALE)
    plain = scale == at.PLAIN_PIECE
    if plain & (start % at.PITCH == 0) & (width % at.PITCH == 0):
        column = first + tl.arange(0, BLOCK_OUT)
        total = product(
            finished, record, weights, token, valid, column, MAX_FINISHED, BLOCK_RANK, PRECISION
        )
        # The compiler takes the multiples from the products.
        target = out_row + start // at.PITCH * at.PITCH + column[None, :]
        inside = valid[:, None] & (column < width // at.PITCH * at.PITCH)[None, :]
        y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, (y + total).to(target.dtype.element_ty), mask=inside)
    else:
        for part in range(0, BLOCK_OUT, PART):
            column = first + part + tl.arange(0, PART)
            total = product(
                finished, record, weights, token, valid, column, MAX_FINISHED, BLOCK_RANK, PRECISION
            )
            target = out_row + start + column[None, :]
            inside = valid[:, None] & (column < width)[None, :]
            y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
            if scale >= 0:
                y = scaled(y, record, gates, token, valid, floats, column, MAX_GATES)
            if not plain:
                y = with_added_bias(y, record, floats, column)
            tl.store(target, (y + total).to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def expand_kernel(
    out: tl.tensor,
    steps: tl.tensor,
    pieces: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    out_stride: tl.tensor,
    piece_stride: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    LIST: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    slot, place, size, first_token = load_tile(steps, LIST)
    if slot == at.NO_TILE:
        return
    block = tl.program_id(1)
    if slot == at.UNSERVED:
        token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
        column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        target = (out + token.to(tl.int64) * out_stride)[:, None] + column[None, :]
        nothing = tl.zeros((TILE, BLOCK_OUT), dtype=out.dtype.element_ty)
        tl.store(target, nothing, valid[:, None] & (column < features)[None, :])
        return
    pieces += slot.to(tl.int64) * piece_stride
    widths = tl.load(pieces + tl.arange(0, MAX_PIECES) * at.PIECE + at.WIDTH).to(tl.int32)
    piece, local = find_block(widths, block, BLOCK_OUT)
    if piece == MAX_PIECES:
        return
    record = pieces + piece * at.PIECE
    first = local * BLOCK_OUT
    # Two conditions: the first is decided when it is compiled.
    if SINGLE:  # noqa: SIM102
        if size == 1:
            token = first_token + tl.arange(0, 1)
            valid = token < tokens
            add_to_piece(
                out,
                out_stride,
                record,
                first,
                finished,
                gates,
                weights,
                floats,
                token,
                valid,
                MAX_FINISHED,
                MAX_GATES,
                BLOCK_RANK,
                BLOCK_OUT,
                PART,
                PRECISION,
            )
            return
    token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
    add_to_piece(
        out,
        out_stride,
        record,
        first,
        finished,
        gates,
        weights,
        floats,
        token,
        valid,
        MAX_FINISHED,
        MAX_GATES,
        BLOCK_RANK,
        BLOCK_OUT,
        PART,
        PRECISION,
    )


def expand(
    out: Tensor,
    steps: Tensor,
    pieces: Tensor,
    arena: tuple[Tensor, Tensor],
    scratch: Scratch,
    config: LaunchConfig,
) -> None:
    """Changes out `[T, out]` in place, from what gate left in `scratch`.

    pieces: the linear's records `[slots, pieces, PIECE]`. arena: its flat views in the serving
    dtype and in float32.
    """
    tokens, features = out.shape
    weights, floats = arena
    precise = out.element_size() == 4
    block_out = min(config.columns, PART) if precise else config.columns
    blocks = triton.cdiv(features, block_out) + config.max_pieces - 1
    expand_kernel[(config.tiles(tokens), blocks)](
        out,
        steps,
        pieces,
        scratch.finished,
        scratch.gates,
        weights,
        floats,
        tokens,
        features,
        out.stride(0),
        pieces.stride(0),
        MAX_FINISHED=config.max_finished,
        MAX_GATES=config.max_gates,
        MAX_PIECES=config.max_pieces,
        LIST=config.tile_list,
        ORDER=config.order,
        TILE=config.tile,
        SINGLE=config.single,
        BLOCK_RANK=config.expand_rank,
        BLOCK_OUT=block_out,
        PART=min(block_out, PART),
        PRECISION="ieee" if precise else "tf32",
        num_warps=config.expand_warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
