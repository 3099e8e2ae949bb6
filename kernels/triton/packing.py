"""One adapter's weights as the matrices and records that the kernels read.

Packing only computes: a Packing lists what goes into the arena and, for every record, which fields
are the places of those matrices. The slot table writes it once the arena has room.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from molehill.kernels.interface import CapacityError, ExpertScale, FfnPiece, LinearPiece
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Policy, Sparsegen
from molehill.kernels.triton import layout as at
from molehill.kernels.triton.launch_config import Capacity
from molehill.kernels.triton.policy_encoding import UnsupportedPolicyError, encode

ACTIVATION_CODES = {
    "silu": at.SILU.value,
    "swish": at.SILU.value,
    "gelu": at.GELU.value,
    "gelu_new": at.GELU_TANH.value,
    "gelu_pytorch_tanh": at.GELU_TANH.value,
    "relu": at.RELU.value,
}


@dataclass
class Record:
    """Fields of one record; `places` maps a field to the matrix whose offset belongs there."""

    fields: list[int]
    places: dict[int, int] = field(default_factory=dict)
    parameters: list[float] = field(default_factory=lambda: [0.0] * at.POLICY.value)


@dataclass(frozen=True)
class RouterSite:
    """Where a router's decisions are found: columns of the logits, and row of the counters.

    handle, piece: of the linear, which for an FFN mixture is the gate_up linear.
    """

    name: str
    policy: Policy
    handle: int
    piece: int
    gate: int
    experts: int


@dataclass
class Packing:
    """Matrices `[rows, width]` in their serving dtype, rows padded to the pitch, and the records.

    heads, pieces: by linear handle; ffns: by FFN handle.
    """

    matrices: list[Tensor] = field(default_factory=list)
    heads: dict[int, Record] = field(default_factory=dict)
    pieces: dict[int, list[Record]] = field(default_factory=dict)
    ffns: dict[int, Record] = field(default_factory=dict)
    sites: list[RouterSite] = field(default_factory=list)

    @property
    def sizes(self) -> list[int]:
        return [matrix.nbytes for matrix in self.matrices]

    def add(self, matrix: Tensor, dtype: torch.dtype, over: int | None = None) -> int:
        """Number of a matrix `[rows, width]` that goes into the arena, in the place of `over`."""
        pitch = at.PITCH.value
        padded = -(-matrix.shape[1] // pitch) * pitch
        stored = torch.zeros(matrix.shape[0], padded, dtype=dtype)
        stored[:, : matrix.shape[1]] = matrix
        if over is not None:
            self.matrices[over] = stored
            return over
        self.matrices.append(stored)
        return len(self.matrices) - 1

    def add_integers(self, values: Sequence[int]) -> int:
        self.matrices.append(torch.tensor([list(values)], dtype=torch.int32))
        return len(self.matrices) - 1


@dataclass
class RowStack:
    """Rank rows and router rows that one linear's pieces (and FFN mixture) stack up."""

    name: str
    handle: int
    a: list[Tensor] = field(default_factory=list)
    routers: list[Tensor] = field(default_factory=list)
    rank: int = 0
    gates: int = 0
    mixed: int = 0
    finished: int = 0
    pieces: list[Record] = field(default_factory=list)

    def add_rows(self, a: Tensor) -> int:
        first, self.rank = self.rank, self.rank + a.shape[0]
        self.a.append(a)
        return first

    def add_router(self, router: Tensor) -> int:
        first, self.gates = self.gates, self.gates + router.shape[0]
        self.routers.append(router)
        return first

    def add_piece(self, record: Record) -> None:
        """The last of the stack's pieces; its finished rows begin at a multiple of the pitch."""
        pitch = at.PITCH.value
        record.fields[at.FINISHED.value] = self.finished
        self.finished += -(-record.fields[at.RANK.value] // pitch) * pitch
        self.pieces.append(record)

    def pop_piece(self) -> Record:
        record = self.pieces.pop()
        self.finished = record.fields[at.FINISHED.value]
        return record

    def check(self, capacity: Capacity) -> None:
        """Raises CapacityError."""
        for what, count, most in (
            ("rank rows", self.rank + self.mixed, capacity.rank),
            ("router rows", self.gates, capacity.gates),
            ("projections", len(self.pieces), capacity.pieces),
        ):
            if count > most:
                raise CapacityError(self.name, f"{count} {what}", f"at most {most}")

    def head(self, packing: Packing, dtype: torch.dtype) -> Record:
        record = Record([0] * at.HEAD.value)
        record.fields[at.HEAD_RANK.value] = self.rank
        record.fields[at.HEAD_GATES.value] = self.gates
        if self.rank:
            record.places[at.HEAD_A.value] = packing.add(torch.cat(self.a), dtype)
        if self.gates:
            record.places[at.HEAD_ROUTERS.value] = packing.add(
                torch.cat(self.routers), torch.float32
            )
        return record


def pack_piece(
    piece: LinearPiece, stack: RowStack, packing: Packing, dtype: torch.dtype, capacity: Capacity
) -> None:
    """Constant gate weights are multiplied into B and the output scale; no router is left then.

    The rows of a shared pair belong to no expert: their weight is always 1.
    """
    weights = _constant_weights(piece)
    experts = piece.experts
    a, b = experts.a, experts.b
    owner, scale = experts.expert_of_row, piece.output_scale
    if weights is not None:
        b = b * weights[owner]
        scale = None if scale is None else (weights @ scale).unsqueeze(0)
    record = Record([0] * at.PIECE.value)
    if piece.shared is not None:
        always = torch.full((sum(piece.shared.ranks),), at.EVERY_TOKEN.value)
        a, b = torch.cat([a, piece.shared.a]), torch.cat([b, piece.shared.b], dim=1)
        owner = torch.cat([owner, always])
    if weights is None and piece.router is not None:
        _route(record, piece, piece.router, stack, packing, capacity)
        record.places[at.OWNER.value] = packing.add_integers(owner.tolist())
    fields = record.fields
    fields[at.START.value], fields[at.WIDTH.value] = piece.start, b.shape[0]
    fields[at.ROW.value], fields[at.RANK.value] = stack.add_rows(a), b.shape[1]
    _without_scale(fields)
    if b.shape[1]:
        record.places[at.B.value] = packing.add(b.T, dtype)
    if scale is not None:
        record.places[at.SCALE.value] = packing.add(scale, torch.float32)
        if piece.bias is not None:
            record.places[at.BIAS.value] = packing.add(piece.bias.unsqueeze(0), torch.float32)
    if piece.added_bias is not None:
        fields[at.SCALE.value] = at.NO_SCALE.value
        row = piece.added_bias.unsqueeze(0)
        record.places[at.ADDED_BIAS.value] = packing.add(row, torch.float32)
    stack.add_piece(record)


def _without_scale(fields: list[int]) -> None:
    """Of a piece's record, until something else is written there."""
    fields[at.SCALE.value] = at.PLAIN_PIECE.value
    fields[at.BIAS.value] = fields[at.ADDED_BIAS.value] = -1


def pack_ffn(
    piece: FfnPiece,
    gate_up: RowStack,
    down: RowStack,
    packing: Packing,
    dtype: torch.dtype,
    capacity: Capacity,
) -> Record:
    """gate and up shrink with the gate_up linear; down's rows are expanded by the down linear."""
    record = Record([0] * at.FFN.value)
    fields, count = record.fields, piece.num_experts
    fields[at.ACTIVATION.value] = ACTIVATION_CODES[piece.activation]
    starts: list[int] = []
    for experts, place in ((piece.gate, at.GATE_B), (piece.up, at.UP_B), (piece.down, at.DOWN_A)):
        starts += _starts(experts, count)
        if experts is not None and starts[-1]:
            matrix = experts.a if place is at.DOWN_A else experts.b.T
            record.places[place.value] = packing.add(matrix, dtype)
    record.places[at.STARTS.value] = packing.add_integers(starts)
    routed = _pack_ffn_router(piece, gate_up, packing, capacity)
    for position in (at.GATE.value, at.EXPERTS.value):
        fields[position] = routed.fields[position]
    fields[at.GATE_ROW.value] = routed.fields[at.FINISHED.value]
    fields[at.UP_ROW.value] = fields[at.GATE_ROW.value] + starts[count]
    _pack_scale(piece.gate_scale, record, at.GATE_SCALE.value, at.GATE_BIAS.value, packing)
    _pack_scale(piece.up_scale, record, at.UP_SCALE.value, at.UP_BIAS.value, packing)
    _pack_down(piece, record, down, packing, dtype)
    return record


def _pack_ffn_router(
    piece: FfnPiece, gate_up: RowStack, packing: Packing, capacity: Capacity
) -> Record:
    """The piece that routes for an FFN mixture and finishes the rank rows of gate, then of up,
    ungated. It writes no columns."""
    record = Record([0] * at.PIECE.value)
    _route(record, piece, piece.router, gate_up, packing, capacity)
    first, owners = gate_up.rank, [0]
    for experts in (piece.gate, piece.up):
        if experts is not None:
            gate_up.add_rows(experts.a)
            owners[-1:-1] = experts.expert_of_row.tolist()
    record.fields[at.ROW.value], record.fields[at.RANK.value] = first, gate_up.rank - first
    _without_scale(record.fields)
    record.fields[at.UNGATED.value] = 1
    record.places[at.OWNER.value] = packing.add_integers(owners)
    gate_up.add_piece(record)
    return record


def _pack_scale(
    scale: ExpertScale | None, record: Record, factors: int, bias: int, packing: Packing
) -> None:
    """factors, bias: the fields of their places."""
    record.fields[factors] = record.fields[bias] = -1
    if scale is None:
        return
    record.places[factors] = packing.add(scale.factors, torch.float32)
    if scale.bias is not None:
        record.places[bias] = packing.add(scale.bias.unsqueeze(0), torch.float32)


def _pack_down(
    piece: FfnPiece, record: Record, down: RowStack, packing: Packing, dtype: torch.dtype
) -> None:
    """A piece of the down linear whose rows the FFN kernel made; the bias is one more rank row.

    An unrouted piece that writes the same columns becomes part of it: programs of two pieces would
    write the columns at the same time. Its rank rows lie just before those of the FFN kernel.
    """
    b = [] if piece.down is None else [piece.down.b.T]
    rank = sum(part.shape[0] for part in b)
    record.fields[at.DOWN_RANK.value] = rank
    if piece.bias is not None:
        record.fields[at.DOWN_BIAS.value] = 1
        b.append(piece.bias.unsqueeze(0))
    if not b:
        return
    down.mixed = sum(part.shape[0] for part in b)
    first, over = down.rank, None
    if len(down.pieces) == 1 and _is_plain(down.pieces[0]):
        plain = down.pop_piece()
        first, over = plain.fields[at.ROW.value], plain.places[at.B.value]
        b.insert(0, packing.matrices[over][:, : plain.fields[at.WIDTH.value]])
    stacked = torch.cat([part.float() for part in b])
    mixed = Record([0] * at.PIECE.value)
    mixed.fields[at.WIDTH.value] = stacked.shape[1]
    mixed.fields[at.RANK.value] = stacked.shape[0]
    mixed.fields[at.ROW.value] = first
    _without_scale(mixed.fields)
    mixed.places[at.B.value] = packing.add(stacked, dtype, over)
    down.add_piece(mixed)


def _is_plain(record: Record) -> bool:
    """A piece with neither router nor output scale nor an added bias."""
    scale = record.fields[at.SCALE.value]
    beside = at.SCALE.value in record.places or scale != at.PLAIN_PIECE.value
    return record.fields[at.EXPERTS.value] == 0 and not beside


def _starts(experts: Experts | None, count: int) -> list[int]:
    """First rank row of each expert, and the end: `[count + 1]`."""
    starts = [0]
    for rank in (0,) * count if experts is None else experts.ranks:
        starts.append(starts[-1] + rank)
    return starts


def _route(
    record: Record,
    piece: LinearPiece | FfnPiece,
    router: Tensor,
    stack: RowStack,
    packing: Packing,
    capacity: Capacity,
) -> None:
    """Writes the router's fields, of the next piece of the stack, and its site."""
    policy, experts = piece.policy, router.shape[0] - piece.policy.extra_rows
    if experts > capacity.experts:
        raise CapacityError(piece.site, f"{experts} experts", f"at most {capacity.experts}")
    try:
        encoded = encode(policy, experts, piece.parameters)
    except UnsupportedPolicyError as error:
        raise CapacityError(piece.site, f"the policy {policy}", error.expected) from None
    record.parameters = encoded.floats()
    gate = stack.add_router(router)
    record.fields[at.GATE.value], record.fields[at.EXPERTS.value] = gate, experts
    record.fields[at.KEEP.value : at.SCORES.value + 1] = encoded.integers()
    if isinstance(policy, Sparsegen):
        assert piece.parameters is not None
        mlp = piece.parameters[:-1].view(2, policy.hidden)
        record.fields[at.HIDDEN.value] = policy.hidden
        record.places[at.MLP.value] = packing.add(mlp, torch.float32)
    position = len(stack.pieces)
    packing.sites.append(RouterSite(piece.site, policy, stack.handle, position, gate, experts))


def _constant_weights(piece: LinearPiece) -> Tensor | None:
    """Gate weights `[E]` that no token changes, None where a router decides."""
    constant = piece.policy.constant_weights
    return None if constant is None else torch.tensor(constant)
