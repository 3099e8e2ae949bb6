"""Policies as the parameters of the routing kernel (molehill.kernels.triton.routing)."""

import math

from molehill.kernels.policy import Constant, DynMoLE, Policy, Soft, TopK, TopP
from molehill.kernels.triton import layout as at

Record = tuple[list[int], list[float]]


def encode(policy: Policy, experts: int) -> Record:
    """(KEEP, NUCLEUS, NORMALIZE, ENTROPY) and the float parameters, for a router over `experts`.

    Raises TypeError for Constant, which has no router.
    """
    keep, nucleus, normalize = experts, at.NO_NUCLEUS.value, False
    divisor, top_p = 1.0, 0.0
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
        case Constant():
            raise TypeError(f"a router has the policy {policy}")
    kind, entropy = _entropy(policy, experts)
    return [keep, nucleus, int(normalize), kind], [divisor, top_p, *entropy, 0.0, 0.0]


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
