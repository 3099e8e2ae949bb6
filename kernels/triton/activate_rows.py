"""Device code of activate: which rows a program has, and what the adapters do to gate and up."""

import triton
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.activations import gated
from molehill.kernels.triton.expand import product, scaled, with_added_bias


@triton.jit
def load_base_tokens(
    steps: tl.tensor,
    tile: tl.tensor,
    tokens: tl.tensor,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Tokens int32 `[TILE]` of the base's tile number `tile`, and which of them there are."""
    announced = tl.load(steps + at.ANNOUNCED)
    place = tl.load(steps + at.ADAPTED) + tile * TILE + tl.arange(0, TILE)
    token = tl.load(steps + ORDER + place, mask=place < announced, other=0)
    token = tl.where(place < announced, token, place)
    return token, token < tokens


@triton.jit
def adapted(
    source: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    half: tl.tensor,
    width: tl.tensor,
    starts: tl.tensor,
    widths: tl.tensor,
    pieces: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tl.tensor:
    """BLOCK columns of gate (half 0) or up (half 1) with B z, rounded as in memory: float32
    `[T, BLOCK]`.

    source: pointers to the rows of gate_up `[T, 1]`. first, stop: columns of the half, from the one
    up to the other. starts, widths `[pieces]`: the columns of the adapter's pieces, each of which
    begins where a half does.
    """
    column = first + tl.arange(0, BLOCK)
    target = source + half * width + column[None, :]
    inside = valid[:, None] & (column < stop)[None, :]
    y = tl.load(target, mask=inside, other=0.0).to(tl.float32)
    number = tl.arange(0, starts.shape[0])
    place = half * width + first
    has_columns = (starts <= place) & (place < starts + widths)
    piece = tl.max(tl.where(has_columns, number, -1), axis=0)
    if piece >= 0:
        record = pieces + piece * at.PIECE
        # A piece of the whole linear (Phi-3) has the up half after the gate half.
        skipped = tl.where(tl.load(record + at.START) == 0, half * width, 0)
        local = skipped + column
        total = product(
            finished, record, weights, token, valid, local, MAX_FINISHED, BLOCK_RANK, PRECISION
        )
        scale = tl.load(record + at.SCALE)
        changed = y
        if scale != at.PLAIN_PIECE:
            if scale >= 0:
                changed = scaled(y, record, gates, token, valid, floats, local, MAX_GATES)
            changed = with_added_bias(changed, record, floats, local)
        changed = (changed + total).to(source.dtype.element_ty).to(tl.float32)
        y = tl.where((local < tl.load(record + at.WIDTH).to(tl.int32))[None, :], changed, y)
    return y


@triton.jit
def activate_rows(
    h: tl.tensor,
    gate_up: tl.tensor,
    starts: tl.tensor,
    widths: tl.tensor,
    pieces: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    width: tl.tensor,
    h_stride: tl.tensor,
    gate_up_stride: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ROUNDED: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """BLOCK columns of h of an adapter's tokens."""
    first = tl.program_id(1) * BLOCK
    source = gate_up + (token.to(tl.int64) * gate_up_stride)[:, None]
    gate = adapted(
        source,
        first,
        width,
        0,
        width,
        starts,
        widths,
        pieces,
        finished,
        gates,
        weights,
        floats,
        token,
        valid,
        MAX_FINISHED,
        MAX_GATES,
        BLOCK_RANK,
        BLOCK,
        PRECISION,
    )
    up = adapted(
        source,
        first,
        width,
        1,
        width,
        starts,
        widths,
        pieces,
        finished,
        gates,
        weights,
        floats,
        token,
        valid,
        MAX_FINISHED,
        MAX_GATES,
        BLOCK_RANK,
        BLOCK,
        PRECISION,
    )
    value = gated(gate, up, h, ACTIVATION, ROUNDED)
    column = first + tl.arange(0, BLOCK)
    target = h + (token.to(tl.int64) * h_stride)[:, None] + column[None, :]
    inside = valid[:, None] & (column < width)[None, :]
    tl.store(target, value.to(h.dtype.element_ty), mask=inside)


@triton.jit
def add_to_strip_columns(
    gate_up: tl.tensor,
    starts: tl.tensor,
    widths: tl.tensor,
    pieces: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    width: tl.tensor,
    gate_up_stride: tl.tensor,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Adds B z to the columns [begin, end) of both halves, from which an FFN mixture's experts
    start. The same program reads them."""
    source = gate_up + (token.to(tl.int64) * gate_up_stride)[:, None]
    for first in range(begin, end, BLOCK):
        column = first + tl.arange(0, BLOCK)
        inside = valid[:, None] & (column < end)[None, :]
        for half in range(2):
            y = adapted(
                source,
                first,
                end,
                half,
                width,
                starts,
                widths,
                pieces,
                finished,
                gates,
                weights,
                floats,
                token,
                valid,
                MAX_FINISHED,
                MAX_GATES,
                BLOCK_RANK,
                BLOCK,
                PRECISION,
            )
            target = source + half * width + column[None, :]
            tl.store(target, y.to(gate_up.dtype.element_ty), mask=inside)
    # Other threads read what these have written.
    tl.debug_barrier()
