"""FFN mixture: h = sum_e w_e u_e with u_e = act(W_gate x + d_gate,e) * (W_up x + d_up,e).

d_gate,e = B_gate,e A_gate,e x; the shrunk inputs A x and the gate weights come from the gate_up
linear's launches before. Where experts are DoRA, W_gate x and W_up x are multiplied by the
expert's factors. The same launch computes w_e A_down,e u_e for the down linear, in strips of the
intermediate: each program has a strip of its own, molehill.kernels.triton.gate adds them up.

The work goes by (token, expert) pairs, which gate has listed for each tile: nothing is computed for
an expert that a token did not choose. Rows of a matrix product are pairs; rank rows of all experts
are its inner dimension, and a pair's are 0 outside of its expert's, so that one product serves all
experts. Another product, with ones where a pair is a token's, adds pairs up to tokens.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.activations import activated
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.shrink import load_tile, load_tokens


@triton.jit
def delta(
    finished: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    token: tl.tensor,
    expert: tl.tensor,
    there: tl.tensor,
    experts: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """B_e A_e x of each pair's expert: float32 `[pairs, columns]`.

    One product for all experts: a pair's rank rows are 0 outside of its expert's. starts: int32
    `[experts + 1]`, the first rank row of each expert.
    """
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    begin = tl.load(starts + expert, mask=there, other=0)
    end = tl.load(starts + expert + 1, mask=there, other=0)
    rank = tl.load(starts + experts)
    total = tl.zeros((token.shape[0], column.shape[0]), dtype=tl.float32)
    for start in range(0, rank, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)[None, :]
        where = (row >= begin[:, None]) & (row < end[:, None])
        used = tl.max(where.to(tl.int32), axis=0) > 0
        z = tl.load(finished + (token * MAX_FINISHED)[:, None] + row, mask=where, other=0.0)
        row = start + tl.arange(0, BLOCK_RANK)[:, None]
        inside = used[:, None] & (column < pitch)[None, :]
        b = tl.load(weights + row * pitch + column[None, :], mask=inside, other=0.0)
        total = tl.dot(z, b, total, input_precision=PRECISION)
    return total


@triton.jit
def rescaled(
    y: tl.tensor,
    floats: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    expert: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """(y - bias) * factor_e + bias `[pairs, columns]`: DoRA's base output of each pair's expert.
    scale, bias: places, or -1."""
    if scale >= 0:
        pitch = tl.cdiv(width, at.PITCH) * at.PITCH
        inside = (column < width)[None, :]
        place = (expert * pitch)[:, None] + column[None, :]
        factor = tl.load(floats + scale + place, mask=inside, other=0.0)
        if bias >= 0:
            base_bias = tl.load(floats + bias + column[None, :], mask=inside, other=0.0)
            y = (y - base_bias) * factor + base_bias
        else:
            y = y * factor
    return y


@triton.jit
def down_rows(
    u: tl.tensor,
    w: tl.tensor,
    chosen: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    start: tl.tensor,
    weights: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """w_e A_down,e u_e, rank rows from `start` on, of these columns: float32 `[T, BLOCK_RANK]`.

    u `[pairs, columns]`, w `[pairs]`; begin, end: the rank rows of each pair's expert. chosen:
    float32 `[T, pairs]`, 1 for the pairs of a token.
    """
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    row = (start + tl.arange(0, BLOCK_RANK))[None, :]
    where = (row >= begin[:, None]) & (row < end[:, None])
    used = tl.max(where.to(tl.int32), axis=0) > 0
    inside = used[None, :] & (column < pitch)[:, None]
    a = tl.load(weights + row * pitch + column[:, None], mask=inside, other=0.0)
    sums = tl.dot(u.to(a.dtype), a, input_precision=PRECISION)
    return tl.dot(chosen, tl.where(where, sums * w[:, None], 0.0), input_precision=PRECISION)


@triton.jit
def add_to_strip(
    strip: tl.tensor, sums: tl.tensor, valid: tl.tensor, start: tl.tensor, stop: tl.tensor
) -> None:
    """Adds `sums` to rank rows from `start` on of a program's own strip `[T, MAX_RANK]`."""
    row = (start + tl.arange(0, sums.shape[1]))[None, :]
    where = valid[:, None] & (row < stop)
    # Other threads may have written what is read.
    tl.debug_barrier()
    tl.store(strip + row, sums + tl.load(strip + row, mask=where, other=0.0), mask=where)


@triton.jit
def clear_strip(
    strip: tl.tensor,
    record: tl.tensor,
    w: tl.tensor,
    valid: tl.tensor,
    first: tl.tensor,
    BLOCK_RANK: tl.constexpr,
) -> None:
    """Zeros for this program's sums; the row of a bias is (sum_e w_e - 1), in strip 0."""
    rank = tl.load(record + at.DOWN_RANK).to(tl.int32)
    total = rank + tl.load(record + at.DOWN_BIAS).to(tl.int32)
    surplus = tl.where(first, tl.sum(w, axis=1) - 1.0, 0.0)[:, None]
    for start in range(0, total, BLOCK_RANK):
        row = (start + tl.arange(0, BLOCK_RANK))[None, :]
        value = tl.where(row == rank, surplus, 0.0)
        tl.store(strip + row, value, mask=valid[:, None] & (row < total))


@triton.jit
def strip_columns(width: tl.tensor, parts: tl.tensor, BLOCK: tl.constexpr) -> tl.tensor:
    """Columns of each of `parts` strips, a multiple of BLOCK; the last strips may have fewer."""
    return tl.cdiv(tl.cdiv(width, parts), BLOCK) * BLOCK


@triton.jit
def mix_experts(
    h: tl.tensor,
    gate_up: tl.tensor,
    steps: tl.tensor,
    record: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    pairs: tl.tensor,
    strips: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    width: tl.tensor,
    h_stride: tl.tensor,
    gate_up_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """One tile's rows of h, and w_e A_down,e u_e, of this program's strip: program_id(1) of
    `parts`. record: of a slot that has an FFN mixture."""
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
    number = tl.program_id(1)
    every = tl.arange(0, MAX_EXPERTS)[None, :]
    gate = tl.load(record + at.GATE)
    weight = gates + (token * MAX_GATES + gate)[:, None] + every
    w = tl.load(weight, mask=valid[:, None] & (every < experts), other=0.0)
    strip = (strips + (number * tokens + token) * MAX_RANK)[:, None]
    clear_strip(strip, record, w, valid, number == 0, BLOCK_RANK)
    starts = ints + tl.load(record + at.STARTS)
    up_starts = starts + experts + 1
    down_starts = up_starts + experts + 1
    kind = tl.load(record + at.ACTIVATION)
    gate_scale = tl.load(record + at.GATE_SCALE)
    gate_bias = tl.load(record + at.GATE_BIAS)
    up_scale = tl.load(record + at.UP_SCALE)
    up_bias = tl.load(record + at.UP_BIAS)
    gate_rows = finished + tl.load(record + at.GATE_ROW)
    up_rows = finished + tl.load(record + at.UP_ROW)
    gate_b = weights + tl.multiple_of(tl.load(record + at.GATE_B), at.PITCH)
    up_b = weights + tl.multiple_of(tl.load(record + at.UP_B), at.PITCH)
    down_a = weights + tl.multiple_of(tl.load(record + at.DOWN_A), at.PITCH)
    down_rank = tl.load(record + at.DOWN_RANK).to(tl.int32)
    pairs += place * (MAX_EXPERTS + 1)
    count = tl.load(pairs)
    span = strip_columns(width, parts, BLOCK)
    down = tl.zeros((TILE, BLOCK_RANK), dtype=tl.float32)
    for begin in range(number * span, tl.minimum((number + 1) * span, width), BLOCK):
        column = begin + tl.arange(0, BLOCK)
        total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        for first in range(0, count, PAIR_TILE):
            j = first + tl.arange(0, PAIR_TILE)
            pair = tl.load(pairs + 1 + j, mask=j < count, other=0)
            there = j < count
            local, expert = pair // MAX_EXPERTS, pair % MAX_EXPERTS
            pair_token = tl.load(steps + ORDER + place + local, mask=there, other=0)
            w_pair = tl.load(gates + pair_token * MAX_GATES + gate + expert, mask=there, other=0.0)
            inside = there[:, None] & (column < width)[None, :]
            source = gate_up + (pair_token.to(tl.int64) * gate_up_stride)[:, None]
            g = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
            g = rescaled(g, floats, gate_scale, gate_bias, expert, column, width)
            g += delta(
                gate_rows,
                gate_b,
                starts,
                pair_token,
                expert,
                there,
                experts,
                column,
                width,
                MAX_FINISHED,
                BLOCK_RANK,
                PRECISION,
            )
            g = activated(g, kind)
            u = tl.load(source + width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            u = rescaled(u, floats, up_scale, up_bias, expert, column, width)
            u += delta(
                up_rows,
                up_b,
                up_starts,
                pair_token,
                expert,
                there,
                experts,
                column,
                width,
                MAX_FINISHED,
                BLOCK_RANK,
                PRECISION,
            )
            u *= g
            is_pair_of_token = (tl.arange(0, TILE)[:, None] == local[None, :]) & there[None, :]
            chosen = tl.where(is_pair_of_token, 1.0, 0.0)
            total = tl.dot(chosen, u * w_pair[:, None], total, input_precision=PRECISION)
            row_begin = tl.load(down_starts + expert, mask=there, other=0)
            row_end = tl.load(down_starts + expert + 1, mask=there, other=0)
            down += down_rows(
                u,
                w_pair,
                chosen,
                row_begin,
                row_end,
                0,
                down_a,
                column,
                width,
                BLOCK_RANK,
                PRECISION,
            )
            for start in range(BLOCK_RANK, down_rank, BLOCK_RANK):
                further = down_rows(
                    u,
                    w_pair,
                    chosen,
                    row_begin,
                    row_end,
                    start,
                    down_a,
                    column,
                    width,
                    BLOCK_RANK,
                    PRECISION,
                )
                add_to_strip(strip, further, valid, start, down_rank)
        target = h + (token.to(tl.int64) * h_stride)[:, None] + column[None, :]
        inside = valid[:, None] & (column < width)[None, :]
        tl.store(target, total.to(h.dtype.element_ty), mask=inside)
    add_to_strip(strip, down, valid, 0, down_rank)


@triton.jit(do_not_specialize=["tokens"])
def ffn_kernel(
    h: tl.tensor,
    gate_up: tl.tensor,
    steps: tl.tensor,
    records: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    pairs: tl.tensor,
    strips: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    ints: tl.tensor,
    tokens: tl.tensor,
    width: tl.tensor,
    h_stride: tl.tensor,
    gate_up_stride: tl.tensor,
    record_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    LIST: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    PAIR_TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    slot, place, size, _ = load_tile(steps, LIST)
    if slot < 0:
        return
    record = records + slot.to(tl.int64) * record_stride
    if tl.load(record + at.EXPERTS) == 0:
        return
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
        tl.num_programs(1),
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
        BLOCK_RANK,
        BLOCK,
        PRECISION,
    )


def ffn(
    h: Tensor,
    gate_up: Tensor,
    steps: Tensor,
    records: Tensor,
    arena: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
    pairs: Tensor,
    strips: Tensor,
    config: LaunchConfig,
) -> None:
    """Overwrites the FFN mixtures' rows of h `[T, I]` from gate_up `[T, 2 I]`; fills `strips`.

    records: the FFN's `[slots, FFN]`. arena: its flat views in the serving dtype, in float32 and in
    int32. scratch, pairs: what the gate_up linear's launches left.
    """
    tokens, width = h.shape
    weights, floats, ints = arena
    precise = h.element_size() == 4
    ffn_kernel[(config.tiles(tokens), strips.shape[0])](
        h,
        gate_up,
        steps,
        records,
        scratch.finished,
        scratch.gates,
        pairs,
        strips,
        weights,
        floats,
        ints,
        tokens,
        width,
        h.stride(0),
        gate_up.stride(0),
        records.stride(0),
        MAX_RANK=config.max_rank,
        MAX_FINISHED=config.max_finished,
        MAX_GATES=config.max_gates,
        MAX_EXPERTS=config.max_experts,
        LIST=config.tile_list,
        ORDER=config.order,
        TILE=config.tile,
        PAIR_TILE=16 if precise else config.pair_tile,
        BLOCK_RANK=16 if precise else config.ffn_rank,
        BLOCK=config.ffn_columns // (2 if precise else 1),
        PRECISION="ieee" if precise else "tf32",
        num_warps=config.ffn_warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
