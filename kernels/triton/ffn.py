"""FFN mixture: h = sum_e w_e u_e with u_e = act(W_gate x + d_gate,e) * (W_up x + d_up,e).

d_gate,e = B_gate,e A_gate,e x; the shrunk inputs A x and the gate weights come from the gate_up
linear's launches before. Where experts are DoRA, W_gate x and W_up x are multiplied by the
expert's factors. The same launch computes w_e A_down,e u_e for the down linear, in strips of the
intermediate: each program has a strip of its own, molehill.kernels.triton.gate adds them up.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.shrink import load_tile, load_tokens


@triton.jit
def activated(x: tl.tensor, kind: tl.tensor) -> tl.tensor:
    y = x
    if kind == at.SILU:
        y = x * tl.sigmoid(x)
    elif kind == at.GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif kind == at.GELU_TANH:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def add_delta(
    y: tl.tensor,
    rows: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    token: tl.tensor,
    own: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """y + B_e rows_e `[T, columns]`; `starts` points at expert e's first rank row."""
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    stop = tl.load(starts + 1)
    for start in range(tl.load(starts), stop, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        where = own[:, None] & (row < stop)[None, :]
        z = tl.load(rows + (token * MAX_FINISHED)[:, None] + row[None, :], mask=where, other=0.0)
        b = tl.load(
            weights + (row[:, None] * pitch + column[None, :]),
            mask=(row < stop)[:, None] & (column < width)[None, :],
            other=0.0,
        )
        y = tl.dot(z, b, y, input_precision=PRECISION)
    return y


@triton.jit
def rescaled(
    y: tl.tensor,
    floats: tl.tensor,
    scale: tl.tensor,
    bias: tl.tensor,
    e: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
) -> tl.tensor:
    """(y - bias) * factor_e + bias: DoRA's base output of expert e. scale, bias: places, or -1."""
    if scale >= 0:
        pitch = tl.cdiv(width, at.PITCH) * at.PITCH
        inside = column < width
        factor = tl.load(floats + scale + e * pitch + column, mask=inside, other=0.0)[None, :]
        if bias >= 0:
            own = tl.load(floats + bias + column, mask=inside, other=0.0)[None, :]
            y = (y - own) * factor + own
        else:
            y = y * factor
    return y


@triton.jit
def add_down(
    u: tl.tensor,
    w_e: tl.tensor,
    strip: tl.tensor,
    weights: tl.tensor,
    starts: tl.tensor,
    own: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
    BLOCK_RANK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Adds w_e A_down,e u_e to this program's strip; `strip` points at its tokens' rows."""
    pitch = tl.multiple_of(tl.cdiv(width, at.PITCH) * at.PITCH, at.PITCH)
    stop = tl.load(starts + 1)
    for start in range(tl.load(starts), stop, BLOCK_RANK):
        row = start + tl.arange(0, BLOCK_RANK)
        where = own[:, None] & (row < stop)[None, :]
        a = tl.load(
            weights + (row[None, :] * pitch + column[:, None]),
            mask=(row < stop)[None, :] & (column < width)[:, None],
            other=0.0,
        )
        sums = tl.dot(u.to(a.dtype), a, input_precision=PRECISION) * w_e[:, None]
        target = strip + row[None, :]
        sums += tl.load(target, mask=where, other=0.0)
        tl.store(target, sums, mask=where)


@triton.jit
def clear_strip(
    strip: tl.tensor,
    record: tl.tensor,
    w: tl.tensor,
    own: tl.tensor,
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
        tl.store(strip + row, value, mask=own[:, None] & (row < total))


@triton.jit(do_not_specialize=["tokens"])
def ffn_kernel(
    h: tl.tensor,
    gate_up: tl.tensor,
    steps: tl.tensor,
    records: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
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
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    slot, place, size, _ = load_tile(steps, LIST)
    if slot < 0:
        return
    token, own = load_tokens(steps, place, size, tokens, ORDER, TILE)
    slot = slot.to(tl.int64)
    record = records + slot * record_stride
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    if experts == 0:
        return
    number = tl.program_id(1)
    expert = tl.arange(0, MAX_EXPERTS)[None, :]
    weight = gates + (token * MAX_GATES + tl.load(record + at.GATE))[:, None] + expert
    w = tl.load(weight, mask=own[:, None] & (expert < experts), other=0.0)
    strip = (strips + (number * tokens + token) * MAX_RANK)[:, None]
    clear_strip(strip, record, w, own, number == 0, BLOCK_RANK)
    starts = ints + tl.load(record + at.STARTS)
    kind = tl.load(record + at.ACTIVATION)
    gate_rows = finished + tl.load(record + at.GATE_ROW)
    up_rows = finished + tl.load(record + at.UP_ROW)
    gate_b = weights + tl.multiple_of(tl.load(record + at.GATE_B), at.PITCH)
    up_b = weights + tl.multiple_of(tl.load(record + at.UP_B), at.PITCH)
    down_a = weights + tl.multiple_of(tl.load(record + at.DOWN_A), at.PITCH)
    span = tl.cdiv(tl.cdiv(width, tl.num_programs(1)), BLOCK) * BLOCK
    for begin in range(number * span, tl.minimum((number + 1) * span, width), BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = own[:, None] & (column < width)[None, :]
        source = gate_up + (token.to(tl.int64) * gate_up_stride)[:, None] + column[None, :]
        gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(source + width, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((TILE, BLOCK), dtype=tl.float32)
        for e in range(experts):
            w_e = tl.sum(tl.where((expert == e) & own[:, None], w, 0.0), axis=1)
            if tl.max(tl.abs(w_e), axis=0) > 0:
                first = starts + e
                g = add_delta(
                    rescaled(
                        gate,
                        floats,
                        tl.load(record + at.GATE_SCALE),
                        tl.load(record + at.GATE_BIAS),
                        e,
                        column,
                        width,
                    ),
                    gate_rows,
                    gate_b,
                    first,
                    token,
                    own,
                    column,
                    width,
                    MAX_FINISHED,
                    BLOCK_RANK,
                    PRECISION,
                )
                u = add_delta(
                    rescaled(
                        up,
                        floats,
                        tl.load(record + at.UP_SCALE),
                        tl.load(record + at.UP_BIAS),
                        e,
                        column,
                        width,
                    ),
                    up_rows,
                    up_b,
                    first + experts + 1,
                    token,
                    own,
                    column,
                    width,
                    MAX_FINISHED,
                    BLOCK_RANK,
                    PRECISION,
                )
                u = activated(g, kind) * u
                total += w_e[:, None] * u
                # The strip is this program's own, but other threads wrote what is read next.
                tl.debug_barrier()
                add_down(
                    u,
                    w_e,
                    strip,
                    down_a,
                    first + 2 * (experts + 1),
                    own,
                    column,
                    width,
                    BLOCK_RANK,
                    PRECISION,
                )
        target = h + (token.to(tl.int64) * h_stride)[:, None] + column[None, :]
        tl.store(target, total.to(h.dtype.element_ty), mask=inside)


def ffn(
    h: Tensor,
    gate_up: Tensor,
    steps: Tensor,
    records: Tensor,
    arena: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
    strips: Tensor,
    config: LaunchConfig,
) -> None:
    """Overwrites the FFN mixtures' rows of h `[T, I]` from gate_up `[T, 2 I]`; fills `strips`.

    records: the FFN's `[slots, FFN]`. arena: its flat views in the serving dtype, in float32 and in
    int32. scratch: what the gate_up linear's launches left.
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
        BLOCK_RANK=16,
        BLOCK=config.ffn_columns // (2 if precise else 1),
        PRECISION="ieee" if precise else "tf32",
        num_warps=config.ffn_warps,
        num_stages=2,
        maxnreg=MAX_REGISTERS,
    )
