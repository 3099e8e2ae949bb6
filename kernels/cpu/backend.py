"""`Backend` in C++: validates what is stored, keeps site names, and leaves the rest to the ops."""

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from molehill.kernels.backend import (
    CapacityError,
    ExpertScale,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    Packed,
    Run,
    ScalePiece,
    SlotWeights,
    Trace,
)
from molehill.kernels.counters import SlotCounters
from molehill.kernels.cpu import build
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import (
    AdaMoLE,
    Arrow,
    Constant,
    DynMoLE,
    Policy,
    Soft,
    Sparsegen,
    Threshold,
    TopK,
    TopP,
)

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
MAX_ROUTER_ROWS = 1024
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_new": 2, "gelu_pytorch_tanh": 2, "relu": 3}
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_reductions: dict[int, Callable[[Tensor], Tensor]] = {}
_offered: list[bool] = []


class CpuBackend:
    """The mixtures of all slots on a CPU. See molehill.kernels.backend.Backend.

    isa: one of ISAS; None takes `$MOLEHILL_CPU_ISA`, else the best that the processor has. Raises
    BuildError if there is no library, ValueError for an isa that cannot be had. Activations are
    float32, bfloat16, or float16 (by conversion to float32). Only `pack` may run beside the others.

    linear_op, ffn_op: `(out, x, handle)` with the handle as a one-element int64 CPU tensor.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        build.load()
        _offer_reduce()
        self._ops = torch.ops.molehill_cpu
        self.isa = self._choose_isa(isa or os.environ.get("MOLEHILL_CPU_ISA"))
        self.linear_op: Callable[..., Any] = self._ops.linear.default
        self.ffn_op: Callable[..., Any] = self._ops.ffn.default
        self._id: int = self._ops.create(self.isa)
        self._linears: dict[int, LinearShape] = {}
        self._ffns: dict[int, FfnShape] = {}
        self._linear_tensors: dict[int, Tensor] = {}
        self._ffn_tensors: dict[int, Tensor] = {}
        self._sites: dict[str, int] = {}
        self._slots: set[int] = set()
        self._packing = threading.Lock()
        weakref.finalize(self, self._ops.destroy, self._id)

    def register_linear(self, shape: LinearShape) -> int:
        """Handle of a linear, unique in the process. Raises ValueError (dtype, device)."""
        if shape.dtype not in _DTYPES or shape.device.type != "cpu":
            found = f"{shape.dtype} on {shape.device}"
            raise ValueError(f"{shape.name}: found {found}, expected one of {_DTYPES} on cpu")
        reduced = shape.reduce is not None
        handle: int = self._ops.register_linear(
            self._id, shape.in_features, shape.out_features, shape.dtype, reduced
        )
        self._linears[handle] = shape
        self._linear_tensors[handle] = torch.tensor([handle])
        if shape.reduce is not None:
            _reductions[handle] = shape.reduce
            weakref.finalize(self, _reductions.pop, handle, None)
        return handle

    def register_ffn(self, shape: FfnShape) -> int:
        """Handle of an FFN. Raises ValueError if a linear is unknown or has another width."""
        for role, handle in (("gate_up", shape.gate_up), ("down", shape.down)):
            if handle not in self._linears:
                raise ValueError(f"{shape.name}: {role}: found {handle}, expected a linear handle")
        gate_up, down = self._linears[shape.gate_up], self._linears[shape.down]
        _expect(gate_up.name, "out_features", gate_up.out_features, 2 * shape.intermediate)
        _expect(down.name, "in_features", down.in_features, shape.intermediate)
        _expect(down.name, "dtype", down.dtype, gate_up.dtype)
        handle = self._ops.register_ffn(shape.gate_up, shape.down, shape.intermediate)
        self._ffns[handle] = shape
        self._ffn_tensors[handle] = torch.tensor([handle])
        return int(handle)

    def seal(self) -> None:
        """Nothing here has a fixed address."""

    def pack(self, weights: SlotWeights) -> Packed:
        """In the ops' layout, in any thread. Raises ValueError: what does not fit, and where."""
        for handle, pieces in weights.linears.items():
            for piece in pieces:
                self._check_linear(handle, piece)
        for handle, ffn in weights.ffns.items():
            self._check_ffn(handle, ffn)
        for handle, scales in weights.scales.items():
            for scale in scales:
                _check_scale(scale, self._linears[handle].out_features)
        for handle, scale in weights.ffn_scales.items():
            _check_scale(scale, self._ffns[handle].intermediate, whole=True)
        with self._packing:
            return Packed(self._pack(weights))

    def store(self, slot: int, weights: SlotWeights | Packed) -> None:
        """Puts an adapter into an empty slot; raises as `pack` does."""
        if slot < 0 or slot in self._slots:
            raise ValueError(f"slot: found {slot}, expected an empty slot, 0 or above")
        packed = weights if isinstance(weights, Packed) else self.pack(weights)
        self._ops.store(self._id, packed.layout.number, slot)
        self._slots.add(slot)

    def erase(self, slot: int) -> Packed | None:
        """Frees a slot; rows that the announced step gives to it are unserved from here on."""
        self._slots.discard(slot)
        number = self._ops.unstore(self._id, slot)
        return None if number < 0 else Packed(Ticket(self._ops, self._id, number))

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
        """Figures since the slot was stored. Sites without a router decide nothing."""
        tokens, ids, experts, counts, entropy = self._ops.counters(self._id, slot)
        names = list(self._sites)
        own = tuple(names[number] for number in ids)
        return SlotCounters(tokens, own, tuple(experts), counts, entropy)

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

    def _check_linear(self, handle: int, piece: LinearPiece) -> None:
        site = piece.site
        if handle not in self._linears:
            raise ValueError(f"{site}: found handle {handle}, expected a registered linear's")
        shape, experts = self._linears[handle], len(piece.experts.ranks)
        out = piece.experts.b.shape[0]
        if piece.start < 0 or piece.start + out > shape.out_features:
            columns = f"columns {piece.start} to {piece.start + out}"
            raise ValueError(f"{site}: found {columns}, expected at most {shape.out_features}")
        _check_experts(site, piece.experts, experts, shape.in_features, out)
        if piece.shared is not None:
            _check_experts(site, piece.shared, 1, shape.in_features, out)
        _check_policy(site, piece.policy, experts)
        _check_router(piece, experts, shape.in_features)
        _check_table(site, "output_scale", piece.output_scale, (experts, out))
        _check_table(site, "bias", piece.bias, (out,))

    def _check_ffn(self, handle: int, piece: FfnPiece) -> None:
        if handle not in self._ffns:
            raise ValueError(f"{piece.site}: found handle {handle}, expected a registered FFN's")
        shape, experts = self._ffns[handle], piece.num_experts
        inputs = self._linears[shape.gate_up].in_features
        outputs = self._linears[shape.down].out_features
        if piece.activation not in _ACTIVATIONS:
            known = sorted(_ACTIVATIONS)
            raise ValueError(
                f"{piece.site}: activation: found {piece.activation!r}, expected {known}"
            )
        for name, pair, ins, outs in (
            ("gate", piece.gate, inputs, shape.intermediate),
            ("up", piece.up, inputs, shape.intermediate),
            ("down", piece.down, shape.intermediate, outputs),
        ):
            if pair is not None:
                _check_experts(f"{piece.site}.{name}", pair, experts, ins, outs)
        _check_policy(piece.site, piece.policy, experts)
        _check_router(piece, experts, inputs)
        _check_table(piece.site, "bias", piece.bias, (outputs,))
        for name, scale in (("gate_scale", piece.gate_scale), ("up_scale", piece.up_scale)):
            if scale is not None:
                width = shape.intermediate
                _check_table(piece.site, name, scale.factors, (experts, width))
                _check_table(piece.site, f"{name}: bias", scale.bias, (width,))

    def _pack(self, weights: SlotWeights) -> "Ticket":
        dtype = next((shape.dtype for shape in self._linears.values()), torch.float32)
        number = self._ops.stage(self._id, weights.num_bytes(dtype))
        ticket = Ticket(self._ops, self._id, number)
        for handle, pieces in weights.linears.items():
            for piece in pieces:
                self._pack_linear(ticket, handle, piece)
                if piece.shared is not None:
                    shared = LinearPiece(piece.site, piece.start, piece.shared, Constant((1.0,)))
                    self._pack_linear(ticket, handle, shared)
        for handle, ffn in weights.ffns.items():
            dtype = self._linears[self._ffns[handle].gate_up].dtype
            self._ops.pack_ffn(
                ticket.number,
                handle,
                self._site(ffn.site),
                _ACTIVATIONS[ffn.activation],
                *_pair(ffn.gate, dtype),
                *_pair(ffn.up, dtype),
                *_pair(ffn.down, dtype),
                *_policy_numbers(ffn.policy, ffn.parameters),
                _floats(ffn.router),
                _floats(ffn.bias),
                *_scale(ffn.gate_scale),
                *_scale(ffn.up_scale),
            )
        for handle, scales in weights.scales.items():
            for scale in scales:
                site = self._site(scale.site)
                self._ops.pack_scale(ticket.number, handle, site, scale.start, *_vectors(scale))
        for handle, scale in weights.ffn_scales.items():
            site = self._site(scale.site)
            self._ops.pack_ffn_scale(ticket.number, handle, site, *_vectors(scale))
        return ticket

    def _pack_linear(self, ticket: "Ticket", handle: int, piece: LinearPiece) -> None:
        self._ops.pack_linear(
            ticket.number,
            handle,
            self._site(piece.site),
            piece.start,
            *_pair(piece.experts, self._linears[handle].dtype),
            *_policy_numbers(_effective_policy(piece), piece.parameters),
            _floats(piece.router),
            _floats(piece.output_scale),
            _floats(piece.bias),
        )

    def _site(self, name: str) -> int:
        return self._sites.setdefault(name, len(self._sites))


class Ticket:
    """A slot that is being packed or waits for `store`; what is left of it goes with the ticket."""

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


def _expect(where: str, what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{where}: {what}: found {found}, expected {expected}")


def _check_experts(site: str, pair: Experts, experts: int, inputs: int, outputs: int) -> None:
    rank = sum(pair.ranks)
    _expect(site, "experts", len(pair.ranks), experts)
    _expect(site, "a", tuple(pair.a.shape), (rank, inputs))
    _expect(site, "b", tuple(pair.b.shape), (outputs, rank))


def _check_policy(site: str, policy: Policy, experts: int) -> None:
    if not 1 <= experts <= MAX_ROUTER_ROWS - policy.extra_rows:
        found = f"{experts} experts and {policy.extra_rows} more router rows"
        raise CapacityError(site, found, f"1 to {MAX_ROUTER_ROWS} in all")
    if isinstance(policy, Constant):
        _expect(site, "constant weights", len(policy.weights), experts)


def _check_router(piece: LinearPiece | FfnPiece, experts: int, inputs: int) -> None:
    """A policy that has more than a row for each expert does nothing without them."""
    rows, numbers = piece.policy.extra_rows, piece.policy.num_parameters
    if rows and piece.router is None:
        raise ValueError(f"{piece.site}: router: found none, expected {experts + rows} rows")
    _check_table(piece.site, "router", piece.router, (experts + rows, inputs))
    found = None if piece.parameters is None else tuple(piece.parameters.shape)
    _expect(piece.site, "parameters", found, (numbers,) if numbers else None)


def _check_table(site: str, name: str, table: Tensor | None, shape: tuple[int, ...]) -> None:
    if table is not None:
        _expect(site, name, tuple(table.shape), shape)


def _check_scale(piece: ScalePiece, columns: int, *, whole: bool = False) -> None:
    """whole: it must be one head over all columns."""
    heads, experts, width = piece.vectors.shape
    _check_policy(piece.site, piece.policy, experts)
    _check_table(piece.site, "router", piece.router, (experts, width))
    if whole:
        _expect(piece.site, "vectors", (heads, width), (1, columns))
    elif piece.start < 0 or piece.columns.stop > columns:
        found = f"columns {piece.start} to {piece.columns.stop}"
        raise ValueError(f"{piece.site}: found {found}, expected at most {columns}")


def _scale(scale: ExpertScale | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if scale is None else (_floats(scale.factors), _floats(scale.bias))


def _vectors(piece: ScalePiece) -> tuple[str, list[float], Tensor | None, Tensor | None]:
    return *_policy_numbers(piece.policy, None), _floats(piece.router), _floats(piece.vectors)


def _effective_policy(piece: LinearPiece) -> Policy:
    """Without a router every token has the weights of a uniform distribution."""
    if piece.router is not None:
        return piece.policy
    experts = len(piece.experts.ranks)
    uniform = torch.full((1, experts), 1 / experts)
    return Constant(tuple(piece.policy.route(uniform).weights[0].tolist()))


def _policy_numbers(policy: Policy, parameters: Tensor | None) -> tuple[str, list[float]]:
    """The name, and the fields and parameters that the ops parse."""
    numbers: list[float]
    match policy:
        case Constant(weights):
            numbers = list(weights)
        case Soft():
            numbers = []
        case TopK(k, normalize):
            numbers = [min(k, MAX_ROUTER_ROWS), normalize]
        case TopP(top_p, temperature):
            numbers = [top_p, temperature]
        case DynMoLE() as d:
            renyi = d.entropy_type == "renyi"
            entropy = [d.entropy_threshold, d.entropy_index, d.entropy_eps, renyi]
            switches = [d.normalize_weights, d.include_crossing, d.normalize_entropy]
            numbers = [d.top_p, min(d.keep_top_k, MAX_ROUTER_ROWS), *entropy, *switches]
        case Threshold(threshold):
            numbers = [threshold]
        case Arrow(k, temperature):
            numbers = [min(k, MAX_ROUTER_ROWS), temperature]
        case AdaMoLE(max_threshold):
            numbers = [max_threshold]
        case Sparsegen(hidden):
            numbers = [hidden]
    learned = [] if parameters is None else parameters.tolist()
    return type(policy).__name__, [float(n) for n in (*numbers, *learned)]


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
