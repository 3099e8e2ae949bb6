"""The torch backend: runs wherever torch runs, and is the fallback of the others.

Vectorised per segment (all rows of one adapter in a step): no loop over tokens or experts, no
weights gathered per token.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from molehill.kernels import custom_ops
from molehill.kernels.capture import Capture, Record, recorder
from molehill.kernels.checked import CheckedBackend
from molehill.kernels.counters import SlotCounters
from molehill.kernels.interface import (
    CPU,
    UNSERVED,
    FfnShape,
    LinearShape,
    Packed,
    Run,
    SlotWeights,
    Trace,
)
from molehill.kernels.pytorch.scales import ScaleTable
from molehill.kernels.pytorch.tables import FfnState, FfnTable, LinearTable, Router, Shrunk

Rows = slice | Tensor


class RegisteredLinear:
    """A registered linear and what the slots do to it. An FFN's linears know their part in it."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        self.tables: dict[int, LinearTable] = {}
        self.scales: dict[int, list[ScaleTable]] = {}
        self.gate_up_of: RegisteredFfn | None = None
        self.down_of: RegisteredFfn | None = None


class RegisteredFfn:
    """A registered FFN, its slots' tables, and their state in the running step."""

    def __init__(self, shape: FfnShape) -> None:
        self.shape = shape
        self.tables: dict[int, FfnTable] = {}
        self.scales: dict[int, ScaleTable] = {}
        self.states: dict[int, FfnState] = {}


class TorchBackend(CheckedBackend):
    """See molehill.kernels.interface.Backend."""

    name = "torch"

    def __init__(self) -> None:
        super().__init__()
        self._linears: list[RegisteredLinear] = []
        self._ffns: list[RegisteredFfn] = []
        self._tokens: dict[int, int] = {}
        self._segments: list[tuple[int, Rows]] = []
        self._traces: list[Trace] | None = None
        self._capture: Capture | None = None
        self._device = CPU
        self._seconds: float | None = 0.0
        self.linear_op: Callable[..., Any] = torch.ops.molehill.linear.default
        self.ffn_op: Callable[..., Any] = torch.ops.molehill.ffn.default
        custom_ops.install(self)

    def _add_linear(self, shape: LinearShape) -> int:
        if shape.device.type != "cpu":
            # A device works on after the call has returned.
            self._seconds = None
        self._device = shape.device
        self._linears.append(RegisteredLinear(shape))
        return len(self._linears) - 1

    def _add_ffn(self, shape: FfnShape) -> int:
        ffn = RegisteredFfn(shape)
        self._ffns.append(ffn)
        self._linears[shape.gate_up].gate_up_of = ffn
        self._linears[shape.down].down_of = ffn
        return len(self._ffns) - 1

    def seal(self) -> None:
        """Nothing here has a fixed address."""

    def _pack(self, weights: SlotWeights) -> Packed:
        linears = {
            handle: LinearTable(pieces, *self._placement(handle))
            for handle, pieces in weights.linears.items()
        }
        ffns = {
            handle: FfnTable(piece, *self._placement(self._ffns[handle].shape.gate_up))
            for handle, piece in weights.ffns.items()
        }
        scales = {
            handle: [
                ScaleTable(piece, self._linears[handle].shape.device, by_head=True)
                for piece in pieces
            ]
            for handle, pieces in weights.scales.items()
        }
        ffn_scales = {
            handle: ScaleTable(piece, self._down(self._ffns[handle]).device, by_head=False)
            for handle, piece in weights.ffn_scales.items()
        }
        return Packed((linears, ffns, scales, ffn_scales))

    def _placement(self, handle: int) -> tuple[torch.dtype, torch.device]:
        """Of a linear's serving copies."""
        shape = self._linears[handle].shape
        return shape.dtype, shape.device

    def _put(self, slot: int, packed: Packed) -> None:
        if slot in self._tokens:
            raise ValueError(f"slot {slot} is taken")
        linears, ffns, scales, ffn_scales = packed.layout
        for handle, linear in linears.items():
            self._linears[handle].tables[slot] = linear
        for handle, ffn in ffns.items():
            self._ffns[handle].tables[slot] = ffn
        for handle, tables in scales.items():
            self._linears[handle].scales[slot] = tables
        for handle, scale in ffn_scales.items():
            self._ffns[handle].scales[slot] = scale
        self._tokens[slot] = 0

    def _down(self, ffn: RegisteredFfn) -> LinearShape:
        return self._linears[ffn.shape.down].shape

    def erase(self, slot: int) -> Packed | None:
        for layer in self._linears:
            layer.tables.pop(slot, None)
            layer.scales.pop(slot, None)
        for ffn in self._ffns:
            ffn.tables.pop(slot, None)
            ffn.scales.pop(slot, None)
            ffn.states.pop(slot, None)
        self._tokens.pop(slot, None)
        self._routed.pop(slot, None)
        self._segments = [(UNSERVED if s == slot else s, rows) for s, rows in self._segments]
        return None

    def resident_bytes(self, slot: int) -> int:
        total = 0
        for layer in self._linears:
            total += layer.tables[slot].num_bytes if slot in layer.tables else 0
            total += sum(table.num_bytes for table in layer.scales.get(slot, ()))
        for ffn in self._ffns:
            total += ffn.tables[slot].num_bytes if slot in ffn.tables else 0
            total += ffn.scales[slot].num_bytes if slot in ffn.scales else 0
        return total

    def begin_step(self, runs: Sequence[Run]) -> None:
        self._capture = None
        by_slot: dict[int, list[Run]] = {}
        for run in runs:
            served = run.slot in self._tokens
            by_slot.setdefault(run.slot if served else UNSERVED, []).append(run)
            if served:
                self._tokens[run.slot] += run.stop - run.start
        self._segments = [(slot, _rows(runs_of_slot)) for slot, runs_of_slot in by_slot.items()]

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        if self._segments:
            with self._timed():
                self._linear(out, x, handle)

    def _linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        layer = self._linears[handle]
        work = [s for s in self._segments if s[0] in layer.tables]
        shrunk = [layer.tables[slot].shrink(x[rows]) for slot, rows in work]
        if layer.shape.reduce is not None:
            shrunk = _reduce_shrunk(shrunk, layer.shape.reduce)
        for (slot, rows), part in zip(work, shrunk, strict=True):
            y = out[rows]
            layer.tables[slot].expand(y, part, self._recording(slot, rows))
            if not isinstance(rows, slice):
                out[rows] = y
        for slot, rows in self._segments:
            for table in layer.scales.get(slot, ()):
                y = out[rows]
                u = y[:, table.columns]
                table.scale(u, table.logits(u), self._recording(slot, rows))
                if not isinstance(rows, slice):
                    out[rows] = y
        self._linear_in_ffn(out, x, layer)

    def _linear_in_ffn(self, out: Tensor, x: Tensor, layer: RegisteredLinear) -> None:
        for slot, rows in self._segments:
            if slot == UNSERVED:
                out[rows] = 0
            if layer.gate_up_of is not None and slot in layer.gate_up_of.tables:
                table = layer.gate_up_of.tables[slot]
                layer.gate_up_of.states[slot] = table.route(x[rows], self._recording(slot, rows))
            if layer.down_of is not None and slot in layer.down_of.states:
                y = out[rows]
                layer.down_of.tables[slot].finish(y, layer.down_of.states.pop(slot))
                if not isinstance(rows, slice):
                    out[rows] = y

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        if self._segments:
            with self._timed():
                self._ffn(h, gate_up, handle)

    def _ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        ffn = self._ffns[handle]
        for slot, rows in self._segments:
            if slot in ffn.tables:
                h[rows] = ffn.tables[slot].mix(gate_up[rows], ffn.states[slot])
        work = [s for s in self._segments if s[0] in ffn.scales]
        logits = [ffn.scales[slot].logits(h[rows]) for slot, rows in work]
        reduce = self._down(ffn).reduce
        if reduce is not None:
            logits = _reduce(logits, reduce)
        for (slot, rows), part in zip(work, logits, strict=True):
            u = h[rows]
            ffn.scales[slot].scale(u, part, self._recording(slot, rows))
            if not isinstance(rows, slice):
                h[rows] = u

    def capture(self, rows: Sequence[int]) -> None:
        """Backend.capture."""
        self._capture = Capture(rows, self._captured_columns, self._device)

    def captured(self) -> Tensor:
        """Backend.captured."""
        return torch.zeros(0, 0) if self._capture is None else self._capture.weights

    def _recording(self, slot: int, rows: Rows) -> Record | None:
        """What takes the decisions for a segment; None if nobody wants them."""
        return recorder(self._traces, self._capture, self._routed.get(slot, {}), rows)

    def counters(self, slot: int) -> SlotCounters:
        routers: list[Router] = []
        for layer in self._linears:
            routers += layer.tables[slot].routers if slot in layer.tables else []
            routers += [table.router for table in layer.scales.get(slot, ())]
        for ffn in self._ffns:
            routers += [
                tables[slot].router for tables in (ffn.tables, ffn.scales) if slot in tables
            ]
        sites = {site: counts for router in routers for site, counts in router.counters()}
        return SlotCounters.of(self._tokens[slot], sites)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = perf_counter()
        yield
        if self._seconds is not None:
            self._seconds += perf_counter() - start

    def seconds(self) -> float | None:
        return self._seconds

    def trace(self, enabled: bool) -> list[Trace]:
        traces, self._traces = self._traces, [] if enabled else None
        return traces or []


def _rows(runs: Sequence[Run]) -> Rows:
    """One run is a slice (no copies); several are an index."""
    if len(runs) == 1:
        return slice(runs[0].start, runs[0].stop)
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


def _reduce(logits: list[Tensor], reduce: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Sums all segments' router logits over the ranks, in one collective."""
    if not logits:
        return logits
    total = reduce(torch.cat([part.flatten() for part in logits]))
    parts = total.split([part.numel() for part in logits])
    return [part.view_as(segment) for part, segment in zip(parts, logits, strict=True)]


def _reduce_shrunk(shrunk: list[Shrunk], reduce: Callable[[Tensor], Tensor]) -> list[Shrunk]:
    parts = iter(_reduce([s.logits for s in shrunk if s.logits is not None], reduce))
    return [s if s.logits is None else Shrunk(s.rows, next(parts)) for s in shrunk]
