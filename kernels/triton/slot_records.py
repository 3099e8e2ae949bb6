"""The slot table: what each slot holds at each linear and FFN, in device memory.

Addresses never change. All writes are copies on the current stream from memory that is not touched
again, so a step in flight sees a slot as it was when the step was launched.
"""

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor

from molehill.kernels.interface import (
    CapacityError,
    FfnShape,
    LinearPiece,
    LinearShape,
    SlotWeights,
)
from molehill.kernels.triton import layout as at
from molehill.kernels.triton.arena import Arena, Extent
from molehill.kernels.triton.launch_config import Capacity, launch_config_for
from molehill.kernels.triton.packing import (
    Packing,
    Record,
    RouterSite,
    RowStack,
    pack_ffn,
    pack_piece,
)


class SlotRecords:
    """Records of every (slot, linear), (slot, linear, piece) and (slot, FFN), and the arena."""

    def __init__(
        self,
        linears: list[LinearShape],
        ffns: list[FfnShape],
        capacity: Capacity,
        device: torch.device,
    ) -> None:
        self._linears, self._ffns, self._capacity = linears, ffns, capacity
        self.arena = Arena(capacity.memory, device)
        self.extents: dict[int, tuple[Extent, ...]] = {}
        self.sites: dict[int, list[RouterSite]] = {}
        each = capacity.slots, len(linears)
        each_ffn = capacity.slots, len(ffns)
        config = launch_config_for(capacity.tokens, capacity)
        pieces = config.max_pieces

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.heads = zeros(*each, at.HEAD.value)
        self.pieces = zeros(*each, pieces, at.PIECE.value)
        self.parameters = zeros(*each, pieces, at.POLICY.value, dtype=torch.float32)
        self.counters = zeros(*each, pieces, config.counters)
        self.ffns = zeros(*each_ffn, at.FFN.value)

    def store(self, slot: int, packing: Packing) -> None:
        """Raises CapacityError or ArenaFullError before anything is written."""
        if slot in self.extents:
            raise ValueError(f"slot {slot} is taken")
        if not 0 <= slot < self._capacity.slots:
            raise CapacityError("adapters", f"slot {slot}", f"less than {self._capacity.slots}")
        with self.arena.reserve(packing.sizes) as reservation:
            for matrix, extent in zip(packing.matrices, reservation.extents, strict=True):
                shape = (matrix.shape[0], matrix.shape[1])
                _copy(self.arena.rows(extent, matrix.dtype, shape), matrix)
            self._write(slot, packing, reservation.extents)
        self.extents[slot], self.sites[slot] = reservation.extents, packing.sites

    def erase(self, slot: int) -> None:
        extents = self.extents.pop(slot, None)
        if extents is not None:
            del self.sites[slot]
            self.heads[slot].zero_()
            self.pieces[slot].zero_()
            self.ffns[slot].zero_()
            self.arena.release(extents)

    def pack(self, weights: SlotWeights) -> Packing:
        """Of all but the vectors. Raises CapacityError."""
        for vectors in [*chain(*weights.scales.values()), *weights.ffn_scales.values()]:
            if not self._capacity.vectors:
                expected = "low-rank experts on this backend, or eager mode"
                raise CapacityError(vectors.site, "vectors of MoV", expected)
        for shape in self._ffns:
            if shape.activation is not None:
                _check_halves(weights.linears.get(shape.gate_up, ()), shape)
        packing = Packing()
        stacks: dict[int, RowStack] = {}

        def stack(handle: int) -> RowStack:
            return stacks.setdefault(handle, RowStack(self._linears[handle].name, handle))

        for handle, pieces in weights.linears.items():
            for piece in pieces:
                dtype = self._linears[handle].dtype
                pack_piece(piece, stack(handle), packing, dtype, self._capacity)
        for handle, ffn in weights.ffns.items():
            shape = self._ffns[handle]
            dtype = self._linears[shape.gate_up].dtype
            packing.ffns[handle] = pack_ffn(
                ffn, stack(shape.gate_up), stack(shape.down), packing, dtype, self._capacity
            )
        for handle, rows in stacks.items():
            rows.check(self._capacity)
            packing.heads[handle] = rows.head(packing, self._linears[handle].dtype)
            packing.pieces[handle] = rows.pieces
        return packing

    def _write(self, slot: int, packing: Packing, extents: tuple[Extent, ...]) -> None:
        def fields(record: Record) -> Tensor:
            for position, matrix in record.places.items():
                itemsize = packing.matrices[matrix].element_size()
                record.fields[position] = extents[matrix].start // itemsize
            return torch.tensor(record.fields)

        def fill(target: Tensor, rows: Mapping[tuple[int, ...], Tensor]) -> None:
            host = torch.zeros(target.shape[1:], dtype=target.dtype)
            for index, row in rows.items():
                host[index] = row
            _copy(target[slot], host)

        pieces = {
            (handle, i): record
            for handle, records in packing.pieces.items()
            for i, record in enumerate(records)
        }
        ffns = {(handle,): record for handle, record in packing.ffns.items()}
        self.counters[slot].zero_()
        fill(self.pieces, {index: fields(record) for index, record in pieces.items()})
        fill(self.parameters, {i: torch.tensor(record.parameters) for i, record in pieces.items()})
        fill(self.heads, {(h,): fields(record) for h, record in packing.heads.items()})
        fill(self.ffns, {index: fields(record) for index, record in ffns.items()})


def _check_halves(pieces: Sequence[LinearPiece], ffn: FfnShape) -> None:
    """Raises CapacityError for a piece of a gate_up linear that begins within gate or up: a program
    that activates has columns of both."""
    for piece in pieces:
        if piece.start not in (0, ffn.intermediate):
            expected = f"0 or {ffn.intermediate}"
            raise CapacityError(piece.site, f"columns from {piece.start}", expected)


def _copy(target: Tensor, source: Tensor) -> None:
    """To the device without waiting, from pinned memory that nobody writes to afterwards."""
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
