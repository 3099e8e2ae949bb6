"""Gate: routes every token once, and finishes its rank rows: w[owner] * (A x) in the serving dtype.

The launch between shrink and expand. A program has some rank rows of one piece for one tile: it
adds up the splits of the rows and of the piece's logits, routes, and multiplies. Of a tile that
routes first it computes A x itself, of the rank rows of chosen experts. The programs of a piece's
first rows count, and write the gate weights for what needs more than finished rows (DoRA's output
scales, an FFN mixture). Nothing here depends on the base's output: like shrink it may run beside
the base's GEMM.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.routing import count, route
from molehill.kernels.triton.shrink import load_tile, load_tokens, project_one, routes_first


@triton.jit
def find_block(
    sizes: tl.tensor, block: tl.tensor, BLOCK: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Of blocks of BLOCK that sizes `[pieces]` are cut into, one after another: the piece of block
    number `block`, and the block's number in it."""
    blocks = tl.cdiv(sizes, BLOCK)
    piece = tl.sum((tl.cumsum(blocks, axis=0) <= block).to(tl.int32), axis=0)
    number = tl.arange(0, sizes.shape[0])
    return piece, block - tl.sum(tl.where(number < piece, blocks, 0), axis=0)


@triton.jit
def mlp_output(
    logits: tl.tensor,
    record: tl.tensor,
    floats: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    MAX_GATES: tl.constexpr,
    LOGIT_SPLITS: tl.constexpr,
) -> tl.tensor:
    """c relu(h + b) of the HIDDEN router rows after a piece's experts: float32 `[T]`."""
    hidden = tl.load(record + at.HIDDEN).to(tl.int32)
    pitch = tl.cdiv(hidden, at.PITCH) * at.PITCH
    biases = floats + tl.load(record + at.MLP)
    first = (tl.load(record + at.GATE) + tl.load(record + at.EXPERTS)).to(tl.int32)
    total = tl.zeros((token.shape[0],), dtype=tl.float32)
    for start in range(0, hidden, 32):
        unit = start + tl.arange(0, 32)
        where = valid[:, None] & (unit < hidden)[None, :]
        h = tl.zeros((token.shape[0], 32), dtype=tl.float32)
        for i in range(LOGIT_SPLITS):
            source = (i * tokens + token)[:, None] * MAX_GATES + first + unit[None, :]
            h += tl.load(logits + source, mask=where, other=0.0)
        b = tl.load(biases + unit, mask=unit < hidden, other=0.0)
        c = tl.load(biases + pitch + unit, mask=unit < hidden, other=0.0)
        total += tl.sum(c[None, :] * tl.maximum(h + b[None, :], 0.0), axis=1)
    return total


@triton.jit
def gate_weights(
    logits: tl.tensor,
    record: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    floats: tl.tensor,
    gates: tl.tensor,
    trace: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    tokens: tl.tensor,
    first: tl.tensor,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    LOGIT_SPLITS: tl.constexpr,
    TRACE: tl.constexpr,
) -> tl.tensor:
    """w `[T, MAX_EXPERTS]` of a piece. first: whether this program counts, writes w and traces.

    gates: float32 `[T, MAX_GATES]`, w in the columns of the logits. trace: float32
    `[T, 2 MAX_GATES]`: p, then w; the kernel's own, not recomputed.
    """
    expert = tl.arange(0, MAX_EXPERTS)
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    gate = tl.load(record + at.GATE).to(tl.int32) + expert
    where = valid[:, None] & (expert < experts)[None, :]
    sums = tl.zeros((token.shape[0], MAX_EXPERTS), dtype=tl.float32)
    for split in tl.static_range(LOGIT_SPLITS):
        source = (split * tokens + token)[:, None] * MAX_GATES + gate[None, :]
        sums += tl.load(logits + source, mask=where, other=0.0)
    extra = tl.zeros((token.shape[0],), dtype=tl.float32)
    scores = tl.load(record + at.SCORES)
    if scores == at.SPARSE:
        extra = mlp_output(logits, record, floats, token, valid, tokens, MAX_GATES, LOGIT_SPLITS)
    elif scores == at.LEARNED:
        last = logits + tl.load(record + at.GATE) + experts
        for i in range(LOGIT_SPLITS):
            extra += tl.load(last + (i * tokens + token) * MAX_GATES, mask=valid, other=0.0)
    p, w, entropy, soft = route(sums, extra, experts, record, parameters)
    if first:
        count(counters, w, entropy, soft, valid)
        tl.store(gates + (token * MAX_GATES)[:, None] + gate[None, :], w, mask=where)
        if TRACE:
            target = trace + (token * (2 * MAX_GATES))[:, None] + gate[None, :]
            tl.store(target, p, mask=where)
            tl.store(target + MAX_GATES, w, mask=where)
    return w


@triton.jit
def list_pairs(
    pairs: tl.tensor,
    record: tl.tensor,
    w: tl.tensor,
    valid: tl.tensor,
    place: tl.tensor,
    first: tl.tensor,
) -> None:
    """A tile's (token, expert) pairs with a gate weight, if the piece is an FFN mixture's: their
    number, then of each the token's number in the tile times MAX_EXPERTS, plus the expert.

    pairs: int32, the tile's are at its first place times MAX_EXPERTS + 1.
    """
    if first & (tl.load(record + at.UNGATED) != 0):
        size: tl.constexpr = w.shape[0] * w.shape[1]
        there = tl.reshape((w != 0) & valid[:, None], (size,)).to(tl.int32)
        target = pairs + place * (w.shape[1] + 1)
        tl.store(target + tl.cumsum(there, axis=0), tl.arange(0, size), mask=there != 0)
        tl.store(target, tl.sum(there, axis=0))


@triton.jit
def mixed_rows(
    strips: tl.tensor,
    row: tl.tensor,
    where: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    shrunk: tl.tensor,
    parts: tl.tensor,
    MAX_RANK: tl.constexpr,
) -> tl.tensor:
    """Rank rows that an FFN mixture has left in strips, float32 `[T, row]`: those from row number
    `shrunk` of the linear on; 0 for others."""
    there = where & (row >= shrunk)[None, :]
    sums = tl.zeros(where.shape, dtype=tl.float32)
    # Several loads at a time are under way: there may be a hundred strips.
    end = tl.full(row.shape, parts, tl.int32)
    for part in range(0, tl.where(tl.max(row, axis=0) >= shrunk, parts, 0), 8):
        for i in tl.static_range(8):
            source = ((part + i) * tokens + token)[:, None] * MAX_RANK + (row - shrunk)[None, :]
            sums += tl.load(strips + source, mask=there & (part + i < end)[None, :], other=0.0)
    return sums


@triton.jit
def row_gates(
    w: tl.tensor, owners: tl.tensor, record: tl.tensor, row: tl.tensor, rank: tl.tensor
) -> tl.tensor:
    """w `[T, E]` of the expert that owns each rank row of a piece: `[T, row]`."""
    owner = tl.load(owners + tl.load(record + at.OWNER) + row, mask=row < rank, other=0)
    index = tl.broadcast_to(tl.maximum(owner, 0)[None, :], (w.shape[0], row.shape[0]))
    gate = tl.where((owner == at.EVERY_TOKEN)[None, :], 1.0, tl.gather(w, index, axis=1))
    if tl.load(record + at.UNGATED) != 0:
        gate = tl.where(gate == 0, 0.0, 1.0)
    return tl.where((row < rank)[None, :], gate, 0.0)


@triton.jit
def store_finished(
    finished: tl.tensor,
    record: tl.tensor,
    sums: tl.tensor,
    gate: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    valid: tl.tensor,
    MAX_FINISHED: tl.constexpr,
) -> None:
    """Rank rows `row` of a piece times their gates, and zeros up to the next multiple of PITCH."""
    # A row of an expert that is not chosen is 0, whatever its sum is.
    z = tl.where(gate == 0, 0.0, sums * gate)
    place = tl.multiple_of(tl.load(record + at.FINISHED).to(tl.int32), at.PITCH)
    stop = tl.cdiv(tl.load(record + at.RANK).to(tl.int32), at.PITCH) * at.PITCH
    target = finished + (token * MAX_FINISHED)[:, None] + place + row[None, :]
    tl.store(target, z.to(finished.dtype.element_ty), mask=valid[:, None] & (row < stop)[None, :])


@triton.jit(do_not_specialize=["tokens", "parts"])
def gate_kernel(
    x: tl.tensor,
    steps: tl.tensor,
    heads: tl.tensor,
    pieces: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    weights: tl.tensor,
    floats: tl.tensor,
    owners: tl.tensor,
    rows: tl.tensor,
    logits: tl.tensor,
    strips: tl.tensor,
    finished: tl.tensor,
    gates: tl.tensor,
    pairs: tl.tensor,
    trace: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    features: tl.tensor,
    x_stride: tl.tensor,
    head_stride: tl.tensor,
    piece_stride: tl.tensor,
    parameter_stride: tl.tensor,
    counter_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_FINISHED: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    COUNTERS: tl.constexpr,
    SPLITS: tl.constexpr,
    LOGIT_SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    SINGLE_RANK: tl.constexpr,
    SINGLE_IN: tl.constexpr,
    MIXED: tl.constexpr,
    PAIRS: tl.constexpr,
    TRACE: tl.constexpr,
) -> None:
    slot, place, size, first_token = load_tile(steps, LIST)
    if slot < 0:
        return
    slot = slot.to(tl.int64)
    pieces += slot * piece_stride
    parameters += slot * parameter_stride
    counters += slot * counter_stride
    head = heads + slot * head_stride
    every = pieces + tl.arange(0, MAX_PIECES) * at.PIECE
    # A router without rank rows of its own decides and counts all the same.
    sizes = tl.load(every + at.RANK).to(tl.int32)
    sizes = tl.maximum(sizes, (tl.load(every + at.EXPERTS) > 0).to(tl.int32))
    shrunk = tl.load(head + at.HEAD_RANK).to(tl.int32)
    # Two conditions: the first is decided when it is compiled.
    if SINGLE:  # noqa: SIM102
        if routes_first(steps, size):
            token = first_token + tl.arange(0, 1)
            valid = token < tokens
            x_one = x + first_token.to(tl.int64) * x_stride
            a = weights + tl.multiple_of(tl.load(head + at.HEAD_A), at.PITCH)
            pitch = tl.multiple_of(tl.cdiv(features, at.PITCH) * at.PITCH, at.PITCH)
            blocks = tl.sum(tl.cdiv(sizes, SINGLE_RANK), axis=0)
            for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
                piece, local = find_block(sizes, block, SINGLE_RANK)
                record = pieces + piece * at.PIECE
                row = local * SINGLE_RANK + tl.arange(0, SINGLE_RANK)
                rank = tl.load(record + at.RANK).to(tl.int32)
                gate = tl.where((row < rank)[None, :], 1.0, 0.0)
                if tl.load(record + at.EXPERTS) > 0:
                    w = gate_weights(
                        logits,
                        record,
                        parameters + piece * at.POLICY,
                        counters + piece * COUNTERS,
                        floats,
                        gates,
                        trace,
                        token,
                        valid,
                        tokens,
                        local == 0,
                        MAX_GATES,
                        MAX_EXPERTS,
                        LOGIT_SPLITS,
                        TRACE,
                    )
                    gate = row_gates(w, owners, record, row, rank)
                    if PAIRS:
                        list_pairs(pairs, record, w, valid, place, local == 0)
                stacked = tl.load(record + at.ROW).to(tl.int32) + row
                used = (tl.max(tl.abs(gate), axis=0) > 0) & (stacked < shrunk)
                # Nothing is read where no row of the block is used.
                end = tl.where(tl.max(used.to(tl.int32), axis=0) > 0, features, 0)
                sums = project_one(x_one, a + stacked * pitch, used, 0, end, SINGLE_IN)[None, :]
                if MIXED:
                    where = valid[:, None] & (row < rank)[None, :]
                    sums += mixed_rows(
                        strips, stacked, where, token, tokens, shrunk, parts, MAX_RANK
                    )
                store_finished(finished, record, sums, gate, row, token, valid, MAX_FINISHED)
            return
    token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
    blocks = tl.sum(tl.cdiv(sizes, BLOCK_RANK), axis=0)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        piece, local = find_block(sizes, block, BLOCK_RANK)
        record = pieces + piece * at.PIECE
        row = local * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        rank = tl.load(record + at.RANK).to(tl.int32)
        stacked = tl.load(record + at.ROW).to(tl.int32) + row
        where = valid[:, None] & (row < rank)[None, :]
        sums = tl.zeros((TILE, BLOCK_RANK), dtype=tl.float32)
        for split in tl.static_range(SPLITS):
            source = (split * tokens + token)[:, None] * MAX_RANK + stacked[None, :]
            sums += tl.load(rows + source, mask=where & (stacked < shrunk)[None, :], other=0.0)
        if MIXED:
            sums += mixed_rows(strips, stacked, where, token, tokens, shrunk, parts, MAX_RANK)
        gate = tl.where((row < rank)[None, :], tl.full((TILE, 1), 1.0, tl.float32), 0.0)
        if tl.load(record + at.EXPERTS) > 0:
            w = gate_weights(
                logits,
                record,
                parameters + piece * at.POLICY,
                counters + piece * COUNTERS,
                floats,
                gates,
                trace,
                token,
                valid,
                tokens,
                local == 0,
                MAX_GATES,
                MAX_EXPERTS,
                LOGIT_SPLITS,
                TRACE,
            )
            gate = row_gates(w, owners, record, row, rank)
            if PAIRS:
                list_pairs(pairs, record, w, valid, place, local == 0)
        store_finished(finished, record, sums, gate, row, token, valid, MAX_FINISHED)


def gate(
    x: Tensor,
    steps: Tensor,
    records: tuple[Tensor, Tensor, Tensor, Tensor],
    arena: tuple[Tensor, Tensor, Tensor],
    scratch: Scratch,
    config: LaunchConfig,
    mixed: Tensor | None,
    pairs: Tensor | None,
    trace: Tensor | None,
) -> None:
    """Fills `scratch.finished` and `scratch.gates` from x `[T, in]` and what shrink left.

    records: the linear's heads `[slots, HEAD]`, pieces `[slots, pieces, PIECE]`, parameters
    `[slots, pieces, POLICY]` and counters. arena: its flat views in the serving dtype, in float32
    and in int32. mixed: the strips of an FFN mixture, for its down linear. pairs: int32
    `[T * (experts + 1)]`, to be filled for one of a gate_up linear.
    """
    tokens, features = x.shape
    heads, pieces, parameters, counters = records
    weights, floats, owners = arena
    gate_kernel[(config.tiles(tokens), config.route_programs)](
        x,
        steps,
        heads,
        pieces,
        parameters,
        counters,
        weights,
        floats,
        owners,
        scratch.rows,
        scratch.logits,
        scratch.rows if mixed is None else mixed,
        scratch.finished,
        scratch.gates,
        owners if pairs is None else pairs,
        scratch.logits if trace is None else trace,
        tokens,
        1 if mixed is None else mixed.shape[0],
        features,
        x.stride(0),
        heads.stride(0),
        pieces.stride(0),
        parameters.stride(0),
        counters.stride(0),
        MAX_RANK=config.max_rank,
        MAX_FINISHED=config.max_finished,
        MAX_GATES=config.max_gates,
        MAX_EXPERTS=config.max_experts,
        MAX_PIECES=config.max_pieces,
        COUNTERS=counters.stride(1),
        SPLITS=scratch.splits,
        LOGIT_SPLITS=scratch.logits.shape[0],
        LIST=config.tile_list,
        ORDER=config.order,
        TILE=config.tile,
        SINGLE=config.single,
        BLOCK_RANK=config.route_rank,
        SINGLE_RANK=config.single_rank,
        SINGLE_IN=config.single_inputs // (2 if x.element_size() == 4 else 1),
        MIXED=mixed is not None,
        PAIRS=pairs is not None,
        TRACE=trace is not None,
        num_warps=config.gate_warps,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
    )
