"""Expand: y += B z, with z the finished rank rows, for every piece of a linear.

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
from molehill.kernels.triton.shrink import load_tile, load_tokens


@triton.jit
def low_rank(
    finished: tl.tensor,
    record: tl.tensor,
    weights: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
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
        z = tl.load(z_row + row[None, :], mask=own[:, None] & (row < stop)[None, :], other=0.0)
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


@triton.jit
def add_to_piece(
    out: tl.tensor,
    out_stride: tl.tensor,
    total: tl.tensor,
    record: tl.tensor,
    gates: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    floats: tl.tensor,
    column: tl.tensor,
    MAX_GATES: tl.constexpr,
) -> None:
    """Adds `total` to the outputs `column` of a piece: in vectors, if it begins and ends at
    multiples of PITCH."""
    target = (out + token.to(tl.int64) * out_stride)[:, None] + column[None, :]
    start = tl.load(record + at.START)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    # The compiler takes the multiples from the products.
    even_start, even_width = start // at.PITCH * at.PITCH, width // at.PITCH * at.PITCH
    even = (start == even_start) & (width == even_width)
    inside = own[:, None] & (column < width)[None, :]
    even_inside = own[:, None] & (column < even_width)[None, :]
    if even:
        y = tl.load(target + even_start, mask=even_inside, other=0.0)
    else:
        y = tl.load(target + start, mask=inside, other=0.0)
    y = y.to(tl.float32)
    if tl.load(record + at.SCALE) >= 0:
        y = scaled(y, record, gates, token, own, floats, column, MAX_GATES)
    y = (y + total).to(target.dtype.element_ty)
    if even:
        tl.store(target + even_start, y, mask=even_inside)
    else:
        tl.store(target + start, y, mask=inside)


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
    PRECISION: tl.constexpr,
) -> None:
    slot, place, size, first_token = load_tile(steps, LIST)
    if slot == at.NO_TILE:
        return
    block = tl.program_id(1)
    if slot == at.UNSERVED:
        token, own = load_tokens(steps, place, size, tokens, ORDER, TILE)
        column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
        target = (out + token.to(tl.int64) * out_stride)[:, None] + column[None, :]
        nothing = tl.zeros((TILE, BLOCK_OUT), dtype=out.dtype.element_ty)
        tl.store(target, nothing, own[:, None] & (column < features)[None, :])
        return
    pieces += slot.to(tl.int64) * piece_stride
    widths = tl.load(pieces + tl.arange(0, MAX_PIECES) * at.PIECE + at.WIDTH).to(tl.int32)
    piece, local = find_block(widths, block, BLOCK_OUT)
    if piece == MAX_PIECES:
        return
    record = pieces + piece * at.PIECE
    column = local * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    # Two conditions: the first is decided when it is compiled.
    if SINGLE:  # noqa: SIM102
        if size == 1:
            token = first_token + tl.arange(0, 1)
            own = token < tokens
            total = low_rank_of_one(
                finished, record, weights, first_token, column, MAX_FINISHED, BLOCK_RANK
            )
            add_to_piece(
                out, out_stride, total, record, gates, token, own, floats, column, MAX_GATES
            )
            return
    token, own = load_tokens(steps, place, size, tokens, ORDER, TILE)
    total = low_rank(
        finished, record, weights, token, own, column, MAX_FINISHED, BLOCK_RANK, PRECISION
    )
    add_to_piece(out, out_stride, total, record, gates, token, own, floats, column, MAX_GATES)


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
    columns = triton.cdiv(features, config.columns) + config.max_pieces - 1
    expand_kernel[(config.tiles(tokens), columns)](
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
        BLOCK_OUT=config.columns,
        PRECISION="ieee" if out.element_size() == 4 else "tf32",
        num_warps=config.expand_warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
