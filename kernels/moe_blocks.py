"""LoRA on the experts of the base model's own MoE blocks, in torch, grouped by expert.

The base's router has chosen the experts. Rows whose adapter changes experts are computed here: each
of their (token, expert) pairs runs through the base expert's GEMMs once, with the low-rank terms
between them. All other rows go through the base's own kernel, and no row through both.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from molehill.kernels import custom_ops
from molehill.kernels.activation import gated
from molehill.kernels.checks import check_moe
from molehill.kernels.interface import UNSERVED, MoePiece, MoeShape, Run
from molehill.kernels.mixture import Experts

LowRankPair = tuple[Tensor, Tensor]


class MoeTable:
    """One adapter's pairs for one block, by base expert; None where it has none."""

    def __init__(self, piece: MoePiece, dtype: torch.dtype, device: torch.device) -> None:
        self.gate = _pairs(piece.gate, dtype, device)
        self.up = _pairs(piece.up, dtype, device)
        self.down = _pairs(piece.down, dtype, device)

    @property
    def num_bytes(self) -> int:
        stacks = (self.gate, self.up, self.down)
        return sum(a.nbytes + b.nbytes for pairs in stacks for a, b in pairs.values())


def _pairs(
    experts: Experts | None, dtype: torch.dtype, device: torch.device
) -> Mapping[int, LowRankPair]:
    if experts is None:
        return {}
    return {
        e: (a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())
        for e, (a, b) in enumerate(experts.split())
        if len(a)
    }


class RegisteredBlock:
    """A registered MoE block and the tables of its slots."""

    def __init__(self, shape: MoeShape) -> None:
        self.shape = shape
        self.tables: dict[int, MoeTable] = {}


class MoeBlocks:
    """All MoE blocks of one worker. Synchronises with the device, so it is not for CUDA graphs.

    `op(x, weights, chosen, handle)` is what a model's forward calls, the handle as a one-element
    int64 CPU tensor.
    """

    def __init__(self) -> None:
        self._blocks: list[RegisteredBlock] = []
        self._runs: list[Run] = []
        self.op = torch.ops.molehill.experts.default
        custom_ops.install_experts(self.run)

    def register(self, shape: MoeShape) -> int:
        """Handle of a block; called once per block, before any weights are stored."""
        self._blocks.append(RegisteredBlock(shape))
        return len(self._blocks) - 1

    def store(self, slot: int, pieces: Mapping[int, MoePiece]) -> None:
        """Puts an adapter into an empty slot; on error the slot stays empty.

        Raises WeightsError, MemoryError.
        """
        blocks = [(self._blocks[handle], piece) for handle, piece in pieces.items()]
        for block, piece in blocks:
            check_moe(piece, block.shape)
        tables = [MoeTable(piece, b.shape.dtype, b.shape.device) for b, piece in blocks]
        for (block, _), table in zip(blocks, tables, strict=True):
            block.tables[slot] = table

    def erase(self, slot: int) -> None:
        """Frees a slot."""
        for block in self._blocks:
            block.tables.pop(slot, None)

    def resident_bytes(self, slot: int) -> int:
        """Bytes that the slot's serving copy takes."""
        return sum(b.tables[slot].num_bytes for b in self._blocks if slot in b.tables)

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward; rows in no run belong to the base."""
        self._runs = list(runs)

    def run(self, x: Tensor, weights: Tensor, chosen: Tensor, handle: int) -> Tensor:
        """y `[T, hidden]` of x `[T, hidden]`; weights, chosen `[T, k]`: the base router's."""
        block = self._blocks[handle]
        adapted = [run for run in self._runs if run.slot in block.tables]
        unserved = [run for run in self._runs if run.slot == UNSERVED]
        if not adapted and not unserved:
            return block.shape.run(x, weights, chosen)
        out = torch.zeros_like(x)
        base = torch.ones(len(x), dtype=torch.bool, device=x.device)
        for run in [*adapted, *unserved]:
            base[run.start : run.stop] = False
        for slot in dict.fromkeys(run.slot for run in adapted):
            rows = torch.cat([torch.arange(r.start, r.stop) for r in adapted if r.slot == slot])
            rows = rows.to(x.device)
            out[rows] = _adapted(block, slot, x[rows], weights[rows], chosen[rows])
        rest = base.nonzero().squeeze(1)
        if len(rest):
            out[rest] = block.shape.run(x[rest], weights[rest], chosen[rest])
        return out


def _adapted(
    block: RegisteredBlock, slot: int, x: Tensor, weights: Tensor, chosen: Tensor
) -> Tensor:
    """One adapter's rows, expert by expert; sums over experts in float32."""
    shape, table = block.shape, block.tables[slot]
    activate = gated(shape.activation)
    y = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, tokens, gate_weights in _groups(weights, chosen):
        rows = x[tokens]
        gate, up = shape.weights.gate_up(expert, rows)
        gate = _add(gate.float(), rows, table.gate.get(expert))
        up = _add(up.float(), rows, table.up.get(expert))
        hidden = activate(gate, up).to(x.dtype)
        down = _add(shape.weights.down(expert, hidden).float(), hidden, table.down.get(expert))
        y.index_add_(0, tokens, down * gate_weights)
    return y.to(x.dtype)


def _groups(weights: Tensor, chosen: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens `[n]`, their gate weights `[n, 1]` float32), by expert."""
    order = chosen.flatten().argsort(stable=True)
    experts, counts = chosen.flatten()[order].unique_consecutive(return_counts=True)
    flat = weights.float().flatten()
    pairs = order.split(counts.tolist())
    for expert, indices in zip(experts.tolist(), pairs, strict=True):
        yield expert, indices // chosen.shape[1], flat[indices, None]


def _add(y: Tensor, x: Tensor, pair: LowRankPair | None) -> Tensor:
    """y + B A x, the sum in float32."""
    if pair is None:
        return y
    a, b = pair
    return y + (x @ a.T @ b.T).float()
