"""The torch backend's serving tables: one adapter's weights for one linear or FFN, packed.

A table works in two steps. `shrink` turns the input into shrunk rows and router logits; `expand`
routes and adds to the output. Between them the logits may be summed over tensor-parallel ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.capture import Record
from molehill.kernels.counters import SiteCounters
from molehill.kernels.interface import ExpertScale, FfnPiece, LinearPiece
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Constant, Policy, Routing

# Elements of one [E, rows, I] intermediate of an FFN mixture; longer batches go in chunks.
FFN_CHUNK = 1 << 23


class Shrunk(NamedTuple):
    """A x `[T, R]` in the serving dtype, and router logits in float32 if routed, `[T, rows]` of
    all routers' rows."""

    rows: Tensor
    logits: Tensor | None


@dataclass
class Router:
    """Routers of one table that share policy and E: their logits are `[T, sites * rows]`, rows =
    E + policy.extra_rows.

    parameters: `[sites, policy.num_parameters]`, or None.
    Figures are kept per site: tokens that chose each expert, soft decisions, summed entropy.
    """

    sites: tuple[str, ...]
    experts: int
    policy: Policy
    parameters: Tensor | None = None
    decisions: int = 0
    counts: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.zeros(len(self.sites), self.experts + 2, dtype=torch.float64)

    @property
    def rows(self) -> int:
        """Router rows, and so columns of logits."""
        return len(self.sites) * (self.experts + self.policy.extra_rows)

    @property
    def gates(self) -> int:
        """Columns of gate weights."""
        return len(self.sites) * self.experts

    def route(self, logits: Tensor, record: Record | None) -> Routing:
        """Weights `[T, sites, E]` of `[T, sites * rows]` logits; counts them."""
        logits = logits.unflatten(1, (len(self.sites), -1))
        probabilities, routing = self.policy.decide(logits, self.parameters)
        self._count(routing)
        if record is not None:
            for i, site in enumerate(self.sites):
                record(site, probabilities[:, i], routing.weights[:, i], routing.entropy[:, i])
        return routing

    def _count(self, routing: Routing) -> None:
        self.decisions += routing.weights.shape[0]
        self.counts[:, :-2] += (routing.weights > 0).sum(0).to(self.counts)
        self.counts[:, -2] += routing.soft.sum(0).to(self.counts)
        self.counts[:, -1] += routing.entropy.sum(0).to(self.counts)

    def counters(self) -> Iterator[tuple[str, SiteCounters]]:
        for site, row in zip(self.sites, self.counts.tolist(), strict=True):
            *chosen, soft, entropy = row
            yield site, SiteCounters(self.decisions, int(soft), entropy, [int(n) for n in chosen])


@dataclass(frozen=True)
class PieceTable:
    """Where one piece's rank rows, gate weights and outputs lie in its table and its linear."""

    rows: slice
    gates: slice
    columns: slice
    b: Tensor
    scale: Tensor | None
    bias: Tensor | None
    added_bias: Tensor | None


class LinearTable:
    """Mixtures on one (possibly fused) linear: stacked A, stacked routers, B by projection.

    Constant gate weights are multiplied into B; their rank rows then have the gate weight 1.
    """

    def __init__(
        self, pieces: Sequence[LinearPiece], dtype: torch.dtype, device: torch.device
    ) -> None:
        routed = sorted((p for p in pieces if p.router is not None), key=_router_key)
        static = [p for p in pieces if p.router is None]
        static += [_shared(p) for p in routed if p.shared is not None]
        self.routers = _group(routed, device)
        self.gates = sum(router.gates for router in self.routers)
        self.projections: list[PieceTable] = []
        gate_of_row: list[Tensor] = []
        row = gate = 0
        for piece in [*routed, *static]:
            experts = piece.experts
            rank, out = experts.a.shape[0], experts.b.shape[0]
            weights = _constant_weights(piece)
            owner = experts.expert_of_row
            b = experts.b if weights is None else experts.b * weights[owner]
            scale = piece.output_scale
            if scale is not None and weights is not None:
                scale = weights @ scale
            routed_experts = len(experts.ranks) if weights is None else 0
            self.projections.append(
                PieceTable(
                    rows=slice(row, row + rank),
                    gates=slice(gate, gate + routed_experts),
                    columns=slice(piece.start, piece.start + out),
                    b=b.to(device, dtype),
                    scale=_floats(scale, device),
                    bias=_floats(piece.bias, device),
                    added_bias=_floats(piece.added_bias, device),
                )
            )
            constant = torch.full_like(owner, self.gates)
            gate_of_row.append(owner + gate if weights is None else constant)
            gate += routed_experts
            row += rank
        self.rank = row
        self.gate_of_row = torch.cat(gate_of_row).to(device)
        self._pack_shrink([*routed, *static], routed, dtype, device)

    def _pack_shrink(
        self,
        pieces: Sequence[LinearPiece],
        routed: Sequence[LinearPiece],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        a = torch.cat([piece.experts.a for piece in pieces]).to(device, dtype)
        routers = [piece.router for piece in routed if piece.router is not None]
        g = torch.cat(routers).to(device, torch.float32) if routers else None
        # In float32 routers and A rows are one GEMM; below that the routers keep their own dtype.
        fused = g is not None and dtype == torch.float32
        self.a = torch.cat([a, g]) if fused and g is not None else a
        self.g = None if fused else g

    def shrink(self, x: Tensor) -> Shrunk:
        """x `[T, in]`."""
        y = F.linear(x, self.a)
        if self.g is not None:
            return Shrunk(y, F.linear(x.float(), self.g))
        if self.gates:
            return Shrunk(y[:, : self.rank], y[:, self.rank :])
        return Shrunk(y, None)

    def expand(self, out: Tensor, shrunk: Shrunk, record: Record | None) -> None:
        """Changes `out [T, out]` in place."""
        rows, gates = shrunk.rows, None
        if shrunk.logits is not None:
            gates = self._gate_weights(shrunk.logits, record)
            rows = (rows * gates[:, self.gate_of_row]).to(out.dtype)
        for projection in self.projections:
            y = out[:, projection.columns]
            if projection.scale is not None:
                _scale_base(y, projection, gates)
            y.addmm_(rows[:, projection.rows], projection.b.T)
            if projection.added_bias is not None:
                y.add_(projection.added_bias)

    def _gate_weights(self, logits: Tensor, record: Record | None) -> Tensor:
        """`[T, sum E + 1]`; the last column is 1."""
        parts = [
            router.route(part, record).weights.flatten(1)
            for router, part in zip(
                self.routers, logits.split([r.rows for r in self.routers], dim=1), strict=True
            )
        ]
        return torch.cat([*parts, logits.new_ones(logits.shape[0], 1)], dim=1)

    @property
    def num_bytes(self) -> int:
        tensors = [self.a, self.g]
        tensors += [table for p in self.projections for table in (p.b, p.added_bias)]
        return sum(t.nbytes for t in tensors if t is not None)


def _floats(table: Tensor | None, device: torch.device) -> Tensor | None:
    return None if table is None else table.to(device, torch.float32)


def _shared(piece: LinearPiece) -> LinearPiece:
    """A piece's shared pair as a piece of its own."""
    assert piece.shared is not None
    return LinearPiece(piece.site, piece.start, piece.shared, Constant((1.0,)))


def _router_key(piece: LinearPiece) -> str:
    """Pieces with equal routers become neighbours; columns follow, so their order is free."""
    return f"{len(piece.experts.ranks):06d}{piece.policy}"


def _group(routed: Sequence[LinearPiece], device: torch.device) -> list[Router]:
    """Of sorted pieces."""
    routers = []
    for _, equals in groupby(routed, key=_router_key):
        pieces = list(equals)
        experts, policy = len(pieces[0].experts.ranks), pieces[0].policy
        tensors = [piece.parameters for piece in pieces if piece.parameters is not None]
        parameters = torch.stack(tensors).to(device, torch.float32) if tensors else None
        routers.append(Router(tuple(piece.site for piece in pieces), experts, policy, parameters))
    return routers


def _constant_weights(piece: LinearPiece) -> Tensor | None:
    """Gate weights `[E]` of a piece without a router, None with one."""
    constant = piece.policy.constant_weights
    return None if constant is None else torch.tensor(constant)


def _scale_base(y: Tensor, projection: PieceTable, gates: Tensor | None) -> None:
    """Multiplies the base output, less its bias, by sum_e w_e scale_e."""
    scale = projection.scale
    assert scale is not None
    if scale.dim() == 2:
        assert gates is not None
        scale = gates[:, projection.gates] @ scale
    if projection.bias is None:
        y.copy_(y * scale)
    else:
        y.copy_((y - projection.bias) * scale + projection.bias)


class FfnTable:
    """One FFN mixture. Experts of unequal rank are padded with zero rows to the largest."""

    def __init__(self, piece: FfnPiece, dtype: torch.dtype, device: torch.device) -> None:
        parameters = piece.parameters
        if parameters is not None:
            parameters = parameters.unsqueeze(0).to(device, torch.float32)
        self.router = Router((piece.site,), piece.num_experts, piece.policy, parameters)
        self.g = piece.router.to(device, torch.float32)
        self.act = ACTIVATIONS[piece.activation]
        self.gate = _pad(piece.gate, dtype, device)
        self.up = _pad(piece.up, dtype, device)
        self.down = _pad(piece.down, dtype, device)
        self.bias = None if piece.bias is None else piece.bias.to(device, dtype)
        self.gate_scale = _to(piece.gate_scale, device)
        self.up_scale = _to(piece.up_scale, device)

    def route(self, x: Tensor, record: Record | None) -> "FfnState":
        """x `[T, d]`, the FFN's input: gate weights and the input shrunk for gate and up."""
        routing = self.router.route(F.linear(x.float(), self.g), record)
        return FfnState(routing.weights.flatten(1), _shrink(self.gate, x), _shrink(self.up, x))

    def mix(self, gate_up: Tensor, state: "FfnState") -> Tensor:
        """h = sum_e w_e u_e `[T, I]` of pre-activations `[T, 2 I]`; `state` gets w_e A_e u_e."""
        experts, width = state.weights.shape[1], gate_up.shape[1] // 2
        rows = max(1, FFN_CHUNK // (experts * width))
        parts = [
            self._mix_rows(*chunk)
            for chunk in zip(
                gate_up.split(rows),
                state.weights.split(rows),
                _split(state.gate, rows, len(gate_up)),
                _split(state.up, rows, len(gate_up)),
                strict=True,
            )
        ]
        if self.down is not None:
            state.down = torch.cat([z for _, z in parts if z is not None])
        return torch.cat([h for h, _ in parts])

    def _mix_rows(
        self, gate_up: Tensor, weights: Tensor, a_gate: Tensor | None, a_up: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        gate, up = gate_up.float().unsqueeze(0).chunk(2, dim=-1)
        gate, up = _scaled(gate, self.gate_scale), _scaled(up, self.up_scale)
        u = self.act(gate + _delta(self.gate, a_gate)) * (up + _delta(self.up, a_up))
        u = u.expand(weights.shape[1], *u.shape[1:])
        h = torch.einsum("te,eti->ti", weights, u).to(gate_up.dtype)
        if self.down is None:
            return h, None
        z = torch.bmm(u.to(gate_up.dtype), self.down.a.transpose(1, 2)).transpose(0, 1)
        return h, (z * weights.unsqueeze(-1)).flatten(1).to(gate_up.dtype)

    def finish(self, out: Tensor, state: "FfnState") -> None:
        """Adds what the experts of down_proj add to `out [T, d]`, in place."""
        if self.down is not None and state.down is not None:
            out.addmm_(state.down, self.down.b.transpose(1, 2).flatten(0, 1))
        if self.bias is not None:
            # The base adds its bias once; the mixture adds it once per gate weight.
            out.add_((state.weights.sum(1, keepdim=True) - 1).to(out.dtype) * self.bias)

    @property
    def num_bytes(self) -> int:
        pairs = [p for p in (self.gate, self.up, self.down) if p is not None]
        scales = [s.factors.nbytes for s in (self.gate_scale, self.up_scale) if s is not None]
        return self.g.nbytes + sum(p.a.nbytes + p.b.nbytes for p in pairs) + sum(scales)


@dataclass
class FfnState:
    """What passes between the ops of one FFN in one step, for one adapter's rows."""

    weights: Tensor
    gate: Tensor | None
    up: Tensor | None
    down: Tensor | None = None


class Padded(NamedTuple):
    """a `[E, r, in]`, b `[E, out, r]`, r the largest rank."""

    a: Tensor
    b: Tensor


def _pad(experts: Experts | None, dtype: torch.dtype, device: torch.device) -> Padded | None:
    if experts is None:
        return None
    rank = max(experts.ranks)
    pairs = experts.split()
    a = torch.stack([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
    b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for _, b in pairs])
    return Padded(a.to(device, dtype).contiguous(), b.to(device, dtype).contiguous())


def _to(scale: ExpertScale | None, device: torch.device) -> ExpertScale | None:
    if scale is None:
        return None
    bias = None if scale.bias is None else scale.bias.to(device, torch.float32)
    return ExpertScale(scale.factors.to(device, torch.float32), bias)


def _scaled(base: Tensor, scale: ExpertScale | None) -> Tensor:
    """The base's pre-activations `[1, T, I]` as each expert scales them, `[E, T, I]`."""
    if scale is None:
        return base
    factors = scale.factors.unsqueeze(1)
    if scale.bias is None:
        return base * factors
    return (base - scale.bias) * factors + scale.bias


def _shrink(pair: Padded | None, x: Tensor) -> Tensor | None:
    return None if pair is None else F.linear(x, pair.a.flatten(0, 1))


def _delta(pair: Padded | None, shrunk: Tensor | None) -> Tensor | float:
    """B_e A_e x of every expert, `[E, T, out]` float32, from A x `[T, E * r]`."""
    if pair is None or shrunk is None:
        return 0.0
    experts, _, rank = pair.b.shape
    rows = shrunk.view(-1, experts, rank).transpose(0, 1)
    return torch.bmm(rows, pair.b.transpose(1, 2)).float()


def _split(tensor: Tensor | None, rows: int, total: int) -> Sequence[Tensor | None]:
    return [None] * -(-total // rows) if tensor is None else tensor.split(rows)
