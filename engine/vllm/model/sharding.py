"""Cuts a canonical mixture to what this tensor-parallel rank computes.

Column-parallel linears split B's outputs and see the whole input. Row-parallel ones split the
input of A and router, keep B whole, and their partial outputs are summed by vLLM; their router
logits are summed before the softmax (LinearShape.reduce). A mixture of vectors on an output is
routed head by head, by whichever rank has the head; on an FFN's intermediate, each rank has a part
of the one head.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from molehill.engine.adapter.errors import UnsupportedError
from molehill.engine.adapter.expert_pairs import stack
from molehill.engine.vllm.model import layer_weight
from molehill.engine.vllm.model.discovery import Ffn, Linear
from molehill.engine.vllm.model.moe_blocks import MoeBlock
from molehill.engine.vllm.model.projections import Projection
from molehill.kernels.classifier import ClassifierPiece
from molehill.kernels.interface import ExpertScale, FfnPiece, LinearPiece, MoePiece, ScalePiece
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Reflection,
    ScaleMixture,
)
from molehill.kernels.policy import Constant


def cut_experts(experts: Experts, projection: Projection) -> Experts:
    """This rank's inputs of A and outputs of B."""
    parts = [experts.b[part.start : part.stop] for part in projection.outputs]
    b = parts[0] if len(parts) == 1 else torch.cat(parts)
    return Experts(_cut_inputs(experts.a, projection), b, experts.ranks)


def _cut_inputs(rows: Tensor, projection: Projection) -> Tensor:
    return rows[:, projection.inputs.start : projection.inputs.stop]


def cut_linear(
    mixture: LinearMixture,
    linear: Linear,
    projection: Projection,
    total: Callable[[Tensor], Tensor],
) -> LinearPiece:
    """total: sums a tensor over the ranks that share the linear's input (for DoRA's norm)."""
    piece = LinearPiece(
        projection.site,
        projection.start,
        cut_experts(mixture.experts, projection),
        mixture.policy,
        None if mixture.router is None else _cut_inputs(mixture.router, projection),
        parameters=mixture.parameters,
        shared=None if mixture.shared is None else cut_experts(mixture.shared, projection),
    )
    if mixture.magnitude is None:
        return piece
    return _with_magnitude(piece, mixture.magnitude, linear, projection, total)


def cut_classified(mixture: ClassifierMixture, projection: Projection) -> ClassifierPiece:
    experts = cut_experts(mixture.experts, projection)
    return ClassifierPiece(projection.site, projection.start, experts, mixture.place)


def _with_magnitude(
    piece: LinearPiece,
    magnitude: Tensor,
    linear: Linear,
    projection: Projection,
    total: Callable[[Tensor], Tensor],
) -> LinearPiece:
    """DoRA: the factor m / ||W + B A|| on the base output and on B, computed once, in float32."""
    experts = piece.experts
    columns = slice(piece.start, piece.start + experts.b.shape[0])
    adapted = layer_weight.read(linear)[columns] + experts.b @ experts.a
    norm = adapted.square().sum(1)
    norm = (total(norm) if linear.input_is_sharded else norm).sqrt()
    magnitudes = torch.cat([magnitude[part.start : part.stop] for part in projection.outputs])
    scale = magnitudes / norm
    bias = getattr(linear.module, "bias", None)
    if linear.input_is_sharded and linear.module.tp_rank > 0:
        bias = None  # vLLM adds a row-parallel bias on the first rank alone
    return dataclasses.replace(
        piece,
        experts=Experts(experts.a, experts.b * scale[:, None], experts.ranks),
        output_scale=scale.expand(len(experts.ranks), -1).contiguous(),
        bias=None if bias is None else bias.detach().float().cpu()[columns],
    )


def cut_reflection(
    mixture: Reflection,
    linear: Linear,
    projection: Projection,
    total: Callable[[Tensor], Tensor],
) -> LinearPiece:
    """The pair (A, -W U), computed once, in float32.

    total: sums a tensor over the ranks that share the linear's input, each of which has a part of
    W U."""
    columns = slice(projection.start, projection.start + sum(map(len, projection.outputs)))
    inputs = slice(projection.inputs.start, projection.inputs.stop)
    part = Reflection(mixture.a[:, inputs].contiguous(), mixture.u[inputs])
    pair = part.pair(layer_weight.read(linear)[columns])
    if linear.input_is_sharded:
        pair = dataclasses.replace(pair, b=total(pair.b))
    return LinearPiece(projection.site, projection.start, pair, mixture.policy, None)


def cut_bias(bias: Bias, linear: Linear, projection: Projection) -> Tensor | None:
    """What this rank's outputs get beside the base's own bias, float32 `[out_local]`; None where
    another rank adds it to their sum."""
    if linear.input_is_sharded and linear.module.tp_rank > 0:
        return None
    local = {
        name: torch.cat([whole[part.start : part.stop] for part in projection.outputs])
        for name, whole in bias.tensors().items()
    }
    if "trained" in local:
        width = len(local["trained"])
        base = linear.module.bias.detach().float().cpu()
        local["trained"] = local["trained"] - base[projection.start : projection.start + width]
    return torch.stack(list(local.values())).sum(0)


def only_bias(added: Tensor, linear: Linear, projection: Projection) -> LinearPiece:
    """A piece that adds nothing but a bias."""
    nothing = Experts(added.new_zeros(0, linear.in_features), added.new_zeros(len(added), 0), (0,))
    return LinearPiece(
        projection.site, projection.start, nothing, Constant((1.0,)), added_bias=added
    )


def cut_ffn(
    mixture: FfnMixture, ffn: Ffn, gate_up: Linear, inner: range, bias: Tensor | None
) -> FfnPiece:
    """inner: this rank's range of the FFN's inner width, gate and up's outputs and down's inputs.
    bias: down_proj's, on the rank that adds it. DoRA's factors are computed here, once: gate and
    up see the whole input on every rank."""
    cut = {name: _cut_inner(experts, name, inner) for name, experts in mixture.experts.items()}
    scales: dict[str, ExpertScale] = {}
    for name, magnitude in mixture.magnitudes.items():
        columns_magnitude = magnitude[:, inner.start : inner.stop]
        start = 0 if name == "gate_proj" else len(inner)
        columns = slice(start, start + len(inner))
        scales[name] = _expert_scale(gate_up, columns, cut[name], columns_magnitude)
        cut[name] = _scaled(cut[name], scales[name].factors)
    return FfnPiece(
        site=ffn.site,
        policy=mixture.policy,
        router=mixture.router,
        activation=mixture.activation or ffn.activation,
        gate=cut.get("gate_proj"),
        up=cut.get("up_proj"),
        down=cut.get("down_proj"),
        bias=None if bias is None else bias.detach().float().cpu(),
        parameters=mixture.parameters,
        gate_scale=scales.get("gate_proj"),
        up_scale=scales.get("up_proj"),
    )


def _expert_scale(
    linear: Linear, columns: slice, experts: Experts, magnitude: Tensor
) -> ExpertScale:
    """m_e / ||W + B_e A_e|| of every expert, float32. columns: of the linear, this rank's."""
    weight = layer_weight.read(linear)[columns]
    norms = torch.stack([(weight + b @ a).norm(dim=1) for a, b in experts.split()])
    bias = getattr(linear.module, "bias", None)
    bias = None if bias is None else bias.detach().float().cpu()[columns]
    return ExpertScale(magnitude / norms, bias)


def _scaled(experts: Experts, factors: Tensor) -> Experts:
    return Experts(experts.a, experts.b * factors[experts.expert_of_row].T, experts.ranks)


def cut_scale(mixture: ScaleMixture, linear: Linear, projection: Projection) -> ScalePiece:
    """This rank's heads of an output. Raises UnsupportedError if a rank has no whole output: its
    router could not read what it multiplies. One vector has nothing to choose, and multiplies
    parts of an output, or of a sum, as it does the whole."""
    if mixture.num_experts == 1:
        return _cut_vector(mixture, projection)
    width = mixture.router.shape[1]
    cuts = [end for part in projection.outputs for end in (part.start, part.stop)]
    if linear.input_is_sharded or any(end % width for end in cuts):
        found = f"heads of width {width} that tensor parallelism cuts, or sums of parts"
        raise UnsupportedError(projection.site, found, "whole heads on every rank")
    heads = [mixture.vectors[p.start // width : p.stop // width] for p in projection.outputs]
    vectors = torch.cat(heads)
    return ScalePiece(projection.site, mixture.policy, mixture.router, vectors, projection.start)


def _cut_vector(mixture: ScaleMixture, projection: Projection) -> ScalePiece:
    whole = mixture.vectors.flatten()
    vector = torch.cat([whole[part.start : part.stop] for part in projection.outputs])
    router = vector.new_zeros(1, len(vector))
    return ScalePiece(
        projection.site, mixture.policy, router, vector.view(1, 1, -1), projection.start
    )


def cut_ffn_scale(mixture: ScaleMixture, projection: Projection) -> ScalePiece:
    """This rank's part of an FFN's intermediate, the input of its down_proj."""
    columns = slice(projection.inputs.start, projection.inputs.stop)
    return ScalePiece(
        projection.site,
        mixture.policy,
        mixture.router[:, columns].contiguous(),
        mixture.vectors[:, :, columns].contiguous(),
    )


def cut_moe(
    site: str, projections: Mapping[str, Mapping[int, Experts]], block: MoeBlock
) -> MoePiece:
    """projections: the pairs on a block's experts by projection and expert."""
    cut = {
        name: _cut_inner(stack(pairs, block.sizes.experts), name, block.intermediate)
        for name, pairs in projections.items()
    }
    return MoePiece(site, cut.get("gate_proj"), cut.get("up_proj"), cut.get("down_proj"))


def _cut_inner(experts: Experts, projection: str, inner: range) -> Experts:
    if projection == "down_proj":
        return Experts(experts.a[:, inner.start : inner.stop], experts.b, experts.ranks)
    return Experts(experts.a, experts.b[inner.start : inner.stop], experts.ranks)
