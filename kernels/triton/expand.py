"""Expand: y += B (w[owner] * (A x)), with w = route(logits), for every piece of a linear.

One launch for all slots. Where a piece has an output scale (DoRA), y is first replaced by
(y - bias) * sum_e w_e scale_e + bias. Every program routes its tile's tokens itself: that is E
exponentials a token, and saves a launch. Rank rows of experts that no token of the tile chose are
not read. Rows of UNSERVED tokens become 0.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.routing import count, route
from molehill.kernels.triton.shrink import load_tile


@triton.jit
def gate_weights(
    logits: tl.tensor,
    record: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    trace: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    TRACE: tl.constexpr,
) -> tl.tensor:
    """w `[T, MAX_EXPERTS]` of a piece or FFN. first: whether this program counts and traces.

    trace: float32 `[T, 2 MAX_GATES]`: p, then w; the kernel's own, not recomputed.
    """
    expert = tl.arange(0, MAX_EXPERTS)
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    gate = tl.load(record + at.GATE).to(tl.int32) + expert
    where = own[:, None] & (expert < experts)[None, :]
    sums = tl.zeros((token.shape[0], MAX_EXPERTS), dtype=tl.float32)
    for split in range(SPLITS):
        source = (split * tokens + token)[:, None] * MAX_GATES + gate[None, :]
        sums += tl.load(logits + source, mask=where, other=0.0)
    extra = tl.zeros((token.shape[0],), dtype=tl.float32)
    if tl.load(record + at.SCORES) == at.LEARNED:
        last = logits + tl.load(record + at.GATE) + experts
        for split in range(SPLITS):
            extra += tl.load(last + (split * tokens + token) * MAX_GATES, mask=own, other=0.0)
    p, w, entropy, soft = route(sums, extra, experts, record, parameters)
    if first:
        count(counters, w, entropy, soft, own)
        if TRACE:
            target = trace + (token * (2 * MAX_GATES))[:, None] + gate[None, :]
            tl.store(target, p, mask=where)
            tl.store(target + MAX_GATES, w, mask=where)
    return w


@triton.jit
def find_piece(
    pieces: tl.tensor, pieces_count: tl.tensor, block: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Piece that output block `block` belongs to, or -1, and the block's number within it."""
    found = tl.full((), -1, tl.int32)
    local = block
    for i in range(pieces_count):
        blocks = tl.cdiv(tl.load(pieces + i * at.PIECE + at.WIDTH).to(tl.int32), BLOCK)
        hit = (found < 0) & (local < blocks)
        local = tl.where((found < 0) & (local >= blocks), local - blocks, local)
        found = tl.where(hit, i, found)
    return found, local


@triton.jit
def low_rank(
    rows: tl.tensor,
    record: tl.tensor,
    w: tl.tensor,
    weights: tl.tensor,
    owners: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    tokens: tl.tensor,
    column: tl.tensor,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """B (w[owner] * rows) at a piece's outputs `column`: float32 `[T, columns]`."""
    rank = tl.load(record + at.RANK).to(tl.int32)
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    b_first = tl.multiple_of(tl.load(record + at.B), at.PITCH)
    owner_first = tl.load(record + at.OWNER)
    source = (token * MAX_RANK + tl.load(record + at.ROW).to(tl.int32))[:, None]
    total = tl.zeros((token.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        owner = tl.load(owners + owner_first + row, mask=row < rank, other=0)
        index = tl.broadcast_to(owner[None, :], (token.shape[0], BLOCK_RANK))
        gate = tl.gather(w, index, axis=1)
        gate = tl.where(own[:, None] & (row < rank)[None, :], gate, 0.0)
        used = tl.max(tl.abs(gate), axis=0) > 0
        if tl.max(used.to(tl.int32), axis=0) > 0:
            sums = tl.zeros((token.shape[0], BLOCK_RANK), dtype=tl.float32)
            for split in range(SPLITS):
                at_split = rows + split * tokens * MAX_RANK
                where = own[:, None] & used[None, :]
                sums += tl.load(at_split + source + row[None, :], mask=where, other=0.0)
            b = tl.load(
                weights + b_first + (row[:, None] * pitch + column[None, :]),
                mask=used[:, None] & (column < width)[None, :],
                other=0.0,
            )
            total = tl.dot((sums * gate).to(b.dtype), b, total, input_precision=PRECISION)
    return total


@triton.jit
def scaled(
    y: tl.tensor, record: tl.tensor, w: tl.tensor, floats: tl.tensor, column: tl.tensor
) -> tl.tensor:
    """(y - bias) * sum_e w_e scale_e + bias, for a piece with an output scale."""
    width = tl.load(record + at.WIDTH).to(tl.int32)
    pitch = tl.cdiv(width, at.PITCH) * at.PITCH
    expert = tl.arange(0, w.shape[1])[None, :]
    scale = tl.load(record + at.SCALE)
    factor = tl.zeros_like(y)
    for e in range(tl.maximum(tl.load(record + at.EXPERTS).to(tl.int32), 1)):
        w_e = tl.sum(tl.where(expert == e, w, 0.0), axis=1)
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
    heads: tl.tensor,
    pieces: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    rows: tl.tensor,
    logits: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    owners: tl.tensor,
    trace: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    out_stride: tl.tensor,
    head_stride: tl.tensor,
    piece_stride: tl.tensor,
    parameter_stride: tl.tensor,
    counter_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TRACE: tl.constexpr,
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
    slot = slot.to(tl.int64)
    pieces_count = tl.load(heads + slot * head_stride + at.HEAD_PIECES).to(tl.int32)
    pieces += slot * piece_stride
    piece, local = find_piece(pieces, pieces_count, block, BLOCK_OUT)
    if piece < 0:
        return
    record = pieces + piece * at.PIECE
    w = tl.full((TILE, MAX_EXPERTS), 1.0, dtype=tl.float32)
    if tl.load(record + at.EXPERTS) > 0:
        w = gate_weights(
            logits,
            record,
            parameters + slot * parameter_stride + piece * at.POLICY,
            counters + slot * counter_stride + piece * (MAX_EXPERTS + at.FIGURES),
            trace,
            token,
            own,
            tokens,
            local == 0,
            MAX_GATES,
            MAX_EXPERTS,
            SPLITS,
            TRACE,
        )
        # Rows of a shared pair belong to the expert after the last.
        shared = tl.arange(0, MAX_EXPERTS) >= tl.load(record + at.EXPERTS)
        w = tl.where(shared[None, :], 1.0, w)
    column = local * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    inside = own[:, None] & (column < tl.load(record + at.WIDTH).to(tl.int32))[None, :]
    total = low_rank(
        rows,
        record,
        w,
        weights,
        owners,
        token,
        own,
        tokens,
        column,
        MAX_RANK,
        SPLITS,
        BLOCK_RANK,
        PRECISION,
    )
    target = out_row + tl.load(record + at.START) + column[None, :]
    y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    if tl.load(record + at.SCALE) >= 0:
        y = scaled(y, record, w, floats, column)
    tl.store(target, (y + total).to(out.dtype.element_ty), mask=inside)


def expand(
    out: Tensor,
    steps: Tensor,
    records: tuple[Tensor, Tensor, Tensor, Tensor],
    arena: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
    config: LaunchConfig,
    trace: Tensor | None,
) -> None:
    """Changes out `[T, out]` in place.

    records: the linear's heads `[slots, HEAD]`, pieces `[slots, pieces, PIECE]`, parameters
    `[slots, pieces, POLICY]` and counters. arena: its flat views in the serving dtype, float32 and
    int32.
    """
    tokens, features = out.shape
    heads, pieces, parameters, counters = records
    weights, floats, owners = arena
    columns = triton.cdiv(features, config.columns) + config.max_pieces - 1
    expand_kernel[(config.tiles(tokens), columns)](
        out,
        steps,
        heads,
        pieces,
        parameters,
        counters,
        scratch.rows,
        scratch.logits,
        weights,
        floats,
        owners,
        scratch.logits if trace is None else trace,
        tokens,
        features,
        out.stride(0),
        heads.stride(0),
        pieces.stride(0),
        parameters.stride(0),
        counters.stride(0),
        MAX_RANK=config.max_rank,
        MAX_GATES=config.max_gates,
        MAX_EXPERTS=config.max_experts,
        SPLITS=scratch.splits,
        LIST=config.tile_list,
        TILE=config.tile,
        BLOCK_RANK=config.expand_rank,
        BLOCK_OUT=config.columns,
        PRECISION="ieee" if out.element_size() == 4 else "tf32",
        TRACE=trace is not None,
        num_warps=config.warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
