"""The interface of the backends, and the data that they share.

The engine registers each adapted linear and FFN once, stores an adapter's weights under a slot, and
tells before every step which rows of the batch belong to which slot. A model's forward then calls
ops that end in the backend: those of `molehill.kernels.custom_ops`, or the backend's own. Whatever
layout, packing or device memory a backend wants is its own business.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from molehill.kernels.counters import SlotCounters
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Policy
from molehill.kernels.routed_site import RoutedSite
from molehill.kernels.vocabulary_pieces import VocabularyPieces

CPU = torch.device("cpu")


class CapacityError(ValueError):
    """Weights beyond what a backend was built for, or beyond the memory that it has.

    where: the linear, site, slot or memory. found, expected: what there is, what there may be.
    """

    def __init__(self, where: str, found: object, expected: object) -> None:
        self.where, self.found, self.expected = where, str(found), str(expected)
        super().__init__(f"{where}: found {found}, expected {expected}")

    def __reduce__(self) -> tuple[type["CapacityError"], tuple[str, str, str]]:
        return type(self), (self.where, self.found, self.expected)


# The slot of rows whose adapter is not at hand. Raising inside a step would kill the engine and the
# base's answer would be a lie, so their outputs are set to zero.
UNSERVED = -2


@dataclass(frozen=True)
class LinearShape:
    """One (possibly fused) linear of the base model, as this rank sees it.

    dtype: of its activations; the serving copies of A and B are kept in it, routers in float32.
    reduce: sums router logits over the tensor-parallel ranks in place of each rank's part, for
    linears whose input is sharded; None elsewhere.
    """

    name: str
    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    reduce: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class BaseActivation:
    """How the base computes h = act(gate) * up of a gated FFN.

    name: of act, a key of ACTIVATIONS. is_rounded: whether act(gate) is rounded to the activations'
    dtype before it is multiplied.
    """

    name: str
    is_rounded: bool


@dataclass(frozen=True)
class FfnShape:
    """A gated FFN: `gate_up`, `down` are its linears' handles, `intermediate` this rank's width.

    activation: the base's, if the backend is to compute it (ActivatingBackend), else None.
    """

    name: str
    gate_up: int
    down: int
    intermediate: int
    activation: BaseActivation | None = None


@dataclass(frozen=True)
class LinearPiece:
    """One original projection of a fused linear, cut to this rank.

    experts.a `[R, in_local]`, experts.b `[out_local, R]` write columns `start` onwards.
    router: float32 `[E + policy.extra_rows, in_local]`; None with the policy Constant, and only
    with that: the one without the other is refused.
    parameters: float32 `[policy.num_parameters]` or None for none.
    output_scale: float32 `[E, out_local]`: the base output (less its bias) is multiplied by
    sum_e w_e output_scale[e] (DoRA; experts.b carries the same factor already).
    shared: one pair that every row gets with weight 1 beside the routed ones; only with a router.
    bias: float32 `[out_local]`, the base bias that this rank adds; only read with an output_scale.
    added_bias: float32 `[out_local]`, added to every row's output beside all else. A piece may be
    nothing more: experts of rank 0.
    """

    site: str
    start: int
    experts: Experts
    policy: Policy
    router: Tensor | None = None
    output_scale: Tensor | None = None
    bias: Tensor | None = None
    parameters: Tensor | None = None
    shared: Experts | None = None
    added_bias: Tensor | None = None


@dataclass(frozen=True)
class ExpertScale:
    """What expert e multiplies the base's output by, and the part of that output that it spares.

    factors: float32 `[E, out]`. bias: float32 `[out]` of the base, or None.
    """

    factors: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class FfnPiece:
    """An FFN mixture cut to this rank: `gate` and `up` write the intermediate, `down` reads it.

    The slot may have unrouted LinearPieces on the FFN's linears too: those change the base's own
    outputs, which every expert starts from.

    router: float32 `[E + policy.extra_rows, d]` (its input is never sharded). activation: a key of
    ACTIVATIONS. bias: float32 `[d]` of the base down_proj, or None. parameters: as in LinearPiece.
    gate_scale, up_scale: DoRA's; the experts' b carry the same factors already.
    """

    site: str
    policy: Policy
    router: Tensor
    activation: str
    gate: Experts | None
    up: Experts | None
    down: Experts | None
    bias: Tensor | None = None
    parameters: Tensor | None = None
    gate_scale: ExpertScale | None = None
    up_scale: ExpertScale | None = None

    @property
    def num_experts(self) -> int:
        return self.router.shape[0] - self.policy.extra_rows


class BaseExperts(Protocol):
    """The weights of a base model's experts on this rank, however the base keeps them."""

    def gate_up(self, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(W_gate x, W_up x) of one expert, each `[T, intermediate]`, of x `[T, hidden]`, with its
        biases if it has any."""

    def down(self, expert: int, h: Tensor) -> Tensor:
        """W_down h `[T, hidden]` of one expert, with its bias if it has one; on a tensor-parallel
        rank this rank's share."""


@dataclass(frozen=True)
class MoeShape:
    """A mixture-of-experts block of the base model, as this rank sees it.

    run: the base's own kernel: y `[T, hidden]` of x `[T, hidden]`, gate weights and chosen experts
    `[T, k]`. weights: what that kernel multiplies by. activation: as `activation.gated` takes it.
    hidden, intermediate: widths that LoRA on the experts must have; None if they are not known.
    """

    name: str
    experts: int
    activation: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    weights: BaseExperts
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    hidden: int | None = None
    intermediate: int | None = None


@dataclass(frozen=True)
class MoePiece:
    """LoRA on the experts of a base MoE block, cut to this rank.

    `ranks[e]` of each stack is that of base expert e, 0 where it is not adapted; None where no
    expert is. gate, up: A `[R, hidden]`, B `[intermediate, R]`; down: A `[R, intermediate]`,
    B `[hidden, R]`.
    """

    site: str
    gate: Experts | None
    up: Experts | None
    down: Experts | None


@dataclass(frozen=True)
class ScalePiece:
    """A mixture of vectors cut to this rank: it multiplies columns `start` onwards, head by head.

    vectors: float32 `[heads, E, width]`, of this rank's heads. router: float32 `[E, width]`, which
    reads what is multiplied.
    """

    site: str
    policy: Policy
    router: Tensor
    vectors: Tensor
    start: int = 0

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.vectors.shape[0] * self.vectors.shape[2])


@dataclass(frozen=True)
class SlotWeights:
    """All that one adapter brings to this rank, by the handles of registered linears, FFNs and
    MoE blocks.

    scales: multiply a linear's output, after its other mixtures. ffn_scales: multiply an FFN's
    intermediate, as one head; under tensor parallelism its router's logits are summed by the down
    linear's `reduce`. vocabulary: for molehill.kernels.vocabulary.
    """

    linears: Mapping[int, Sequence[LinearPiece]]
    ffns: Mapping[int, FfnPiece]
    scales: Mapping[int, Sequence[ScalePiece]] = field(default_factory=dict)
    ffn_scales: Mapping[int, ScalePiece] = field(default_factory=dict)
    moes: Mapping[int, MoePiece] = field(default_factory=dict)
    vocabulary: VocabularyPieces = field(default_factory=VocabularyPieces)

    @property
    def is_empty(self) -> bool:
        tables = self.linears or self.ffns or self.scales or self.ffn_scales or self.moes
        return not tables and self.vocabulary.is_empty

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of a serving copy, A and B in `dtype`, tables in float32, padding left out."""
        pairs: list[Experts] = []
        tables: list[Tensor | None] = []
        for piece in (piece for pieces in self.linears.values() for piece in pieces):
            pairs += [piece.experts] if piece.shared is None else [piece.experts, piece.shared]
            tables += [piece.router, piece.output_scale, piece.parameters, piece.added_bias]
        for ffn in self.ffns.values():
            pairs += [pair for pair in (ffn.gate, ffn.up, ffn.down) if pair is not None]
            scales = [scale for scale in (ffn.gate_scale, ffn.up_scale) if scale is not None]
            tables += [ffn.router, ffn.parameters, *(scale.factors for scale in scales)]
        scaled = [piece for pieces in self.scales.values() for piece in pieces]
        for vectors in [*scaled, *self.ffn_scales.values()]:
            tables += [vectors.router, vectors.vectors]
        for moe in self.moes.values():
            pairs += [pair for pair in (moe.gate, moe.up, moe.down) if pair is not None]
        on_vocabulary = (self.vocabulary.embedding, self.vocabulary.head)
        pairs += [piece.pair for piece in on_vocabulary if piece is not None and piece.pair]
        replaced = [piece.rows for piece in on_vocabulary if piece is not None and piece.rows]
        elements = sum(pair.a.numel() + pair.b.numel() for pair in pairs)
        elements += sum(table.rows.numel() for table in replaced)
        floats = sum(table.numel() for table in tables if table is not None)
        ids = sum(table.ids.numel() for table in replaced)
        return elements * dtype.itemsize + 4 * floats + 8 * ids


@dataclass(frozen=True)
class Packed:
    """What one backend has made of an adapter's weights, for its `store`. sites: its routers."""

    layout: Any
    sites: tuple[RoutedSite, ...] = ()


@dataclass(frozen=True)
class Run:
    """Rows `[start, stop)` of the batch that belong to one slot."""

    slot: int
    start: int
    stop: int


@dataclass(frozen=True)
class Trace:
    """What the router of one site decided for `rows` of a step: probabilities, weights, entropy.

    A router that reads heads one by one has an axis `heads` after the rows.
    """

    site: str
    probabilities: Tensor
    weights: Tensor
    entropy: Tensor


class KernelCompilations(Protocol):
    """Compilations of a backend's kernels. late: how many since `expect_none` was called."""

    late: int

    def expect_none(self) -> None:
        """All that may come is compiled."""


class Backend(Protocol):
    """Applies the mixtures of all slots to a batch. One instance per worker. What adapters do to
    the experts of MoE blocks (`SlotWeights.moes`) is left to molehill.kernels.moe_blocks, what they
    do to the vocabulary to molehill.kernels.vocabulary.

    linear_op(out, x, handle), ffn_op(h, gate_up, handle): what a model's forward calls, torch ops
    that end in `linear` and `ffn`; the handle is a one-element int64 CPU tensor.

    most_slots_per_step: how many different slots a step may have; None for any number.
    """

    name: str
    most_slots_per_step: int | None
    linear_op: Callable[..., Any]
    ffn_op: Callable[..., Any]

    def register_linear(self, shape: LinearShape) -> int:
        """Handle of a linear; called once per linear, before any weights are stored."""

    def register_ffn(self, shape: FfnShape) -> int:
        """Handle of an FFN whose linears are registered."""

    def seal(self) -> None:
        """Every linear and FFN is registered: whatever must have a fixed address is allocated."""

    def pack(self, weights: SlotWeights) -> Packed:
        """All of `store` that needs no pause between steps: may run in another thread beside one.

        Raises WeightsError for weights that do not fit their layers, CapacityError, MemoryError.
        """

    def store(self, slot: int, weights: SlotWeights | Packed) -> None:
        """Puts an adapter into an empty slot; on error the slot stays empty.

        Raises WeightsError, CapacityError before anything is written, MemoryError.
        """

    def erase(self, slot: int) -> Packed | None:
        """Frees a slot. Returns what it held if the backend can store that again, on the host: its
        memory goes with it."""

    def resident_bytes(self, slot: int) -> int:
        """Bytes that the slot's serving copy takes."""

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward; rows in no run belong to the base. Never raises."""

    def linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """Adds to `out [T, out]` what the mixtures of this step make of `x [T, in]`, and multiplies
        it by mixed vectors. For the gate_up linear of an FFN mixture: routes, and keeps the shrunk
        input for `ffn`."""

    def ffn(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        """Overwrites the FFN mixtures' rows of `h [T, I]` with sum_e w_e u_e, from the base's
        pre-activations `gate_up [T, 2 I]`, and keeps the shrunk u_e for the down linear. Multiplies
        `h` by mixed vectors."""

    def counters(self, slot: int) -> SlotCounters:
        """Counted since the slot was stored."""

    def routed_sites(self, slot: int) -> tuple[RoutedSite, ...]:
        """The routers of a slot, and where their gate weights are in a captured row."""

    def capture(self, rows: Sequence[int]) -> None:
        """Has the gate weights of some rows of the step that was just announced kept. Steps of
        which nobody says so cost nothing for it. Never raises."""

    def captured(self) -> Tensor:
        """Those rows of the last step, float32 `[rows, columns]`, see molehill.kernels.capture; the
        caller's own, on the backend's device."""

    def seconds(self) -> float | None:
        """Wall time that the ops took so far, base-only steps left out; None where it is not
        measured."""

    def watch_compilations(self) -> KernelCompilations | None:
        """Counts the compilations of kernels from here on, of a backend that compiles them when
        they are first launched; None of others."""

    def trace(self, enabled: bool) -> list[Trace]:
        """Returns what was recorded since tracing was switched on; for tests and debugging."""


@runtime_checkable
class SplitBackend(Backend, Protocol):
    """A backend whose `linear` has two halves, the first of which reads nothing but the linear's
    input: it may run beside the base's GEMM, on another stream. `linear` is both in sequence.

    Between the halves of one linear nothing of another one runs.
    """

    def begin_linear(self, x: Tensor, handle: int) -> None:
        """What can be done with `x [T, in]` before the base's output is there."""

    def finish_linear(self, out: Tensor, x: Tensor, handle: int) -> None:
        """The rest: changes `out [T, out]`, the base's output. `x` is what `begin_linear` got."""


@runtime_checkable
class ActivatingBackend(SplitBackend, Protocol):
    """A backend that computes the base's activation of an FFN together with what adapters change
    before and in it, if the FFN is registered with one. `finish_linear` of its gate_up linear then
    changes nothing, and neither does anybody call `ffn`.
    """

    def activate(self, h: Tensor, gate_up: Tensor, handle: int) -> None:
        """Fills `h [T, I]` for all rows, the base's too, from the base's pre-activations
        `gate_up [T, 2 I]`, once `begin_linear` of the gate_up linear is done. Does what
        `finish_linear` and `ffn` do beside the activation, and may change `gate_up`."""
