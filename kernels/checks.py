"""Whether an adapter's weights fit the layers that they are for, before any backend sees them.

Kernels trust what is stored: Triton reads rows at an address and never asks whose they are, so an
A that was cut wrongly would be read into another adapter's rows. What only one backend cannot serve
it refuses itself, with a CapacityError.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.classifier import ClassifierPieces
from molehill.kernels.interface import (
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    MoePiece,
    MoeShape,
    ScalePiece,
    SlotWeights,
)
from molehill.kernels.mixture import Experts, VocabularyRows
from molehill.kernels.policy import Policy
from molehill.kernels.vocabulary_pieces import VocabularyPiece, VocabularyShape

Shape = tuple[int, ...]


class WeightsError(ValueError):
    """Weights that do not fit their layer.

    where: the site, its projection, and the tensor or field. found, expected: shapes, dtypes, or
    what else there is and should be.
    """

    def __init__(self, where: str, found: object, expected: object) -> None:
        self.where, self.found, self.expected = where, str(found), str(expected)
        super().__init__(f"{where}: found {found}, expected {expected}")

    def __reduce__(self) -> tuple[type["WeightsError"], tuple[str, str, str]]:
        return type(self), (self.where, self.found, self.expected)


@dataclass(frozen=True)
class Layers:
    """The shapes of registered linears and FFNs by their handles."""

    linears: dict[int, LinearShape] = field(default_factory=dict)
    ffns: dict[int, FfnShape] = field(default_factory=dict)


def check_ffn_shape(shape: FfnShape, layers: Layers) -> None:
    """Raises WeightsError if a linear of an FFN is unknown, or has another width or dtype."""
    for role, handle in (("gate_up", shape.gate_up), ("down", shape.down)):
        if handle not in layers.linears:
            raise WeightsError(f"{shape.name}: {role}", handle, "a registered linear's handle")
    gate_up, down = layers.linears[shape.gate_up], layers.linears[shape.down]
    _expect(f"{gate_up.name}: out_features", gate_up.out_features, 2 * shape.intermediate)
    _expect(f"{down.name}: in_features", down.in_features, shape.intermediate)
    _expect(f"{down.name}: dtype", down.dtype, gate_up.dtype)


def check_weights(weights: SlotWeights, layers: Layers) -> None:
    """All of an adapter but its `moes`, which MoeBlocks checks, and what it has on the vocabulary,
    which Vocabulary checks. Reads shapes and dtypes only.

    Raises WeightsError: what does not fit, and where.
    """
    for handle, pieces in weights.linears.items():
        for piece in pieces:
            _check_linear(piece, layers.linears.get(handle), handle)
        _check_apart(pieces)
    for handle, ffn in weights.ffns.items():
        _check_ffn(ffn, layers, handle)
    for handle, scales in weights.scales.items():
        for scale in scales:
            linear = layers.linears.get(handle)
            _check_scale(scale, linear.out_features if linear else None, handle)
    for handle, scale in weights.ffn_scales.items():
        mlp = layers.ffns.get(handle)
        _check_scale(scale, mlp.intermediate if mlp else None, handle, whole=True)


def check_moe(piece: MoePiece, shape: MoeShape) -> None:
    """LoRA on the experts of one MoE block. Raises WeightsError."""
    hidden, inner = shape.hidden, shape.intermediate
    for name, pair, inputs, outputs in (
        ("gate_proj", piece.gate, hidden, inner),
        ("up_proj", piece.up, hidden, inner),
        ("down_proj", piece.down, inner, hidden),
    ):
        if pair is not None:
            where = f"{piece.site}.{name}"
            _expect_dims(f"{where}: a", pair.a, 2)
            _expect_dims(f"{where}: b", pair.b, 2)
            ins = pair.a.shape[1] if inputs is None else inputs
            outs = pair.b.shape[0] if outputs is None else outputs
            _check_pair(where, pair, shape.experts, ins, outs)


def check_vocabulary(
    piece: VocabularyPiece, shape: VocabularyShape | None, *, of_embedding: bool
) -> VocabularyShape:
    """The shape that a piece fits. Raises WeightsError."""
    if shape is None:
        noun = "embedding" if of_embedding else "head"
        raise WeightsError(piece.site, f"a pair on the {noun}", f"a registered {noun}")
    inputs, outputs = shape.hidden, shape.tokens
    if of_embedding:
        inputs, outputs = outputs, inputs
    if piece.pair is not None:
        _check_pair(piece.site, piece.pair, len(piece.pair.ranks), inputs, outputs)
    if piece.rows is not None:
        _check_rows(piece.site, piece.rows, shape)
    return shape


def check_classified(
    pieces: ClassifierPieces, shapes: Mapping[int, LinearShape], hidden: int
) -> None:
    """Raises WeightsError if experts do not fit their linears or their classifier, or that the
    base's hidden states."""
    classifier = pieces.classifier
    _expect("classifier: inputs", classifier.layers[0][0].shape[1], hidden)
    for handle, linear in pieces.linears.items():
        shape = shapes.get(handle)
        for piece in linear:
            if shape is None:
                raise WeightsError(piece.site, f"handle {handle}", "a registered linear's")
            out = piece.experts.b.shape[0]
            if piece.start < 0 or piece.start + out > shape.out_features:
                columns = f"columns {piece.start} to {piece.start + out}"
                expected = f"at most {shape.out_features} of {shape.name}"
                raise WeightsError(piece.site, columns, expected)
            if not 0 <= piece.place < classifier.places:
                raise WeightsError(piece.site, f"place {piece.place}", classifier.places)
            _check_pair(piece.site, piece.experts, classifier.experts, shape.in_features, out)


def _check_rows(site: str, table: VocabularyRows, shape: VocabularyShape) -> None:
    count = len(table.ids)
    _expect(f"{site}: rows", tuple(table.rows.shape), (count, shape.hidden))
    _expect(f"{site}: ids", table.ids.dtype, torch.int64)
    if count and not (bool((table.ids.diff() > 0).all()) and table.ids[0] >= 0):
        raise WeightsError(f"{site}: ids", "others", "ascending ones, none below 0")
    if count and table.ids[-1] >= shape.tokens:
        raise WeightsError(f"{site}: ids", int(table.ids[-1]), f"below {shape.tokens}")


def _check_linear(piece: LinearPiece, shape: LinearShape | None, handle: int) -> None:
    site = piece.site
    if shape is None:
        raise WeightsError(site, f"handle {handle}", "a registered linear's")
    _expect_dims(f"{site}: b", piece.experts.b, 2)
    experts, out = len(piece.experts.ranks), piece.experts.b.shape[0]
    if piece.start < 0 or piece.start + out > shape.out_features:
        columns = f"columns {piece.start} to {piece.start + out}"
        raise WeightsError(site, columns, f"at most {shape.out_features} of {shape.name}")
    _check_pair(site, piece.experts, experts, shape.in_features, out)
    if piece.shared is not None:
        _check_pair(f"shared pair of {site}", piece.shared, 1, shape.in_features, out)
        if piece.router is None:
            raise WeightsError(f"{site}: shared pair", "no router", "one beside it")
    _check_routing(piece, experts, shape.in_features)
    _check_table(f"{site}: output_scale", piece.output_scale, (experts, out))
    _check_table(f"{site}: bias", piece.bias, (out,))
    _check_table(f"{site}: added_bias", piece.added_bias, (out,))


def _check_apart(pieces: Sequence[LinearPiece]) -> None:
    """Two pieces that wrote the same columns would do so at the same time on a GPU."""
    for one, other in pairwise(sorted(pieces, key=lambda piece: piece.start)):
        stop = one.start + one.experts.b.shape[0]
        if other.start < stop:
            found = f"columns from {other.start}"
            raise WeightsError(other.site, found, f"from {stop}, where {one.site} ends")


def _check_ffn(piece: FfnPiece, layers: Layers, handle: int) -> None:
    site, shape = piece.site, layers.ffns.get(handle)
    if shape is None:
        raise WeightsError(site, f"handle {handle}", "a registered FFN's")
    if piece.activation not in ACTIVATIONS:
        raise WeightsError(f"{site}: activation", repr(piece.activation), sorted(ACTIVATIONS))
    _expect_dims(f"{site}: router", piece.router, 2)
    experts, inner = piece.num_experts, shape.intermediate
    inputs = layers.linears[shape.gate_up].in_features
    outputs = layers.linears[shape.down].out_features
    for name, pair, ins, outs in (
        ("gate_proj", piece.gate, inputs, inner),
        ("up_proj", piece.up, inputs, inner),
        ("down_proj", piece.down, inner, outputs),
    ):
        if pair is not None:
            _check_pair(f"{site}.{name}", pair, experts, ins, outs)
    _check_routing(piece, experts, inputs)
    _check_table(f"{site}: bias", piece.bias, (outputs,))
    for name, scale in (("gate_proj", piece.gate_scale), ("up_proj", piece.up_scale)):
        if scale is not None:
            _check_table(f"{site}.{name}: factors", scale.factors, (experts, inner))
            _check_table(f"{site}.{name}: bias", scale.bias, (inner,))


def _check_scale(
    piece: ScalePiece, columns: int | None, handle: int, *, whole: bool = False
) -> None:
    """columns: of what it multiplies, None if that is unknown. whole: it is one head over all."""
    if columns is None:
        noun = "FFN" if whole else "linear"
        raise WeightsError(piece.site, f"handle {handle}", f"a registered {noun}'s")
    _expect_dims(f"{piece.site}: vectors", piece.vectors, 3)
    heads, experts, width = piece.vectors.shape
    _check_gate(piece.site, piece.policy, experts, has_router=True)
    if piece.policy.extra_rows or piece.policy.num_parameters:
        raise WeightsError(f"{piece.site}: policy", piece.policy, "one of the probabilities alone")
    _check_table(f"{piece.site}: router", piece.router, (experts, width))
    if whole:
        _expect(f"{piece.site}: vectors", (heads, width), (1, columns))
    elif piece.start < 0 or piece.columns.stop > columns:
        found = f"columns {piece.start} to {piece.columns.stop}"
        raise WeightsError(piece.site, found, f"at most {columns}")
    _check_table(f"{piece.site}: vectors", piece.vectors, (heads, experts, width))


def _check_pair(where: str, pair: Experts, experts: int, inputs: int, outputs: int) -> None:
    """where: the site and its projection."""
    rank = sum(pair.ranks)
    _expect(f"{where}: experts", len(pair.ranks), experts)
    if any(rank < 0 for rank in pair.ranks):
        raise WeightsError(f"{where}: ranks", pair.ranks, "none below 0")
    for name, half, shape in (("a", pair.a, (rank, inputs)), ("b", pair.b, (outputs, rank))):
        _expect(f"{where}: {name}", tuple(half.shape), shape)
        if not half.is_floating_point():
            raise WeightsError(f"{where}: {name}", half.dtype, "a floating-point dtype")


def _check_routing(piece: LinearPiece | FfnPiece, experts: int, inputs: int) -> None:
    rows = experts + piece.policy.extra_rows
    _check_gate(piece.site, piece.policy, experts, has_router=piece.router is not None)
    _check_table(f"{piece.site}: router", piece.router, (rows, inputs))
    count = piece.policy.num_parameters
    if piece.parameters is None or not count:
        found = None if piece.parameters is None else tuple(piece.parameters.shape)
        _expect(f"{piece.site}: parameters", found, (count,) if count else None)
    _check_table(f"{piece.site}: parameters", piece.parameters, (count,))


def _check_gate(site: str, policy: Policy, experts: int, *, has_router: bool) -> None:
    """Constant weights have no router, and every other policy has one: neither says what the one
    without the other would mean."""
    if experts < 1:
        raise WeightsError(site, f"{experts} experts", "at least 1")
    constant = policy.constant_weights
    if constant is not None:
        _expect(f"{site}: constant weights", len(constant), experts)
    elif policy.only_experts is not None:
        _expect(f"{site}: experts of the policy", policy.only_experts, experts)
    if has_router and constant is not None:
        raise WeightsError(f"{site}: router", "one beside constant weights", "none")
    if not has_router and constant is None:
        rows = experts + policy.extra_rows
        raise WeightsError(f"{site}: router", "none", f"{rows} rows for the policy {policy}")


def _check_table(where: str, table: Tensor | None, shape: Shape) -> None:
    """A float32 table, if it is there at all."""
    if table is not None:
        _expect(where, tuple(table.shape), shape)
        _expect(where, table.dtype, torch.float32)


def _expect_dims(where: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        raise WeightsError(where, tuple(tensor.shape), f"{dims} dimensions")


def _expect(where: str, found: object, expected: object) -> None:
    if found != expected:
        raise WeightsError(where, found, expected)
