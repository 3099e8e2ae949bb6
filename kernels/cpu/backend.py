"""`Backend` in C++: keeps site names, and leaves the rest to the ops."""

import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from molehill.kernels.capture import routed_sites
from molehill.kernels.checked import CheckedBackend
from molehill.kernels.counters import SlotCounters
from molehill.kernels.cpu import build
from molehill.kernels.cpu.policy_codec import encode
from molehill.kernels.interface import (
    CapacityError,
    ExpertScale,
    FfnShape,
    LinearPiece,
    LinearShape,
    Packed,
    Run,
    ScalePiece,
    SlotWeights,
    Trace,
)
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Constant

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
MAX_ROUTER_ROWS = 1024
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_reductions: dict[int, Callable[[Tensor], Tensor]] = {}
_offered: list[bool] = []


class CpuBackend(CheckedBackend):
    """The mixtures of all slots on a CPU. See molehill.kernels.interface.Backend.

    isa: one of ISAS; None takes `$MOLEHILL_CPU_ISA`, else the best that the processor has. Raises
    BuildError if there is no library, ValueError for an isa that cannot be had. Activations are
    float32, bfloat16, or float16 (by conversion to float32). Only `pack` may run beside the others.

    linear_op, ffn_op: `(out, x, handle)` with the handle as a one-element int64 CPU tensor.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        super().__init__()
        build.load()
        _offer_reduce()
        self._ops = torch.ops.molehill_cpu
        self.isa = self._choose_isa(isa or os.environ.get("MOLEHILL_CPU_ISA"))
        self.linear_op: Callable[..., Any] = self._ops.linear.default
        self.ffn_op: Callable[..., Any] = self._ops.ffn.default
        self._id: int = self._ops.create(self.isa)
        self._linear_tensors: dict[int, Tensor] = {}
        self._ffn_tensors: dict[int, Tensor] = {}
        self._sites: dict[str, int] = {}
        self._slots: set[int] = set()
        self._captured = torch.zeros(0, 0)
        self._packing = threading.Lock()
        weakref.finalize(self, self._ops.destroy, self._id)

    def _add_linear(self, shape: LinearShape) -> int:
        """Handle of a linear, unique in the process. Raises ValueError (dtype, device)."""
        if shape.dtype not in _DTYPES or shape.device.type != "cpu":
            found = f"{shape.dtype} on {shape.device}"
            raise ValueError(f"{shape.name}: found {found}, expected one of {_DTYPES} on cpu")
        reduced = shape.reduce is not None
        handle: int = self._ops.register_linear(
            self._id, shape.in_features, shape.out_features, shape.dtype, reduced
        )
        self._linear_tensors[handle] = torch.tensor([handle])
        if shape.reduce is not None:
            _reductions[handle] = shape.reduce
            weakref.finalize(self, _reductions.pop, handle, None)
        return handle

    def _add_ffn(self, shape: FfnShape) -> int:
        handle = int(self._ops.register_ffn(shape.gate_up, shape.down, shape.intermediate))
        self._ffn_tensors[handle] = torch.tensor([handle])
        return handle

    def seal(self) -> None:
        """Nothing here has a fixed address."""

    def _pack(self, weights: SlotWeights) -> Packed:
        """In the ops' layout, in any thread. Raises CapacityError for too many router rows and for
        a policy that the C++ library does not know."""
        _check_policies(weights, self._ops.policies())
        with self._packing:
            return Packed(self._packed(weights))

    def _put(self, slot: int, packed: Packed) -> None:
        if slot < 0 or slot in self._slots:
            raise ValueError(f"slot: found {slot}, expected an empty slot, 0 or above")
        self._ops.store(self._id, packed.layout.number, slot)
        self._slots.add(slot)

    def erase(self, slot: int) -> Packed | None:
        """Frees a slot; rows that the announced step gives to it are unserved from here on."""
        self._slots.discard(slot)
        sites = self.routed_sites(slot)
        self._routed.pop(slot, None)
        number = self._ops.unstore(self._id, slot)
        return None if number < 0 else Packed(PackedSlot(self._ops, self._id, number), sites)

    def resident_bytes(self, slot: int) -> int:
        """Bytes of the packed weights and tables; 0 for an empty slot."""
        return int(self._ops.resident_bytes(self._id, slot))

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward. A run of a slot that holds nothing is unserved."""
        self._ops.begin_step(self._id, [n for r in runs for n in (r.slot, r.start, r.stop)])

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """Backend.linear."""
        self.linear_op(out, x, self._linear_tensors[handle])

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        """Backend.ffn."""
        self.ffn_op(h, gate_up, self._ffn_tensors[handle])

    def counters(self, slot: int) -> SlotCounters:
        """Counted since the slot was stored. Sites without a router decide nothing."""
        tokens, ids, experts, counts, entropy = self._ops.counters(self._id, slot)
        names = list(self._sites)
        sites = tuple(names[number] for number in ids)
        return SlotCounters(tokens, sites, tuple(experts), counts, entropy)

    def capture(self, rows: Sequence[int]) -> None:
        """Backend.capture."""
        self._captured = torch.zeros(len(rows), self._captured_columns)
        self._ops.capture(self._id, list(rows), self._captured)

    def captured(self) -> Tensor:
        """Backend.captured."""
        return self._captured

    def seconds(self) -> float:
        """Wall time of the ops' calls in steps that had adapters."""
        return float(self._ops.seconds(self._id))

    def trace(self, enabled: bool) -> list[Trace]:
        """What was recorded since the last call."""
        sites, tensors = self._ops.trace(self._id, enabled)
        names = list(self._sites)
        return [Trace(names[s], *tensors[3 * i : 3 * i + 3]) for i, s in enumerate(sites)]

    def _choose_isa(self, isa: str | None) -> str:
        usable = [name for name in ISAS if self._ops.supports(name)]
        if isa is not None and isa not in usable:
            raise ValueError(f"MOLEHILL_CPU_ISA: found {isa!r}, expected one of {usable}")
        return isa or usable[0]

    def _packed(self, weights: SlotWeights) -> "PackedSlot":
        dtype = next((shape.dtype for shape in self._layers.linears.values()), torch.float32)
        number = self._ops.stage(self._id, weights.num_bytes(dtype))
        packed = PackedSlot(self._ops, self._id, number)
        columns = {site.name: site.column for site in routed_sites(weights)}
        for handle, pieces in weights.linears.items():
            for piece in pieces:
                self._pack_linear(packed, handle, piece, columns.get(piece.site, 0))
                if piece.shared is not None:
                    shared = LinearPiece(piece.site, piece.start, piece.shared, Constant((1.0,)))
                    self._pack_linear(packed, handle, shared, 0)
        for handle, ffn in weights.ffns.items():
            dtype = self._layers.linears[self._layers.ffns[handle].gate_up].dtype
            self._ops.pack_ffn(
                packed.number,
                handle,
                self._site(ffn.site),
                columns[ffn.site],
                ffn.num_experts,
                _ACTIVATIONS[ffn.activation],
                *_pair(ffn.gate, dtype),
                *_pair(ffn.up, dtype),
                *_pair(ffn.down, dtype),
                *encode(ffn.policy, ffn.parameters),
                _floats(ffn.router),
                _floats(ffn.bias),
                *_scale(ffn.gate_scale),
                *_scale(ffn.up_scale),
            )
        for handle, scales in weights.scales.items():
            for scale in scales:
                site = self._site(scale.site), columns[scale.site]
                self._ops.pack_scale(packed.number, handle, *site, scale.start, *_vectors(scale))
        for handle, scale in weights.ffn_scales.items():
            site = self._site(scale.site), columns[scale.site]
            self._ops.pack_ffn_scale(packed.number, handle, *site, *_vectors(scale))
        return packed

    def _pack_linear(
        self, packed: "PackedSlot", handle: int, piece: LinearPiece, column: int
    ) -> None:
        self._ops.pack_linear(
            packed.number,
            handle,
            self._site(piece.site),
            column,
            piece.start,
            *_pair(piece.experts, self._layers.linears[handle].dtype),
            *encode(piece.policy, piece.parameters),
            _floats(piece.router),
            _floats(piece.output_scale),
            _floats(piece.bias),
            _floats(piece.added_bias),
        )

    def _site(self, name: str) -> int:
        return self._sites.setdefault(name, len(self._sites))


class PackedSlot:
    """A slot that is being packed or waits for `store`; if it is not stored, it goes with this."""

    def __init__(self, ops: Any, backend: int, number: int) -> None:
        self.number = number
        weakref.finalize(self, ops.drop, backend, number)


def _pair(
    experts: Experts | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """A and B as they are packed, and the ranks; nothing for a projection that is not adapted."""
    if experts is None:
        return None, None, []
    stored = torch.float32 if dtype == torch.float16 else dtype
    a, b = (t.detach().to("cpu", stored).contiguous() for t in (experts.a, experts.b))
    return a, b, list(experts.ranks)


def _check_policies(weights: SlotWeights, known: Sequence[str]) -> None:
    linears = [piece for pieces in weights.linears.values() for piece in pieces]
    scales = [piece for pieces in weights.scales.values() for piece in pieces]
    counts = [
        *((piece.site, piece.policy, len(piece.experts.ranks)) for piece in linears),
        *((ffn.site, ffn.policy, ffn.num_experts) for ffn in weights.ffns.values()),
        *(
            (scale.site, scale.policy, scale.vectors.shape[1])
            for scale in (*scales, *weights.ffn_scales.values())
        ),
    ]
    for site, policy, experts in counts:
        if type(policy).__name__ not in known:
            raise CapacityError(site, f"the policy {policy}", f"one of {', '.join(known)}")
        if experts + policy.extra_rows > MAX_ROUTER_ROWS:
            found = f"{experts} experts and {policy.extra_rows} more router rows"
            raise CapacityError(site, found, f"1 to {MAX_ROUTER_ROWS} in all")


def _scale(scale: ExpertScale | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if scale is None else (_floats(scale.factors), _floats(scale.bias))


def _vectors(
    piece: ScalePiece,
) -> tuple[str, Mapping[str, list[float]], Tensor | None, Tensor | None]:
    return *encode(piece.policy, None), _floats(piece.router), _floats(piece.vectors)


def _floats(table: Tensor | None) -> Tensor | None:
    return None if table is None else table.detach().to("cpu", torch.float32).contiguous()


def _offer_reduce() -> None:
    if not _offered:
        torch.library.impl("molehill_cpu::reduce", "cpu", _reduce)
        _offered.append(True)


def _reduce(logits: Tensor, handle: int) -> None:
    reduced = _reductions[handle](logits)
    if reduced is not logits:
        logits.copy_(reduced)
