"""Policies as the parameters of the routing kernel (molehill.kernels.triton.routing)."""

import math
from dataclasses import dataclass, replace
from functools import singledispatch

from torch import Tensor

from molehill.kernels.policy import (
    AdaMoLE,
    Arrow,
    DynMoLE,
    FlyLoRA,
    Policy,
    Soft,
    Sparsegen,
    Threshold,
    TopK,
    TopP,
)
from molehill.kernels.policy.sparsegen import SPARSEGEN_EPS
from molehill.kernels.triton import layout as at


@dataclass(frozen=True)
class PolicyRecord:
    """What the kernel reads of a policy: see molehill.kernels.triton.layout for every field.

    experts: of the router, not part of the record; `keep` and `most` follow from it.
    """

    experts: int
    keep: int
    nucleus: int = at.NO_NUCLEUS.value
    normalize: bool = False
    entropy: int = at.SHANNON.value
    scores: int = at.PLAIN.value
    divisor: float = 1.0
    top_p: float = 0.0
    threshold: float = math.inf
    index: float = 1.0
    eps: float = 0.0
    most: float = math.inf
    temperature: float = 1.0
    floor: float = 0.0
    offset: float = 0.0
    biases: tuple[float, ...] = ()
    least: float = 0.0

    def integers(self) -> list[int]:
        """Fields KEEP to SCORES of a piece or FFN record."""
        keep = min(self.keep, self.experts)
        return [keep, self.nucleus, int(self.normalize), self.entropy, self.scores]

    def floats(self) -> list[float]:
        """The policy parameters, `[POLICY]`."""
        floats = [0.0] * at.POLICY.value
        floats[at.DIVISOR.value] = self.divisor
        floats[at.TOP_P.value] = self.top_p
        floats[at.THRESHOLD.value] = self.threshold
        floats[at.INDEX.value] = self.index
        floats[at.EPS.value] = self.eps
        floats[at.MOST.value] = self.most
        floats[at.TEMPERATURE.value] = self.temperature
        floats[at.FLOOR.value] = self.floor
        floats[at.OFFSET.value] = self.offset
        floats[at.BIASES.value : at.BIASES.value + len(self.biases)] = self.biases
        floats[at.LEAST.value] = self.least
        return floats


class UnsupportedPolicyError(TypeError):
    """A policy that the routing kernel cannot compute. expected: what it could."""

    def __init__(self, expected: str) -> None:
        self.expected = expected
        super().__init__(f"expected {expected}")


@singledispatch
def encode(policy: Policy, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    """The record of a policy over a router of `experts`; learned: the policy's parameters `[n]`.

    Raises UnsupportedPolicyError for a policy that has no entry below.
    """
    raise UnsupportedPolicyError("a policy that the Triton kernels have an encoding of")


@encode.register
def _soft(policy: Soft, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    return _keeping(experts, experts)


@encode.register
def _top_k(policy: TopK, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    return replace(_keeping(policy.k, experts), normalize=policy.normalize)


@encode.register
def _top_p(policy: TopP, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    return replace(
        _keeping(1, experts),
        nucleus=at.BEFORE_AT_MOST.value,
        top_p=policy.top_p,
        divisor=policy.temperature if policy.temperature > 0 else 1.0,
    )


@encode.register
def _dynmole(policy: DynMoLE, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    crossing = policy.include_crossing
    record = replace(
        _keeping(policy.keep_top_k, experts),
        nucleus=at.BEFORE_UNDER.value if crossing else at.WITH_AT_MOST.value,
        top_p=policy.top_p,
        normalize=policy.normalize_weights,
        threshold=policy.entropy_threshold if policy.entropy_threshold < 1.0 else math.inf,
        index=policy.entropy_index,
    )
    if policy.entropy_index != 1.0 and policy.entropy_type == "tsallis":
        most = (1.0 - experts ** (1.0 - policy.entropy_index)) / (policy.entropy_index - 1.0)
        record = replace(record, entropy=at.TSALLIS.value, most=most)
    elif policy.entropy_index != 1.0:
        record = replace(record, entropy=at.RENYI.value)
    if policy.normalize_entropy:
        record = replace(record, eps=policy.entropy_eps)
    else:
        record = replace(record, most=1.0)
    # One expert has the entropy 0, whatever the definition.
    return record if experts > 1 else replace(record, most=math.inf)


@encode.register
def _arrow(policy: Arrow, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    return replace(
        _keeping(policy.k, experts),
        normalize=True,
        scores=at.ABSOLUTE.value,
        temperature=policy.temperature,
    )


@encode.register
def _threshold(policy: Threshold, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    return replace(
        _keeping(experts, experts),
        normalize=True,
        scores=at.FLOORED.value,
        floor=policy.threshold,
    )


@encode.register
def _adamole(policy: AdaMoLE, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    assert learned is not None
    return replace(
        _keeping(experts, experts),
        normalize=True,
        scores=at.LEARNED.value,
        floor=policy.max_threshold,
        offset=learned.item(),
    )


@encode.register
def _flylora(policy: FlyLoRA, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    assert learned is not None
    most = at.POLICY.value - at.BIASES.value
    if experts > most:
        raise UnsupportedPolicyError(f"at most {most} experts with biases")
    biases = tuple(learned.tolist())
    return replace(_keeping(policy.k, experts), scores=at.BIASED.value, biases=biases)


@encode.register
def _sparsegen(policy: Sparsegen, experts: int, learned: Tensor | None = None) -> PolicyRecord:
    """The MLP's biases and output weights are a table that molehill.kernels.triton.packing adds."""
    assert learned is not None
    return replace(
        _keeping(experts, experts),
        scores=at.SPARSE.value,
        offset=learned[-1].item(),
        least=SPARSEGEN_EPS,
    )


def _keeping(keep: int, experts: int) -> PolicyRecord:
    """The first `keep` by probability, with the entropy of most policies. One expert has the
    entropy 0."""
    most = math.log(experts) if experts > 1 else math.inf
    return PolicyRecord(experts, keep, most=most)
