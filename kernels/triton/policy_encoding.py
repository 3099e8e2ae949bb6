"""Policies as the parameters of the routing kernel (molehill.kernels.triton.routing)."""

import math

from torch import Tensor

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
from molehill.kernels.triton import layout as at

Record = tuple[list[int], list[float]]


def encode(policy: Policy, experts: int, learned: Tensor | None = None) -> Record:
    """(KEEP, NUCLEUS, NORMALIZE, ENTROPY, SCORES) and the float parameters, for a router over
    `experts`; learned: the policy's parameters.

    Raises TypeError for Constant, which has no router, and for Sparsegen, whose MLP does not fit
    in the kernel's registers.
    """
    keep, nucleus, normalize, scores = experts, at.NO_NUCLEUS.value, False, at.PLAIN.value
    divisor, top_p, tempered, floor, offset = 1.0, 0.0, 1.0, 0.0, 0.0
    match policy:
        case Soft():
            pass
        case TopK(k=k, normalize=flag):
            keep, normalize = k, flag
        case TopP(top_p=top_p, temperature=temperature):
            keep, nucleus = 1, at.BEFORE_AT_MOST.value
            divisor = temperature if temperature > 0 else 1.0
        case DynMoLE(top_p=top_p):
            keep, normalize = policy.keep_top_k, policy.normalize_weights
            crossing = policy.include_crossing
            nucleus = at.BEFORE_UNDER.value if crossing else at.WITH_AT_MOST.value
        case Arrow(k=keep, temperature=tempered):
            normalize, scores = True, at.ABSOLUTE.value
        case Threshold(threshold=floor):
            normalize, scores = True, at.FLOORED.value
        case AdaMoLE(max_threshold=floor):
            assert learned is not None
            normalize, scores, offset = True, at.LEARNED.value, learned.item()
        case Constant() | Sparsegen():
            raise TypeError(f"a router has the policy {policy}")
    kind, entropy = _entropy(policy, experts)
    integers = [min(keep, experts), nucleus, int(normalize), kind, scores]
    floats = [divisor, top_p, *entropy, tempered, floor, offset]
    return integers, floats + [0.0] * (at.POLICY.value - len(floats))


def _entropy(policy: Policy, experts: int) -> tuple[int, list[float]]:
    """Kind of entropy, and (THRESHOLD, INDEX, EPS, MOST). One expert has the entropy 0."""
    kind, threshold, index, eps = at.SHANNON.value, math.inf, 1.0, 0.0
    most = math.log(experts)
    if isinstance(policy, DynMoLE):
        index = policy.entropy_index
        if policy.entropy_threshold < 1.0:
            threshold = policy.entropy_threshold
        if index != 1.0:
            tsallis = policy.entropy_type == "tsallis"
            kind = at.TSALLIS.value if tsallis else at.RENYI.value
            if tsallis:
                most = (1.0 - experts ** (1.0 - index)) / (index - 1.0)
        eps, most = (policy.entropy_eps, most) if policy.normalize_entropy else (0.0, 1.0)
    return kind, [threshold, index, eps, most if experts > 1 else math.inf]
