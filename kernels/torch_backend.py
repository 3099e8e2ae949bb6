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

from molehill.kernels import ops
from molehill.kernels.backend import (
    UNSERVED,
    FfnShape,
    LinearShape,
    Run,
    SiteCounters,
    SlotCounters,
    SlotWeights,
    Trace,
)
from molehill.kernels.torch_tables import FfnState, FfnTable, LinearTable, Shrunk

Rows = slice | Tensor


class Layer:
    """A registered linear and what the slots do to it. An FFN's linears know their part in it."""

    def __init__(self, shape: LinearShape) -> None:
        self.shape = shape
        self.tables: dict[int, LinearTable] = {}
        self.gate_up_of: Ffn | None = None
        self.down_of: Ffn | None = None


class Ffn:
    """A registered FFN, its slots' tables, and their state in the running step."""

    def __init__(self, shape: FfnShape) -> None:
        self.shape = shape
        self.tables: dict[int, FfnTable] = {}
        self.states: dict[int, FfnState] = {}


class TorchBackend:
    """See molehill.kernels.backend.Backend."""

    name = "torch"

    def __init__(self) -> None:
        self._linears: list[Layer] = []
        self._ffns: list[Ffn] = []
        self._tokens: dict[int, int] = {}
        self._segments: list[tuple[int, Rows]] = []
        self._traces: list[Trace] | None = None
        self._seconds: float | None = 0.0
        self.linear_op: Callable[..., Any] = torch.ops.molehill.linear.default
        self.ffn_op: Callable[..., Any] = torch.ops.molehill.ffn.default
        ops.install(self)

    def register_linear(self, shape: LinearShape) -> int:
        if shape.device.type != "cpu":
            # A device works on after the call has returned.
            self._seconds = None
        self._linears.append(Layer(shape))
        return len(self._linears) - 1

    def register_ffn(self, shape: FfnShape) -> int:
        ffn = Ffn(shape)
        self._ffns.append(ffn)
        self._linears[shape.gate_up].gate_up_of = ffn
        self._linears[shape.down].down_of = ffn
        return len(self._ffns) - 1

    def seal(self) -> None:
        """Nothing here has a fixed address."""

    def store(self, slot: int, weights: SlotWeights) -> None:
        if slot in self._tokens:
            raise ValueError(f"slot {slot} is taken")
        linears = {
            handle: LinearTable(pieces, shape.dtype, shape.device)
            for handle, pieces in weights.linears.items()
            if (shape := self._linears[handle].shape)
        }
        ffns = {
            handle: FfnTable(piece, shape.dtype, shape.device)
            for handle, piece in weights.ffns.items()
            if (shape := self._linears[self._ffns[handle].shape.gate_up].shape)
        }
        for handle, linear in linears.items():
            self._linears[handle].tables[slot] = linear
        for handle, ffn in ffns.items():
            self._ffns[handle].tables[slot] = ffn
        self._tokens[slot] = 0

    def erase(self, slot: int) -> None:
        for layer in self._linears:
            layer.tables.pop(slot, None)
        for ffn in self._ffns:
            ffn.tables.pop(slot, None)
            ffn.states.pop(slot, None)
        self._tokens.pop(slot, None)
        self._segments = [segment for segment in self._segments if segment[0] != slot]

    def resident_bytes(self, slot: int) -> int:
        tables: list[LinearTable | FfnTable] = []
        tables += [layer.tables[slot] for layer in self._linears if slot in layer.tables]
        tables += [ffn.tables[slot] for ffn in self._ffns if slot in ffn.tables]
        return sum(table.num_bytes for table in tables)

    def begin_step(self, runs: Sequence[Run]) -> None:
        by_slot: dict[int, list[Run]] = {}
        for run in runs:
            by_slot.setdefault(run.slot, []).append(run)
            if run.slot in self._tokens:
                self._tokens[run.slot] += run.stop - run.start
        self._segments = [(slot, _rows(own)) for slot, own in by_slot.items()]

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        if self._segments:
            with self._timed():
                self._linear(out, x, handle)

    def _linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        layer = self._linears[handle]
        work = [s for s in self._segments if s[0] in layer.tables]
        shrunk = [layer.tables[slot].shrink(x[rows]) for slot, rows in work]
        if layer.shape.reduce is not None:
            shrunk = _reduce(shrunk, layer)
        for (slot, rows), part in zip(work, shrunk, strict=True):
            y = out[rows]
            layer.tables[slot].expand(y, part, self._traces)
            if not isinstance(rows, slice):
                out[rows] = y
        self._linear_in_ffn(out, x, layer)

    def _linear_in_ffn(self, out: Tensor, x: Tensor, layer: Layer) -> None:
        for slot, rows in self._segments:
            if slot == UNSERVED:
                out[rows] = 0
            if layer.gate_up_of is not None and slot in layer.gate_up_of.tables:
                table = layer.gate_up_of.tables[slot]
                layer.gate_up_of.states[slot] = table.route(x[rows], self._traces)
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

    def counters(self, slot: int) -> SlotCounters:
        sites: dict[str, SiteCounters] = {}
        for layer in self._linears:
            if slot in layer.tables:
                for router in layer.tables[slot].routers:
                    sites.update(router.counters())
        for ffn in self._ffns:
            if slot in ffn.tables:
                sites.update(ffn.tables[slot].router.counters())
        return SlotCounters(self._tokens[slot], sites)

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


def _reduce(shrunk: list[Shrunk], layer: Layer) -> list[Shrunk]:
    """Sums all segments' router logits over the ranks, in one collective."""
    logits = [part.logits for part in shrunk if part.logits is not None]
    if not logits:
        return shrunk
    assert layer.shape.reduce is not None
    total = layer.shape.reduce(torch.cat([part.flatten() for part in logits]))
    parts = iter(total.split([part.numel() for part in logits]))
    return [
        part if part.logits is None else Shrunk(part.rows, next(parts).view_as(part.logits))
        for part in shrunk
    ]
