"""A mixture of one vector, (IA)^3, as an output scale: u l needs no launch of its own.

With one expert nothing is decided, so nothing has to read u first: l is the output scale of a piece
without rank rows. On an FFN's intermediate h = act(gate) * up it is one of up's columns, as
h l = act(gate) * (up l).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from molehill.kernels.interface import FfnShape, LinearPiece, LinearShape, ScalePiece, SlotWeights
from molehill.kernels.mixture import Experts
from molehill.kernels.policy import Constant


def fold_vectors(
    weights: SlotWeights, linears: Sequence[LinearShape], ffns: Sequence[FfnShape]
) -> SlotWeights:
    """The same adapter with pieces in place of the vectors that can be. linears, ffns: by handle.

    Others stay: mixtures of several vectors, and vectors where the adapter has something else at
    the same columns or an FFN mixture.
    """
    pieces = {handle: list(listed) for handle, listed in weights.linears.items()}
    scales: dict[int, list[ScalePiece]] = {}
    for handle, vectors in weights.scales.items():
        for vector in vectors:
            if not _add(vector, vector.start, linears[handle], pieces.setdefault(handle, [])):
                scales.setdefault(handle, []).append(vector)
    ffn_scales: dict[int, ScalePiece] = {}
    for handle, vector in weights.ffn_scales.items():
        ffn = ffns[handle]
        to = pieces.setdefault(ffn.gate_up, [])
        is_alone = handle not in weights.ffns
        if not (is_alone and _add(vector, ffn.intermediate, linears[ffn.gate_up], to)):
            ffn_scales[handle] = vector
    return replace(weights, linears=_filled(pieces), scales=scales, ffn_scales=ffn_scales)


def _filled(pieces: Mapping[int, list[LinearPiece]]) -> dict[int, list[LinearPiece]]:
    return {handle: listed for handle, listed in pieces.items() if listed}


def _add(vector: ScalePiece, start: int, shape: LinearShape, pieces: list[LinearPiece]) -> bool:
    """Adds a piece that multiplies columns from `start` on; returns whether there can be one."""
    heads, experts, width = vector.vectors.shape
    stop = start + heads * width
    if experts > 1 or not vector.policy.sums_to_one:
        return False
    if any(piece.start < stop and start < piece.start + len(piece.experts.b) for piece in pieces):
        return False
    factors: Tensor = vector.vectors.reshape(1, -1)
    nothing = Experts(torch.zeros(0, shape.in_features), torch.zeros(stop - start, 0), (0,))
    piece = LinearPiece(vector.site, start, nothing, Constant((1.0,)), output_scale=factors)
    pieces.append(piece)
    return True
