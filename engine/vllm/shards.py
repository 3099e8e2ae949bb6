"""Cuts a canonical mixture to what this tensor-parallel rank computes.

Column-parallel linears split B's outputs and see the whole input. Row-parallel ones split the
input of A and router, keep B whole, and their partial outputs are summed by vLLM; their router
logits are summed before the softmax (LinearShape.reduce). A mixture of vectors on an output is
routed head by head, by whichever rank has the head; on an FFN's intermediate, each rank has a part
of the one head.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molehill.engine.errors import UnsupportedError
from molehill.engine.vllm.layers import Ffn, Linear, Projection
from molehill.kernels.backend import ExpertScale, FfnPiece, LinearPiece, ScalePiece
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, ScaleMixture

IDENTITY_ROWS = 1024


def cut_experts(experts: Experts, projection: Projection) -> Experts:
    """This rank's inputs of A and outputs of B."""
    b = torch.cat([experts.b[part.start : part.stop] for part in projection.outputs])
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
    )
    if mixture.magnitude is None:
        return piece
    return _with_magnitude(piece, mixture.magnitude, linear, projection, total)


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
    adapted = _base_weight(linear)[columns] + experts.b @ experts.a
    norm = adapted.square().sum(1)
    norm = (total(norm) if linear.input_is_sharded else norm).sqrt()
    own = torch.cat([magnitude[part.start : part.stop] for part in projection.outputs])
    scale = own / norm
    bias = getattr(linear.module, "bias", None)
    if linear.input_is_sharded and linear.module.tp_rank > 0:
        bias = None  # vLLM adds a row-parallel bias on the first rank alone
    return dataclasses.replace(
        piece,
        experts=Experts(experts.a, experts.b * scale[:, None], experts.ranks),
        output_scale=scale.expand(len(experts.ranks), -1).contiguous(),
        bias=None if bias is None else bias.detach().float().cpu()[columns],
    )


def _base_weight(linear: Linear) -> Tensor:
    """W `[out, in]` float32 on the CPU, read through the layer's own GEMM: vLLM may have packed or
    quantised the weight, and what the layer multiplies by is what counts."""
    module = linear.module
    parameter = next(module.parameters())
    dtype = module.params_dtype
    rows = []
    for start in range(0, linear.in_features, IDENTITY_ROWS):
        size = min(IDENTITY_ROWS, linear.in_features - start)
        x = torch.zeros(size, linear.in_features, dtype=dtype, device=parameter.device)
        x[:, start : start + size] = torch.eye(size, dtype=dtype, device=parameter.device)
        unhooked: Any = type(module.quant_method).__mro__[1]
        rows.append(unhooked.apply(module.quant_method, module, x, None).float().cpu())
    return torch.cat(rows).T


def cut_ffn(
    mixture: FfnMixture, ffn: Ffn, gate_up: Linear, down: Linear, first_rank: bool
) -> FfnPiece:
    """first_rank: whether this rank adds down_proj's bias. DoRA's factors are computed here, once:
    gate and up see the whole input on every rank."""
    gate, up = gate_up.projections
    (out,) = down.projections
    cut = {
        name: cut_experts(mixture.experts[name], projection)
        for name, projection in (("gate_proj", gate), ("up_proj", up), ("down_proj", out))
        if name in mixture.experts
    }
    scales: dict[str, ExpertScale] = {}
    weight = _base_weight(gate_up) if mixture.magnitudes else None
    for name, projection in (("gate_proj", gate), ("up_proj", up)):
        if weight is not None and name in mixture.magnitudes:
            own = mixture.magnitudes[name]
            scales[name] = _expert_scale(weight, cut[name], own, gate_up, projection)
            cut[name] = _scaled(cut[name], scales[name].factors)
    bias = getattr(down.module, "bias", None) if first_rank else None
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
    weight: Tensor, experts: Experts, magnitude: Tensor, linear: Linear, projection: Projection
) -> ExpertScale:
    """m_e / ||W + B_e A_e|| of every expert, float32. weight: of the whole linear."""
    columns = slice(projection.start, projection.start + experts.b.shape[0])
    norms = torch.stack([(weight[columns] + b @ a).norm(dim=1) for a, b in experts.split()])
    own = torch.cat([magnitude[:, part.start : part.stop] for part in projection.outputs], dim=1)
    bias = getattr(linear.module, "bias", None)
    return ExpertScale(own / norms, None if bias is None else bias.detach().float().cpu()[columns])


def _scaled(experts: Experts, factors: Tensor) -> Experts:
    return Experts(experts.a, experts.b * factors[experts.expert_of_row].T, experts.ranks)


def cut_scale(mixture: ScaleMixture, linear: Linear, projection: Projection) -> ScalePiece:
    """This rank's heads of an output. Raises UnsupportedError if a rank has no whole output: its
    router could not read what it multiplies."""
    width = mixture.router.shape[1]
    cuts = [end for part in projection.outputs for end in (part.start, part.stop)]
    if linear.input_is_sharded or any(end % width for end in cuts):
        found = f"heads of width {width} that tensor parallelism cuts, or sums of parts"
        raise UnsupportedError(projection.site, found, "whole heads on every rank")
    heads = [mixture.vectors[p.start // width : p.stop // width] for p in projection.outputs]
    vectors = torch.cat(heads)
    return ScalePiece(projection.site, mixture.policy, mixture.router, vectors, projection.start)


def cut_ffn_scale(mixture: ScaleMixture, projection: Projection) -> ScalePiece:
    """This rank's part of an FFN's intermediate, the input of its down_proj."""
    columns = slice(projection.inputs.start, projection.inputs.stop)
    return ScalePiece(
        projection.site,
        mixture.policy,
        mixture.router[:, columns].contiguous(),
        mixture.vectors[:, :, columns].contiguous(),
    )
