"""Which gates cannot depend on the token, and the weights that they then always give.

A site is static if it has no router, one expert, a router of zeros, or experts that are identical
while the weights sum to 1. The weights are the policy's own: one expert does not always get 1
(`TopP` divides by its temperature), a router of zeros is a uniform distribution pushed through it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from molehill.kernels.mixture import (
    ClassifierMixture,
    Experts,
    FfnMixture,
    Mixture,
    Reflection,
    RoutedMixture,
    ScaleMixture,
)

IDENTICAL = "identical experts with weights summing to 1"
DYNAMIC = "router reads the token"
CLASSIFIED = "classifier reads the base's last hidden state"


class Gate(NamedTuple):
    """weights: float32 `[E]` that every token gets, None if they depend on it. reason: why.

    error: of the low-rank product that the weights stand for, see `deviation`; 0 if it is exact.
    """

    weights: Tensor | None
    reason: str
    error: float = 0.0


def gate(mixture: Mixture, activation: str | None = None, tolerance: float = 0.0) -> Gate:
    """The gate of one site.

    activation: the base's, which an FFN's own must equal to be static; None if it is not known.
    tolerance: above 0, experts of a linear whose `deviation` is at most that count as their mean.
    """
    if isinstance(mixture, FfnMixture):
        return _ffn_gate(mixture, activation)
    if isinstance(mixture, Reflection):
        return Gate(torch.ones(1), "no router")
    if isinstance(mixture, ClassifierMixture):
        return Gate(None, CLASSIFIED)
    if fixed := _fixed(mixture):
        return fixed
    if mixture.policy.sums_to_one:
        if isinstance(mixture, ScaleMixture):
            return _vectors_gate(mixture)
        if _identical(mixture.experts):
            return Gate(_only_first(mixture), IDENTICAL)
        if tolerance > 0 and (error := deviation(mixture.experts)) <= tolerance:
            uniform = torch.full((mixture.num_experts,), 1 / mixture.num_experts)
            return Gate(uniform, f"experts within {tolerance:g} of their mean", error)
    return Gate(None, DYNAMIC)


def _vectors_gate(mixture: ScaleMixture) -> Gate:
    if bool((mixture.vectors == mixture.vectors[:, :1]).all()):
        return Gate(_only_first(mixture), IDENTICAL)
    return Gate(None, DYNAMIC)


def _fixed(mixture: RoutedMixture) -> Gate | None:
    """The gate that no input of the router can change. Rows beyond the experts' have a say of their
    own, even over one expert."""
    reason = None
    if mixture.router is None:
        reason = "no router"
    elif mixture.policy.extra_rows:
        return None
    elif mixture.num_experts == 1:
        reason = "one expert"
    elif not bool(mixture.router.any()):
        reason = "router of zeros"
    if reason is None:
        return None
    if mixture.router is None:
        uniform = torch.full((1, mixture.num_experts), 1 / mixture.num_experts)
        return Gate(mixture.policy.route(uniform).weights[0], reason)
    _, routing = mixture.policy.decide(torch.zeros(1, mixture.num_experts), mixture.parameters)
    return Gate(routing.weights[0], reason)


def _ffn_gate(mixture: FfnMixture, activation: str | None) -> Gate:
    """An FFN with one expert of weight 1 is three linears; any other weight scales W too, and
    several experts cannot be summed outside the activation."""
    if mixture.magnitudes:
        return Gate(None, "experts with magnitudes inside the FFN's activation")
    fixed = _fixed(mixture)
    if fixed is None and mixture.policy.sums_to_one and all(map(_identical, _stacks(mixture))):
        fixed = Gate(_only_first(mixture), IDENTICAL)
    if fixed is None:
        return Gate(None, "experts inside the FFN's activation")
    weights = fixed.weights
    assert weights is not None
    if sorted(weights.tolist()) != [0.0] * (len(weights) - 1) + [1.0]:
        return Gate(None, f"{fixed.reason}, but not one expert with weight 1")
    if mixture.activation not in (None, activation):
        return Gate(None, f"{fixed.reason}, but an activation of its own")
    return fixed


def _stacks(mixture: FfnMixture) -> list[Experts]:
    return list(mixture.experts.values())


def _only_first(mixture: Mixture) -> Tensor:
    return torch.eye(1, mixture.num_experts)[0]


def _identical(experts: Experts) -> bool:
    (first_a, first_b), *others = experts.split()
    return all(torch.equal(a, first_a) and torch.equal(b, first_b) for a, b in others)


def deviation(experts: Experts) -> float:
    """max_e ||B_e A_e - M|| / ||M|| in the Frobenius norm, M the mean of the B_e A_e.

    From inner products <B_e A_e, B_f A_f> = sum((B_e^T B_f) * (A_e A_f^T)) in float64: the dense
    products, `[out, in]`, are never formed. Inf if the mean vanishes and the experts do not.
    """
    a, b = experts.a.double(), experts.b.double()
    number, owner = len(experts.ranks), experts.expert_of_row
    member = torch.nn.functional.one_hot(owner, number).double()
    inner = member.T @ ((b.T @ b) * (a @ a.T)) @ member
    mean = inner.mean()
    distance = (inner.diagonal() - 2 * inner.mean(1) + mean).clamp(min=0).max()
    if distance == 0:
        return 0.0
    return float((distance / mean.clamp(min=0)).sqrt())
