"""Routing policies: how a router's logits become gate weights. One module each.

A policy is a frozen dataclass with one pure function, `decide`. It is the definition that every
kernel is tested against. A router has a row for each of the E experts, and after those the
policy's `extra_rows`; what a policy learned beside the router are its `num_parameters` parameters.
Most policies route on the softmax of the logits alone (`route`). Probabilities are float32
`[..., E]` and sum to 1 over the last axis, except for `FlyLoRA`'s, which are scores. Ties go to the
lower expert index.
"""

from collections.abc import Mapping

from molehill.kernels.policy.adamole import AdaMoLE
from molehill.kernels.policy.arrow import Arrow
from molehill.kernels.policy.base import JsonFields, Policy, Routing, shannon
from molehill.kernels.policy.constant import Constant
from molehill.kernels.policy.dynmole import DynMoLE
from molehill.kernels.policy.flylora import FlyLoRA
from molehill.kernels.policy.soft import Soft
from molehill.kernels.policy.sparsegen import Sparsegen, sparsemax
from molehill.kernels.policy.threshold import Threshold
from molehill.kernels.policy.top_k import TopK
from molehill.kernels.policy.top_p import TopP

# By the name that they have in JSON.
POLICIES: Mapping[str, type[Policy]] = {
    policy.__name__: policy
    for policy in (
        Constant,
        Soft,
        TopK,
        TopP,
        DynMoLE,
        Threshold,
        Arrow,
        AdaMoLE,
        Sparsegen,
        FlyLoRA,
    )
}

__all__ = [
    "POLICIES",
    "AdaMoLE",
    "Arrow",
    "Constant",
    "DynMoLE",
    "FlyLoRA",
    "JsonFields",
    "Policy",
    "Routing",
    "Soft",
    "Sparsegen",
    "Threshold",
    "TopK",
    "TopP",
    "shannon",
    "sparsemax",
]
