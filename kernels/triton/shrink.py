"""Shrink: rows = x A^T in the serving dtype and logits = x G^T in float32, summed in float32.

One launch for all slots and all pieces of a linear. x `[T, in]`; A `[rank, in]` and G `[gates, in]`
are the (slot, linear)'s stacked rank rows and router rows. `in` is cut into splits, whose partial
sums lie side by side and are added by the reader in a fixed order: results do not depend on the
order of the programs. Tiles of one row in a step that routes first get logits alone.

Logits are exact to float32's rounding: a float32 weight of G is the sum of two TF32 numbers but for
2^-22 of it, and a bfloat16 or float16 input is a TF32 number, so two passes of tensor cores do. The
halves are three instructions from the weight that is read anyway; stored, they would double the
bytes of the routers.
"""

import triton
from torch import Tensor
from triton import language as tl

from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import MAX_REGISTERS, LaunchConfig, Scratch


@triton.jit
def load_tile(
    steps: tl.tensor, LIST: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """This program's tile: its slot, its first place in the order, how many tokens, the first.

    The slot of a program beyond the tiles is NO_TILE; it has nothing to do.
    """
    entry = steps + LIST + tl.program_id(0) * at.TILE
    return tl.load(entry), tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)


@triton.jit
def load_tokens(
    steps: tl.tensor,
    place: tl.tensor,
    size: tl.tensor,
    tokens: tl.tensor,
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """A tile's tokens int32 `[TILE]`, and which of them there are."""
    j = tl.arange(0, TILE)
    token = tl.load(steps + ORDER + place + j, mask=j < size, other=0)
    return token, (j < size) & (token < tokens)


@triton.jit
def routes_first(steps: tl.tensor, size: tl.tensor) -> tl.tensor:
    """Whether a tile has its rank rows computed after routing."""
    return (size == 1) & (tl.load(steps + at.ROUTE_FIRST) != 0)


@triton.jit
def tf32_halves(g: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The nearest TF32 number to a float32, and the rest."""
    bits = g.to(tl.int32, bitcast=True)
    high = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return high, g - high


@triton.jit
def project(
    x: tl.tensor,
    valid: tl.tensor,
    weights: tl.tensor,
    columns: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_IN: tl.constexpr,
) -> tl.tensor:
    """x weights^T over inputs [begin, end), pointers to rows both: float32 `[T, columns]`.

    HALVES: weights float32, x of a smaller type, multiplied in two passes.
    """
    total = tl.zeros((x.shape[0], weights.shape[1]), dtype=tl.float32)
    k = tl.arange(0, BLOCK_IN)
    for start in range(begin, end, BLOCK_IN):
        inside = start + k < end
        a = tl.load(x + start + k[None, :], mask=valid[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            weights + start + k[:, None], mask=inside[:, None] & columns[None, :], other=0.0
        )
        if HALVES:
            high, low = tf32_halves(b)
            total = tl.dot(a.to(tl.float32), low, total, input_precision="tf32")
            total = tl.dot(a.to(tl.float32), high, total, input_precision="tf32")
        else:
            total = tl.dot(a.to(b.dtype), b, total, input_precision=PRECISION)
    return total


@triton.jit
def project_one(
    x: tl.tensor,
    weights: tl.tensor,
    used: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    BLOCK_IN: tl.constexpr,
) -> tl.tensor:
    """Of one token: float32 `[rows]`, without tensor cores. weights: pointers to rows `[rows]`, of
    which the `used` are read. x: pointer to the token's inputs."""
    k = tl.arange(0, BLOCK_IN)
    sums = tl.zeros((used.shape[0], BLOCK_IN), dtype=tl.float32)
    for start in range(begin, end, BLOCK_IN):
        inside = start + k < end
        a = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        where = used[:, None] & inside[None, :]
        b = tl.load(weights[:, None] + (start + k)[None, :], mask=where, other=0.0)
        sums += a[None, :] * b.to(tl.float32)
    return tl.sum(sums, axis=1)


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
    ORDER: tl.constexpr,
    TILE: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_GATES: tl.constexpr,
    RANK_PROGRAMS: tl.constexpr,
    GATE_PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
) -> None:
    slot, place, size, first_token = load_tile(steps, LIST)
    if slot < 0:
        return
    head = heads + slot.to(tl.int64) * slot_stride
    program = tl.program_id(1)
    split = tl.program_id(2)
    span = tl.cdiv(tl.cdiv(features, SPLITS), BLOCK_IN) * BLOCK_IN
    begin = split * span
    end = tl.minimum(begin + span, features)
    pitch = tl.multiple_of(tl.cdiv(features, at.PITCH) * at.PITCH, at.PITCH)
    # Two conditions: the first is decided when it is compiled.
    if SINGLE:  # noqa: SIM102
        if routes_first(steps, size):
            if (program < GATE_PROGRAMS) & (first_token < tokens):
                gates = tl.load(head + at.HEAD_GATES).to(tl.int32)
                first = tl.multiple_of(tl.load(head + at.HEAD_ROUTERS), at.PITCH)
                target = logits + (split * tokens + first_token) * MAX_GATES
                x_one = x + first_token.to(tl.int64) * x_stride
                for start in range(program * BLOCK_GATES, gates, GATE_PROGRAMS * BLOCK_GATES):
                    gate = start + tl.arange(0, BLOCK_GATES)
                    g = routers + first + gate * pitch
                    sums = project_one(x_one, g, gate < gates, begin, end, BLOCK_IN)
                    tl.store(target + gate, sums, mask=gate < gates)
            return
    token, valid = load_tokens(steps, place, size, tokens, ORDER, TILE)
    out_row = (split * tokens + token)[:, None]
    x_row = (x + token.to(tl.int64) * x_stride)[:, None]
    if program < GATE_PROGRAMS:
        gates = tl.load(head + at.HEAD_GATES).to(tl.int32)
        first = tl.multiple_of(tl.load(head + at.HEAD_ROUTERS), at.PITCH)
        for start in range(program * BLOCK_GATES, gates, GATE_PROGRAMS * BLOCK_GATES):
            gate = start + tl.arange(0, BLOCK_GATES)
            g = routers + first + (gate * pitch)[None, :]
            sums = project(x_row, valid, g, gate < gates, begin, end, PRECISION, HALVES, BLOCK_IN)
            where = valid[:, None] & (gate < gates)[None, :]
            tl.store(logits + out_row * MAX_GATES + gate[None, :], sums, mask=where)
    else:
        program -= GATE_PROGRAMS
        rank = tl.load(head + at.HEAD_RANK).to(tl.int32)
        first = tl.multiple_of(tl.load(head + at.HEAD_A), at.PITCH)
        for start in range(program * BLOCK_RANK, rank, RANK_PROGRAMS * BLOCK_RANK):
            row = start + tl.arange(0, BLOCK_RANK)
            a = weights + first + (row * pitch)[None, :]
            sums = project(x_row, valid, a, row < rank, begin, end, PRECISION, False, BLOCK_IN)
            where = valid[:, None] & (row < rank)[None, :]
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
        ORDER=config.order,
        TILE=config.tile,
        SINGLE=config.single,
        BLOCK_IN=config.inputs // (2 if precise else 1),
        BLOCK_RANK=config.rank,
        BLOCK_GATES=config.gates,
        RANK_PROGRAMS=config.rank_programs,
        GATE_PROGRAMS=config.gate_programs,
        PRECISION="ieee" if precise else "tf32",
        HALVES=not precise,
        num_warps=config.shrink_warps,
        num_stages=3,
        maxnreg=MAX_REGISTERS,
    )
