"""What each site of an adapter is: static or not and why, what merging leaves, what it costs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import (
    Adapter,
    TokenAdapters,
    describe_mixture,
    natural_key,
    site_tensors,
)
from molehill.engine.transform.merge import merge_site
from molehill.engine.transform.static_gates import gate
from molehill.kernels.mixture import (
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
)
from molehill.kernels.policy import Policy

# Bytes of a number of A and B in a serving copy, and of the base's weights; routers are float32.
SERVED = 2
ROUTER = 4


@dataclass(frozen=True)
class Cost:
    """Per token: multiply-adds counted as two, and bytes of weights read (16-bit, routers 32-bit).

    Element-wise work is left out. base_flops, base_bytes: of the base's own linears there, None if
    the adapter does not tell their shape. Of a reflection whose base is not known, flops and bytes
    are those of A alone: B is as high as W.
    """

    flops: int
    bytes: int
    base_flops: int | None
    base_bytes: int | None


@dataclass(frozen=True)
class SitePlan:
    """One site.

    shape: `linear`, `ffn`, `scale`, `reflection` or `classifier`. ranks: of each expert, by
    projection; none of vectors. bytes: in canonical float32. static: the gate cannot depend on the
    token. reason: why it is static or not. error: of the merge, `static_gates.deviation`; 0 if it
    is exact. merged: the one rank by projection that merging leaves, None where nothing merges.
    cost: of one token as it is served, at the most. policy: None where the token's id or a
    classifier decides.
    """

    site: str
    shape: str
    policy: Policy | None
    experts: int
    ranks: Mapping[str, tuple[int, ...]]
    bytes: int
    static: bool
    reason: str
    error: float
    merged: Mapping[str, int] | None
    cost: Cost

    def as_json(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "site": self.site,
            "shape": self.shape,
            "routing": None if self.policy is None else self.policy.to_json(),
            "experts": self.experts,
            "ranks": {name: list(ranks) for name, ranks in self.ranks.items()},
            "bytes": self.bytes,
            "static": self.static,
            "reason": self.reason,
            "error": self.error,
            "merged_ranks": None if self.merged is None else dict(self.merged),
            "flops_per_token": cost.flops,
            "flops_share": share(cost.flops, cost.base_flops),
            "bytes_per_token": cost.bytes,
            "bytes_share": share(cost.bytes, cost.base_bytes),
        }


def share(extra: int, base: int | None) -> float | None:
    """`extra` as a part of the base's; None where that is not known."""
    return None if not base else extra / base


def plan(
    adapter: Adapter, base: BaseModel | None = None, tolerance: float = 0.0
) -> tuple[SitePlan, ...]:
    """One SitePlan per site, in natural order. base, tolerance: as in `merge.merge_static`."""
    if adapter.by_token is not None:
        return _by_token(adapter.by_token, base, tolerance)
    return tuple(
        _site_plan(site, adapter.sites[site], base, tolerance)
        for site in sorted(adapter.sites, key=natural_key)
    )


def _by_token(
    by_token: TokenAdapters, base: BaseModel | None, tolerance: float
) -> tuple[SitePlan, ...]:
    """Of the sites that any of the adapters has: its experts are those that do."""
    plans: dict[str, list[SitePlan]] = {}
    for member in by_token.adapters.values():
        for site in plan(member, base, tolerance):
            plans.setdefault(site.site, []).append(site)
    return tuple(_joined(plans[site]) for site in sorted(plans, key=natural_key))


def _joined(sites: Sequence[SitePlan]) -> SitePlan:
    """One site of several adapters, of which a token has one. None merges with another."""
    first = sites[0]
    ranks = {name: tuple(r for s in sites for r in s.ranks.get(name, ())) for name in first.ranks}
    return replace(
        first,
        policy=None,
        experts=len(sites),
        ranks=ranks,
        bytes=sum(site.bytes for site in sites),
        static=False,
        reason="the token's id chooses the adapter",
        error=max(site.error for site in sites),
        merged=None,
        cost=max((site.cost for site in sites), key=lambda cost: cost.flops),
    )


def _site_plan(site: str, mixture: Mixture, base: BaseModel | None, tolerance: float) -> SitePlan:
    activation = base.ffns.get(site) if base else None
    fixed = gate(mixture, activation, tolerance)
    merged = merge_site(site, mixture, activation, tolerance)
    return SitePlan(
        site=site,
        shape=describe_mixture(mixture)["shape"],
        policy=None if isinstance(mixture, ClassifierMixture) else mixture.policy,
        experts=mixture.num_experts,
        ranks=_ranks(site, mixture),
        bytes=sum(tensor.nbytes for _, tensor in site_tensors(mixture)),
        static=fixed.weights is not None,
        reason=fixed.reason,
        error=fixed.error,
        merged=None if merged is None else _merged_ranks(merged[0]),
        cost=_cost(
            mixture, None if merged is None else merged[0], base.linears.get(site) if base else None
        ),
    )


def _ranks(site: str, mixture: Mixture) -> dict[str, tuple[int, ...]]:
    if isinstance(mixture, LinearMixture):
        shared = {} if mixture.shared is None else {"shared": mixture.shared.ranks}
        return {_leaf(site): mixture.experts.ranks, **shared}
    if isinstance(mixture, ClassifierMixture):
        return {_leaf(site): mixture.experts.ranks}
    if isinstance(mixture, ScaleMixture):
        return {}
    if isinstance(mixture, Reflection):
        return {_leaf(site): (mixture.rank,)}
    return {name: experts.ranks for name, experts in sorted(mixture.experts.items())}


def _merged_ranks(merged: Mapping[str, LinearMixture]) -> dict[str, int]:
    return {_leaf(site): mixture.experts.ranks[0] for site, mixture in merged.items()}


def _leaf(site: str) -> str:
    return site.rpartition(".")[2]


def _cost(
    mixture: Mixture,
    merged: Mapping[str, LinearMixture] | None,
    shape: tuple[int, int] | None,
) -> Cost:
    """See `Cost`. shape: (in, out) of the base's linear, where it is known."""
    if isinstance(mixture, ScaleMixture):
        return _vectors_cost(mixture)
    if isinstance(mixture, Reflection):
        return _reflection_cost(mixture, shape)
    if isinstance(mixture, ClassifierMixture):
        return _classified_cost(mixture)
    return _low_rank_cost(mixture, merged)


def _vectors_cost(mixture: ScaleMixture) -> Cost:
    """The router reads every head; vectors are kept in float32."""
    router, heads = mixture.router.numel(), mixture.num_heads
    chosen = mixture.policy.most_experts(mixture.num_experts)
    read = router + mixture.vectors.numel() * chosen // mixture.num_experts
    return Cost(2 * router * heads, ROUTER * read, None, None)


def _reflection_cost(mixture: Reflection, shape: tuple[int, int] | None) -> Cost:
    if shape is None:
        return Cost(2 * mixture.a.numel(), SERVED * mixture.a.numel(), None, None)
    inputs, outputs = shape
    elements, weights = mixture.rank * (inputs + outputs), inputs * outputs
    return Cost(2 * elements, SERVED * elements, 2 * weights, SERVED * weights)


def _classified_cost(mixture: ClassifierMixture) -> Cost:
    """Every expert is computed; neither the classifier nor the base's first pass is counted."""
    pair = mixture.experts
    elements, weights = _elements(pair, len(pair.ranks)), pair.a.shape[1] * pair.b.shape[0]
    return Cost(2 * elements, SERVED * elements, 2 * weights, SERVED * weights)


def _low_rank_cost(
    mixture: LinearMixture | FfnMixture, merged: Mapping[str, LinearMixture] | None
) -> Cost:
    """A token reads the A and B of its experts, of those with the highest ranks, and the router."""
    if merged is not None:
        elements = sum(_elements(linear.experts, 1) for linear in merged.values())
        router = 0
    else:
        chosen = mixture.policy.most_experts(mixture.num_experts)
        elements = sum(_elements(experts, chosen) for experts in _stacks(mixture))
        elements += _shared_elements(mixture)
        router = 0 if mixture.router is None else mixture.router.numel()
    weights = _base_weights(mixture)
    return Cost(
        flops=2 * (elements + router),
        bytes=SERVED * elements + ROUTER * router,
        base_flops=None if weights is None else 2 * weights,
        base_bytes=None if weights is None else SERVED * weights,
    )


def _stacks(mixture: LinearMixture | FfnMixture) -> list[Experts]:
    if isinstance(mixture, LinearMixture):
        return [mixture.experts]
    return list(mixture.experts.values())


def _elements(experts: Experts, chosen: int) -> int:
    ranks = sum(sorted(experts.ranks)[-chosen:])
    return ranks * (experts.a.shape[1] + experts.b.shape[0])


def _shared_elements(mixture: LinearMixture | FfnMixture) -> int:
    shared = mixture.shared if isinstance(mixture, LinearMixture) else None
    return 0 if shared is None else _elements(shared, len(shared.ranks))


def _base_weights(mixture: LinearMixture | FfnMixture) -> int | None:
    """Elements of W; of an FFN's three, whose inner width any of its pairs tells."""
    if isinstance(mixture, LinearMixture):
        return mixture.experts.a.shape[1] * mixture.experts.b.shape[0]
    return _ffn_weights(mixture)


def _ffn_weights(mixture: FfnMixture) -> int | None:
    for name, experts in mixture.experts.items():
        inner = experts.a.shape[1] if name == "down_proj" else experts.b.shape[0]
        return 3 * mixture.router.shape[1] * inner
    return None
