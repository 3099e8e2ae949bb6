"""Shrink: rows = x A^T in the serving dtype and logits = x G^T in float32, summed in float32.

One launch for all slots and all pieces of a linear. x `[T, in]`; A `[rank, in]` and G `[gates, in]`
are the (slot, linear)'s stacked rank rows and router rows. Where tokens are few, `in` is cut into
splits whose partial sums lie side by side and are added by the reader in a fixed order: results do
not depend on the order of the programs.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch


@triton.jit
def load_tile(
    steps: tl.tensor, tokens: tl.tensor, LIST: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Slot of this program's tile, its tokens int32 `[TILE]` and which of them there are.

    A program beyond the tiles gets the slot -1; it has nothing to do.
    """
    i = tl.program_id(0)
    slot = -1
    place = 0
    size = 0
    if i < tl.load(steps + LIST):
        entry = steps + tl.load(steps + LIST + 1) + i * at.TILE
        slot = tl.load(entry)
        place = tl.load(entry + 1)
        size = tl.load(entry + 2)
    j = tl.arange(0, TILE)
    order = steps + tl.load(steps + at.ORDER) + place
    token = tl.load(order + j, mask=j < size, other=0)
    return slot, token, (j < size) & (token < tokens)


@triton.jit
def project(
    x: tl.tensor,
    own: tl.tensor,
    weights: tl.tensor,
    columns: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    PRECISION: tl.constexpr,
    BLOCK_IN: tl.constexpr,
) -> tl.tensor:
    """x weights^T over inputs [begin, end), pointers to rows both: float32 `[T, columns]`."""
    total = tl.zeros((x.shape[0], weights.shape[1]), dtype=tl.float32)
    k = tl.arange(0, BLOCK_IN)
    for start in range(begin, end, BLOCK_IN):
        inside = start + k < end
        a = tl.load(x + start + k[None, :], mask=own[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weights + start + k[:, None], mask=inside[:, None] & columns[None, :], other=0.0
        )
        total = tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)
    return total


@triton.jit(do_not_specialize=["tokens"])
def shrink_kernel(
    x: tl.tensor,
    steps: tl.tensor,
    heads: tl.tensor,
    weights: tl.tensor,
    routers: tl.tensor,
    rows: tl.tensor,
    logits: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    x_stride: tl.tensor,
    slot_stride: tl.tensor,
    MAX_RANK: tl.constexpr,
    MAX_GATES: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    RANK_PROGRAMS: tl.constexpr,
    GATE_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUTER_PRECISION: tl.constexpr,
) -> None:
    slot, token, own = load_tile(steps, tokens, LIST, TILE)
    if slot < 0:
        return
    head = heads + slot.to(tl.int64) * slot_stride
    program = tl.program_id(1)
    split = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(features, SPLITS), BLOCK_IN) * BLOCK_IN
    begin = split * span
    end = tl.minimum(begin + span, features)
    pitch = tl.multiple_of(tl.cdiv(features, at.PITCH) * at.PITCH, at.PITCH)
    out_row = (split * tokens + token)[:, None]
    x_row = (x + token.to(tl.int64) * x_stride)[:, None]
    if program < GATE_PROGRAMS:
        gates = tl.load(head + at.HEAD_GATES).to(tl.int32)
        first = tl.multiple_of(tl.load(head + at.HEAD_ROUTERS), at.PITCH)
        for start in range(program * BLOCK_GATES, gates, GATE_PROGRAMS * BLOCK_GATES):
            gate = start + tl.arange(0, BLOCK_GATES)
            g = routers + first + (gate * pitch)[None, :]
            sums = project(x_row, own, g, gate < gates, begin, end, ROUTER_PRECISION, BLOCK_IN)
            where = own[:, None] & (gate < gates)[None, :]
            tl.store(logits + out_row * MAX_GATES + gate[None, :], sums, mask=where)
    else:
        program -= GATE_PROGRAMS
        rank = tl.load(head + at.HEAD_RANK).to(tl.int32)
        first = tl.multiple_of(tl.load(head + at.HEAD_A), at.PITCH)
        for start in range(program * BLOCK_RANK, rank, RANK_PROGRAMS * BLOCK_RANK):
            row = start + tl.arange(0, BLOCK_RANK)
            a = weights + first + (row * pitch)[None, :]
            sums = project(x_row, own, a, row < rank, begin, end, PRECISION, BLOCK_IN)
            where = own[:, None] & (row < rank)[None, :]
            tl.store(rows + out_row * MAX_RANK + row[None, :], sums, mask=where)


def shrink(
    x: Tensor,
    steps: Tensor,
    heads: Tensor,
    arena: tuple[Tensor, Tensor],
    scratch: Scratch,
    config: LaunchConfig,
) -> None:
    """Fills `scratch` from x `[T, in]`.

    heads: the linear's records `[slots, HEAD]`. arena: its flat views in the serving dtype and in
    float32.
    """
    tokens, features = x.shape
    weights, routers = arena
    precise = x.element_size() == 4
    programs = config.gate_programs + config.rank_programs
    grid = (config.tiles(tokens), programs, scratch.splits)
    shrink_kernel[grid](
        x,
        steps,
        heads,
        weights,
        routers,
        scratch.rows,
        scratch.logits,
        tokens,
        features,
        x.stride(0),
        heads.stride(0),
        MAX_RANK=config.max_rank,
        MAX_GATES=config.max_gates,
        SPLITS=scratch.splits,
        LIST=config.tile_list,
        TILE=config.tile,
        BLOCK_IN=config.inputs // (2 if precise else 1),
        BLOCK_RANK=config.rank,
        BLOCK_GATES=config.gates,
        RANK_PROGRAMS=config.rank_programs,
        GATE_PROGRAMS=config.gate_programs,
        PRECISION="ieee" if precise else "tf32",
        ROUTER_PRECISION="ieee" if precise else "tf32x3",
        num_warps=config.warps,
        num_stages=3,
        maxnreg=MAX_REGISTERS,
    )
