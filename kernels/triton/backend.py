"""The Triton backend: mixtures on CUDA GPUs, safe to capture in CUDA graphs.

Two launches per fused linear and one more per FFN. What is launched, and with which grid, depends
on the number of tokens and on whether the step has any adapter at all (the key by which vLLM picks
a graph too); everything else is read from device memory. Tracing reads back, so it is for eager
runs only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molehill.kernels import custom_ops
from molehill.kernels.checked import CheckedBackend
from molehill.kernels.counters import SlotCounters
from molehill.kernels.interface import FfnShape, LinearShape, Packed, Run, SlotWeights, Trace
from molehill.kernels.triton import layout as at
from molehill.kernels.triton.expand import expand
from molehill.kernels.triton.ffn import ffn as launch_ffn
from molehill.kernels.triton.launch_config import (
    Capacity,
    Scratch,
    ScratchMemory,
    StripMemory,
    launch_config_for,
)
from molehill.kernels.triton.shrink import shrink
from molehill.kernels.triton.slot_table import SlotTable
from molehill.kernels.triton.tiling import buffer_size, table


class TritonBackend(CheckedBackend):
    """See molehill.kernels.interface.Backend. `device` holds the arena and all tables."""

    name = "triton"

    def __init__(self, device: torch.device, capacity: Capacity) -> None:
        super().__init__()
        self.capacity = capacity
        self._device = device
        self._linears: list[LinearShape] = []
        self._ffns: list[FfnShape] = []
        self._ffn_of_gate_up: dict[int, int] = {}
        self._ffn_of_down: dict[int, int] = {}
        self._table: SlotTable | None = None
        self._tokens: dict[int, int] = {}
        # What is in device memory is on the host too, so that it may come back without its files.
        self._packed: dict[int, Packed] = {}
        self._runs: list[Run] = []
        self._traces: list[Trace] | None = None
        size = buffer_size(capacity.tokens, capacity.adapters + 1)
        self._steps = torch.zeros(size, dtype=torch.int32, device=device)
        self.linear_op: Callable[..., Any] = torch.ops.molehill.linear.default
        self.ffn_op: Callable[..., Any] = torch.ops.molehill.ffn.default
        custom_ops.install(self)

    def _add_linear(self, shape: LinearShape) -> int:
        assert self._table is None, "linears are registered before adapters are stored"
        self._linears.append(shape)
        return len(self._linears) - 1

    def _add_ffn(self, shape: FfnShape) -> int:
        assert self._table is None, "FFNs are registered before adapters are stored"
        self._ffns.append(shape)
        handle = len(self._ffns) - 1
        self._ffn_of_gate_up[shape.gate_up] = self._ffn_of_down[shape.down] = handle
        return handle

    def seal(self) -> None:
        """Allocates all device memory, before vLLM measures what is left and before any capture."""
        _ = self.table

    @property
    def table(self) -> SlotTable:
        """The slot table. The first use allocates all device memory; before any graph capture."""
        if self._table is None:
            self._table = SlotTable(self._linears, self._ffns, self.capacity, self._device)
            # The scratch of a gate_up linear is read again by its FFN, after others have run.
            self._scratch = ScratchMemory(self.capacity, self._device)
            self._gate_up = self._scratch
            if self._ffns:
                self._gate_up = ScratchMemory(self.capacity, self._device)
                self._strips = StripMemory(self.capacity, self._device)
        return self._table

    def _pack(self, weights: SlotWeights) -> Packed:
        """On the host; copies to the device are left to `store`."""
        return Packed(self.table.pack(weights))

    def _put(self, slot: int, packed: Packed) -> None:
        self.table.store(slot, packed.layout)
        self._packed[slot] = packed
        self._tokens[slot] = 0

    def erase(self, slot: int) -> Packed | None:
        self.table.erase(slot)
        self._tokens.pop(slot, None)
        return self._packed.pop(slot, None)

    def resident_bytes(self, slot: int) -> int:
        return sum(extent.size for extent in self.table.extents.get(slot, ()))

    def begin_step(self, runs: Sequence[Run]) -> None:
        """One copy to the device, ordered on the stream; nothing waits for it."""
        if not runs and not self._runs:
            return
        self._runs = list(runs)
        stored = self.table.extents
        for run in runs:
            if run.slot in stored:
                self._tokens[run.slot] += run.stop - run.start
        steps = table(runs, stored, self.capacity.adapters, self.capacity.tokens)
        if self._steps.is_cuda:
            steps = steps.pin_memory()
        self._steps[: len(steps)].copy_(steps, non_blocking=True)

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """Both halves in sequence."""
        self.begin_linear(x, handle)
        self.finish_linear(out, x, handle)

    def begin_linear(self, x: Tensor, handle: int) -> None:
        """The half of `linear` that needs only its input `[T, in]`: may run beside the base's GEMM.

        Writes scratch, which `finish_linear` reads: nothing of another linear may run between.
        """
        if not self._runs or not len(x):
            return
        x = x if x.stride(-1) == 1 else x.contiguous()
        tokens, shape = len(x), self._linears[handle]
        slots, config = self.table, launch_config_for(tokens, self.capacity)
        mixed = None
        if handle in self._ffn_of_down:
            width = self._ffns[self._ffn_of_down[handle]].intermediate
            mixed = self._strips.of(tokens, width)
        arena = (slots.arena.view(shape.dtype), slots.arena.view(torch.float32))
        heads, scratch = slots.heads[:, handle], self._scratch_of(handle, tokens)
        shrink(x, self._steps, heads, arena, scratch, config, mixed)

    def finish_linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """The half of `linear` that changes `out [T, out]`, once the base's output is in it."""
        if not self._runs or not len(x):
            return
        tokens, shape = len(x), self._linears[handle]
        slots, config = self.table, launch_config_for(tokens, self.capacity)
        scratch = self._scratch_of(handle, tokens)
        if shape.reduce is not None:
            scratch = replace(scratch, logits=shape.reduce(scratch.logits))
        records = (
            slots.heads[:, handle],
            slots.pieces[:, handle],
            slots.parameters[:, handle],
            slots.counters[:, handle],
        )
        arena = slots.arena
        views = (arena.view(shape.dtype), arena.view(torch.float32), arena.view(torch.int32))
        trace = self._trace_buffer(tokens)
        expand(out, self._steps, records, views, scratch, config, trace)
        self._record(trace, handle, is_ffn=False)

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        if not self._runs or not len(h):
            return
        tokens, shape = len(h), self._ffns[handle]
        slots, config = self.table, launch_config_for(tokens, self.capacity)
        records = (
            slots.ffns[:, handle],
            slots.ffn_parameters[:, handle],
            slots.ffn_counters[:, handle],
        )
        dtype = self._linears[shape.gate_up].dtype
        floats, ints = slots.arena.view(torch.float32), slots.arena.view(torch.int32)
        arena = (slots.arena.view(dtype), floats, ints)
        scratch = self._scratch_of(shape.gate_up, tokens)
        strips = self._strips.of(tokens, shape.intermediate)
        trace = self._trace_buffer(tokens)
        launch_ffn(h, gate_up, self._steps, records, arena, scratch, strips, config, trace)
        self._record(trace, handle, is_ffn=True)

    def _scratch_of(self, handle: int, tokens: int) -> Scratch:
        memory = self._gate_up if handle in self._ffn_of_gate_up else self._scratch
        return memory.of(tokens, self._linears[handle].in_features)

    def counters(self, slot: int) -> SlotCounters:
        """Waits for the device: call it between steps."""
        sites = self.table.sites[slot]
        if not sites:
            return SlotCounters(self._tokens[slot])
        linears, ffns = self.table.counters[slot], self.table.ffn_counters[slot]
        pieces = linears.shape[1]
        rows = [
            len(linears) * pieces + site.handle
            if site.piece is None
            else site.handle * pieces + site.piece
            for site in sites
        ]
        found = torch.cat([linears.flatten(0, 1), ffns]).cpu()[rows]
        experts = tuple(site.experts for site in sites)
        decided = found[:, -at.FIGURES.value : -1]
        counts = torch.cat([decided, found[:, : max(experts)]], 1)
        names = tuple(site.name for site in sites)
        entropy = found[:, -1].double() / at.ENTROPY_UNIT.value
        return SlotCounters(self._tokens[slot], names, experts, counts, entropy)

    def seconds(self) -> None:
        """Not measured: launches return before the device has worked, and graphs replay unseen."""

    def trace(self, enabled: bool) -> list[Trace]:
        traces, self._traces = self._traces, [] if enabled else None
        return traces or []

    def _trace_buffer(self, tokens: int) -> Tensor | None:
        if self._traces is None:
            return None
        gates = launch_config_for(tokens, self.capacity).max_gates
        return torch.zeros(tokens, 2 * gates, device=self._device)

    def _record(self, buffer: Tensor | None, handle: int, is_ffn: bool) -> None:
        """Probabilities and weights are the kernel's; the entropy is worked out from them."""
        if buffer is None or self._traces is None:
            return
        for run in self._runs:
            for site in self.table.sites.get(run.slot, ()):
                if site.handle == handle and (site.piece is None) == is_ffn:
                    p, w = (
                        half[run.start : run.stop, site.gate : site.gate + site.experts].clone()
                        for half in buffer.chunk(2, dim=1)
                    )
                    self._traces.append(Trace(site.name, p, w, site.policy.entropy(p)))
