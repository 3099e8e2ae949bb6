"""The Triton backend: mixtures on CUDA GPUs, safe to capture in CUDA graphs.

Three launches per fused linear, of which two need only its input and may run beside the base's
GEMM. The third of an FFN's gate_up linear is the FFN's activation too, in place of the base's own
launch; where it cannot be, one more launch follows the base's. What is launched, and with which
grid, depends on the number of tokens and on whether the step has any adapter at all (the key by
which vLLM picks a graph too); everything else is read from device memory. Tracing reads back, so it
is for eager runs only.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from molehill.kernels import custom_ops
from molehill.kernels.capture import Capture, Record, recorder
from molehill.kernels.checked import CheckedBackend
from molehill.kernels.counters import SlotCounters
from molehill.kernels.interface import FfnShape, LinearShape, Packed, Run, SlotWeights, Trace
from molehill.kernels.triton import layout as at
from molehill.kernels.triton.activate import activate as launch_activate
from molehill.kernels.triton.captured_gates import CapturedGates
from molehill.kernels.triton.compilations import Compilations
from molehill.kernels.triton.expand import expand
from molehill.kernels.triton.ffn import ffn as launch_ffn
from molehill.kernels.triton.gate import gate
from molehill.kernels.triton.launch_config import (
    Capacity,
    Scratch,
    ScratchMemory,
    StripMemory,
    launch_config_for,
)
from molehill.kernels.triton.packing import ACTIVATION_CODES
from molehill.kernels.triton.shrink import shrink
from molehill.kernels.triton.slot_records import SlotRecords
from molehill.kernels.triton.tiling import StepLayout, step_table
from molehill.kernels.triton.vector_folding import fold_vectors
from molehill.kernels.triton.vectors import Vectors


class TritonBackend(CheckedBackend):
    """See molehill.kernels.interface.Backend. `device` holds the arena and all tables."""

    name = "triton"

    def __init__(self, device: torch.device, capacity: Capacity) -> None:
        super().__init__()
        self.capacity = capacity
        self.most_slots_per_step = capacity.adapters
        self._device = device
        self._linears: list[LinearShape] = []
        self._ffns: list[FfnShape] = []
        self._ffn_of_gate_up: dict[int, int] = {}
        self._ffn_of_down: dict[int, int] = {}
        self._table: SlotRecords | None = None
        self._vectors = Vectors(device)
        self._tokens: dict[int, int] = {}
        # What is in device memory is on the host too, so that it may come back without its files.
        self._packed: dict[int, Packed] = {}
        self._runs: list[Run] = []
        self._traces: list[Trace] | None = None
        self._gates: CapturedGates | None = None
        self._capture: Capture | None = None
        self._captured_rows: list[int] = []
        size = StepLayout(capacity.tokens, capacity.adapters + 1).size
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
    def table(self) -> SlotRecords:
        """The slot table. The first use allocates all device memory; before any graph capture."""
        if self._table is None:
            self._table = SlotRecords(self._linears, self._ffns, self.capacity, self._device)
            # The scratch of a gate_up linear is read again by its FFN, after others have run.
            self._scratch = ScratchMemory(self.capacity, self._device)
            self._gate_up = self._scratch
            if self._ffns:
                self._gate_up = ScratchMemory(self.capacity, self._device)
                self._strips = StripMemory(self.capacity, self._device)
            if self.capacity.captures:
                self._gates = CapturedGates(len(self._linears), self.capacity, self._device)
        return self._table

    def _pack(self, weights: SlotWeights) -> Packed:
        """On the host; copies to the device are left to `store`."""
        if not self.capacity.vectors:
            weights = fold_vectors(weights, self._linears, self._ffns)
        return Packed((self.table.pack(weights), weights.scales, weights.ffn_scales))

    def _put(self, slot: int, packed: Packed) -> None:
        packing, scales, ffn_scales = packed.layout
        self.table.store(slot, packing)
        self._vectors.store(slot, scales, ffn_scales)
        self._packed[slot] = packed
        self._tokens[slot] = 0

    def erase(self, slot: int) -> Packed | None:
        self.table.erase(slot)
        self._routed.pop(slot, None)
        self._vectors.erase(slot)
        self._tokens.pop(slot, None)
        return self._packed.pop(slot, None)

    def resident_bytes(self, slot: int) -> int:
        extents = self.table.extents.get(slot, ())
        return sum(extent.size for extent in extents) + self._vectors.num_bytes(slot)

    def begin_step(self, runs: Sequence[Run]) -> None:
        """One copy to the device, ordered on the stream; nothing waits for it."""
        self._capture = None
        if not runs and not self._runs:
            return
        self._runs = list(runs)
        stored = self.table.extents
        for run in runs:
            if run.slot in stored:
                self._tokens[run.slot] += run.stop - run.start
        steps = step_table(runs, stored, self.capacity.adapters, self.capacity.tokens)
        if self._steps.is_cuda:
            steps = steps.pin_memory()
        self._steps[: len(steps)].copy_(steps, non_blocking=True)

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """Both halves in sequence."""
        self.begin_linear(x, handle)
        self.finish_linear(out, x, handle)

    def begin_linear(self, x: Tensor, handle: int) -> None:
        """The half of `linear` that needs only its input `[T, in]`: may run beside the base's GEMM.

        Writes scratch, which `finish_linear` reads: nothing of another linear may run between. A
        sharded input's logits are summed over the ranks here.
        """
        if not self._runs or not len(x):
            return
        x = x if x.stride(-1) == 1 else x.contiguous()
        tokens, shape = len(x), self._linears[handle]
        slots, config = self.table, launch_config_for(tokens, self.capacity)
        heads, scratch = slots.heads[:, handle], self._scratch_of(handle, tokens)
        weights, floats = slots.arena.view(shape.dtype), slots.arena.view(torch.float32)
        shrink(x, self._steps, heads, (weights, floats), scratch, config)
        if shape.reduce is not None:
            total = shape.reduce(scratch.logits.sum(0, keepdim=True))
            scratch = replace(scratch, logits=total)
        records = (
            heads,
            slots.pieces[:, handle],
            slots.parameters[:, handle],
            slots.counters[:, handle],
        )
        mixed, trace = self._mixed(handle, tokens), self._trace_buffer(handle, tokens)
        pairs = self._strips.pairs if handle in self._ffn_of_gate_up else None
        views = weights, floats, slots.arena.view(torch.int32)
        gate(x, self._steps, records, views, scratch, config, mixed, pairs, trace)
        self._record(trace, handle)

    def finish_linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """The half of `linear` that changes `out [T, out]`, once the base's output is in it: left
        to `activate` where that comes next."""
        if not self._runs or not len(x) or self._activated_after(handle):
            return
        tokens, slots = len(x), self.table
        views = (slots.arena.view(self._linears[handle].dtype), slots.arena.view(torch.float32))
        config, scratch = launch_config_for(tokens, self.capacity), self._scratch_of(handle, tokens)
        expand(out, self._steps, slots.pieces[:, handle], views, scratch, config)
        self._vectors.scale_linear(out, handle, self._runs, self._recording)

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        if not self._runs or not len(h):
            return
        tokens, shape, slots = len(h), self._ffns[handle], self.table
        config, arena = launch_config_for(tokens, self.capacity), slots.arena
        dtype = self._linears[shape.gate_up].dtype
        views = (arena.view(dtype), arena.view(torch.float32), arena.view(torch.int32))
        scratch = self._scratch_of(shape.gate_up, tokens)
        strips = self._strips.of(tokens, shape.intermediate)
        records = slots.ffns[:, handle]
        pairs = self._strips.pairs
        launch_ffn(h, gate_up, self._steps, records, views, scratch, pairs, strips, config)
        reduce = self._linears[shape.down].reduce
        self._vectors.scale_ffn(h, handle, self._runs, reduce, self._recording)

    def activate(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        """ActivatingBackend.activate."""
        tokens, shape, slots = len(h), self._ffns[handle], self.table
        if not tokens:
            return
        assert shape.activation is not None, "an FFN registered with its activation"
        arena, dtype = slots.arena, self._linears[shape.gate_up].dtype
        views = (arena.view(dtype), arena.view(torch.float32), arena.view(torch.int32))
        activation = ACTIVATION_CODES[shape.activation.name], shape.activation.is_rounded
        launch_activate(
            h,
            gate_up,
            self._steps,
            (slots.pieces[:, shape.gate_up], slots.ffns[:, handle]),
            views,
            self._scratch_of(shape.gate_up, tokens),
            self._strips.pairs,
            self._strips.of(tokens, shape.intermediate),
            activation,
            launch_config_for(tokens, self.capacity),
        )

    def _activated_after(self, handle: int) -> bool:
        """Whether a linear is the gate_up linear of an FFN that is registered with its
        activation."""
        ffn = self._ffn_of_gate_up.get(handle)
        return ffn is not None and self._ffns[ffn].activation is not None

    def _scratch_of(self, handle: int, tokens: int) -> Scratch:
        memory = self._gate_up if handle in self._ffn_of_gate_up else self._scratch
        shape = self._linears[handle]
        return memory.of(tokens, shape.in_features, shape.dtype)

    def _mixed(self, handle: int, tokens: int) -> Tensor | None:
        """The strips that an FFN mixture has left for its down linear."""
        if handle not in self._ffn_of_down:
            return None
        return self._strips.of(tokens, self._ffns[self._ffn_of_down[handle]].intermediate)

    def counters(self, slot: int) -> SlotCounters:
        """Waits for the device: call it between steps."""
        counters = self._kernel_counters(slot)
        vectors = self._vectors.counters(slot)
        return SlotCounters.of(counters.tokens, counters.sites | vectors) if vectors else counters

    def _kernel_counters(self, slot: int) -> SlotCounters:
        sites = self.table.sites[slot]
        if not sites:
            return SlotCounters(self._tokens[slot])
        pieces = self.table.counters.shape[2]
        rows = [site.handle * pieces + site.piece for site in sites]
        rows_of_sites = self.table.counters[slot].flatten(0, 1).cpu()[rows]
        experts = tuple(site.experts for site in sites)
        config = launch_config_for(self.capacity.tokens, self.capacity)
        totals = rows_of_sites[:, config.max_experts :]
        counts = torch.cat(
            [totals[:, : at.TOTAL_ENTROPY.value], rows_of_sites[:, : max(experts)]], 1
        )
        names = tuple(site.name for site in sites)
        entropy = totals[:, at.TOTAL_ENTROPY.value].double() / at.ENTROPY_UNIT.value
        return SlotCounters(self._tokens[slot], names, experts, counts, entropy)

    def seconds(self) -> None:
        """Not measured: launches return before the device has worked, and graphs replay unseen."""

    def watch_compilations(self) -> Compilations:
        """Backend.watch_compilations, of all Triton kernels of this process."""
        compilations = Compilations()
        compilations.watch()
        return compilations

    def trace(self, enabled: bool) -> list[Trace]:
        traces, self._traces = self._traces, [] if enabled else None
        return traces or []

    def _trace_buffer(self, handle: int, tokens: int) -> Tensor | None:
        if self._gates is not None:
            return self._gates.of(handle, tokens)
        if self._traces is None:
            return None
        gates = launch_config_for(tokens, self.capacity).max_gates
        return torch.zeros(tokens, 2 * gates, device=self._device)

    def capture(self, rows: Sequence[int]) -> None:
        """Backend.capture, where the capacity has it."""
        self._captured_rows = list(rows)
        self._capture = Capture(rows, self._captured_columns, self._device)

    def captured(self) -> Tensor:
        """Backend.captured. Nothing waits for the device."""
        if self._capture is None:
            return torch.zeros(0, 0)
        if self._gates is not None:
            for run in self._runs:
                rows = [row for row in self._captured_rows if run.start <= row < run.stop]
                for site in self.table.sites.get(run.slot, ()) if rows else ():
                    weights = self._gates.weights(site.handle, rows, site.gate, site.experts)
                    routed = self._routed[run.slot][site.name]
                    self._capture.keep(torch.tensor(rows), routed, weights)
        return self._capture.weights

    def _recording(self, slot: int, rows: slice) -> Record | None:
        """What takes the decisions for a run; None if nobody wants them."""
        return recorder(self._traces, self._capture, self._routed.get(slot, {}), rows)

    def _record(self, buffer: Tensor | None, handle: int) -> None:
        """Probabilities and weights are the kernel's; the entropy is worked out from them."""
        if buffer is None or self._traces is None:
            return
        for run in self._runs:
            for site in self.table.sites.get(run.slot, ()):
                if site.handle == handle:
                    p, w = (
                        half[run.start : run.stop, site.gate : site.gate + site.experts].clone()
                        for half in buffer.chunk(2, dim=1)
                    )
                    self._traces.append(Trace(site.name, p, w, site.policy.entropy(p)))
