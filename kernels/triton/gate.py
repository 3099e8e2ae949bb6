"""Gate: routes every token once, and finishes its rank rows: w[owner] * (A x) in the serving dtype.

The launch between shrink and expand. A program has some rank rows of one piece for one tile: it
adds up the splits of the rows and of the piece's logits, routes, and multiplies. The programs of a
piece's first rows count, and write the gate weights for what needs more than gated rows (DoRA's
output scales, an FFN mixture). Nothing here depends on the base's output: like shrink it may run
beside the base's GEMM.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch
from molehill.kernels.triton.routing import count, route
from molehill.kernels.triton.shrink import load_tile


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
def gate_weights(
    logits: tl.tensor,
    record: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    gates: tl.tensor,
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
    """w `[T, MAX_EXPERTS]` of a piece. first: whether this program counts, writes w and traces.

    gates: float32 `[T, MAX_GATES]`, w in the columns of the logits. trace: float32
    `[T, 2 MAX_GATES]`: p, then w; the kernel's own, not recomputed.
    """
    expert = tl.arange(0, MAX_EXPERTS)
    experts = tl.load(record + at.EXPERTS).to(tl.int32)
    gate = tl.load(record + at.GATE).to(tl.int32) + expert
    where = own[:, None] & (expert < experts)[None, :]
    sums = tl.zeros((token.shape[0], MAX_EXPERTS), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
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
        tl.store(gates + (token * MAX_GATES)[:, None] + gate[None, :], w, mask=where)
        if TRACE:
            target = trace + (token * (2 * MAX_GATES))[:, None] + gate[None, :]
            tl.store(target, p, mask=where)
            tl.store(target + MAX_GATES, w, mask=where)
    return w


@triton.jit
def summed_rows(
    rows: tl.tensor,
    strips: tl.tensor,
    row: tl.tensor,
    where: tl.tensor,
    token: tl.tensor,
    tokens: tl.tensor,
    shrunk: tl.tensor,
    parts: tl.tensor,
    MAX_RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    MIXED: tl.constexpr,
) -> tl.tensor:
    """Rank rows `row` of the linear, float32 `[T, row]`: the sum of shrink's splits or, from row
    number `shrunk` on, of an FFN mixture's strips."""
    here = where & (row < shrunk)[None, :]
    sums = tl.zeros((token.shape[0], row.shape[0]), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        source = (split * tokens + token)[:, None] * MAX_RANK + row[None, :]
        sums += tl.load(rows + source, mask=here, other=0.0)
    if MIXED:
        there = where & (row >= shrunk)[None, :]
        for part in range(tl.where(tl.max(row, axis=0) >= shrunk, parts, 0)):
            source = (part * tokens + token)[:, None] * MAX_RANK + (row - shrunk)[None, :]
            sums += tl.load(strips + source, mask=there, other=0.0)
    return sums


@triton.jit(do_not_specialize=["tokens", "parts"])
def gate_kernel(
    steps: tl.tensor,
    heads: tl.tensor,
    pieces: tl.tensor,
    parameters: tl.tensor,
    counters: tl.tensor,
    owners: tl.tensor,
    rows: tl.tensor,
    logits: tl.tensor,
    strips: tl.tensor,
    gated: tl.tensor,
    gates: tl.tensor,
    trace: tl.tensor,
    tokens: tl.tensor,
    parts: tl.tensor,
    head_stride: tl.tensor,
    piece_stride: tl.tensor,
    parameter_stride: tl.tensor,
    counter_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_GATES: tl.constexpr,
    MAX_EXPERTS: tl.constexpr,
    MAX_PIECES: tl.constexpr,
    COUNTERS: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    MIXED: tl.constexpr,
    TRACE: tl.constexpr,
) -> None:
    slot, token, own = load_tile(steps, tokens, LIST, TILE)
    if slot < 0:
        return
    slot = slot.to(tl.int64)
    pieces += slot * piece_stride
    every = pieces + tl.arange(0, MAX_PIECES) * at.PIECE
    # A router without rank rows of its own decides and counts all the same.
    sizes = tl.load(every + at.RANK).to(tl.int32)
    sizes = tl.maximum(sizes, (tl.load(every + at.EXPERTS) > 0).to(tl.int32))
    shrunk = tl.load(heads + slot * head_stride + at.HEAD_RANK).to(tl.int32)
    blocks = tl.sum(tl.cdiv(sizes, BLOCK_RANK), axis=0)
    for block in range(tl.program_id(1), blocks, tl.num_programs(1)):
        piece, local = find_block(sizes, block, BLOCK_RANK)
        record = pieces + piece * at.PIECE
        own_row = local * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
        rank = tl.load(record + at.RANK).to(tl.int32)
        row = tl.load(record + at.ROW).to(tl.int32) + own_row
        where = own[:, None] & (own_row < rank)[None, :]
        sums = summed_rows(
            rows, strips, row, where, token, tokens, shrunk, parts, MAX_RANK, SPLITS, MIXED
        )
        if tl.load(record + at.EXPERTS) > 0:
            w = gate_weights(
                logits,
                record,
                parameters + slot * parameter_stride + piece * at.POLICY,
                counters + slot * counter_stride + piece * COUNTERS,
                gates,
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
            owner = tl.load(
                owners + tl.load(record + at.OWNER) + own_row, mask=own_row < rank, other=0
            )
            index = tl.broadcast_to(tl.maximum(owner, 0)[None, :], (TILE, BLOCK_RANK))
            gate = tl.where((owner == at.EVERY_TOKEN)[None, :], 1.0, tl.gather(w, index, axis=1))
            # A row of an expert that is not chosen is 0, whatever its sum is.
            sums = tl.where(gate == 0, 0.0, sums * gate)
        target = gated + (token * MAX_RANK)[:, None] + row[None, :]
        tl.store(target, sums.to(gated.dtype.element_ty), mask=where)


def gate(
    steps: Tensor,
    records: tuple[Tensor, Tensor, Tensor, Tensor],
    owners: Tensor,
    scratch: Scratch,
    config: LaunchConfig,
    mixed: Tensor | None,
    trace: Tensor | None,
) -> None:
    """Fills `scratch.gated` and `scratch.gates` from what shrink left in `scratch`.

    records: the linear's heads `[slots, HEAD]`, pieces `[slots, pieces, PIECE]`, parameters
    `[slots, pieces, POLICY]` and counters. owners: the arena's flat view in int32. mixed: the
    strips of an FFN mixture, for its down linear.
    """
    tokens = scratch.gated.shape[0]
    heads, pieces, parameters, counters = records
    gate_kernel[(config.tiles(tokens), config.route_programs)](
        steps,
        heads,
        pieces,
        parameters,
        counters,
        owners,
        scratch.rows,
        scratch.logits,
        scratch.rows if mixed is None else mixed,
        scratch.gated,
        scratch.gates,
        scratch.logits if trace is None else trace,
        tokens,
        1 if mixed is None else mixed.shape[0],
        heads.stride(0),
        pieces.stride(0),
        parameters.stride(0),
        counters.stride(0),
        MAX_RANK=config.max_rank,
        MAX_GATES=config.max_gates,
        MAX_EXPERTS=config.max_experts,
        MAX_PIECES=config.max_pieces,
        COUNTERS=counters.stride(1),
        SPLITS=scratch.splits,
        LIST=config.tile_list,
        TILE=config.tile,
        BLOCK_RANK=config.route_rank,
        MIXED=mixed is not None,
        TRACE=trace is not None,
        num_warps=4,
        num_stages=1,
        maxnreg=MAX_REGISTERS,
    )
