"""What each site of an adapter is: its shape, its size, and whether its gate reads the token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from molehill.engine.adapter import (
    Adapter,
    describe_mixture,
    describe_policy,
    is_static,
    natural_key,
    site_tensors,
)
from molehill.engine.validation import sums_to_one
from molehill.kernels.mixture import Experts, FfnMixture, LinearMixture, Mixture, ScaleMixture
from molehill.kernels.policy import Policy


@dataclass(frozen=True)
class SitePlan:
    """One site.

    shape: `linear`, `ffn` or `scale`. ranks: of each expert, by projection; none of vectors.
    bytes: in canonical float32. static: the gate cannot depend on the token, so that the experts
    are one low-rank pair, or one vector.
    reason: why it is static or not.
    """

    site: str
    shape: str
    policy: Policy
    experts: int
    ranks: Mapping[str, tuple[int, ...]]
    bytes: int
    static: bool
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {
            "site": self.site,
            "shape": self.shape,
            "routing": describe_policy(self.policy),
            "experts": self.experts,
            "ranks": {name: list(ranks) for name, ranks in self.ranks.items()},
            "bytes": self.bytes,
            "static": self.static,
            "reason": self.reason,
        }


def plan(adapter: Adapter) -> tuple[SitePlan, ...]:
    """One SitePlan per site, in natural order."""
    return tuple(
        _site_plan(site, adapter.sites[site]) for site in sorted(adapter.sites, key=natural_key)
    )


def _site_plan(site: str, mixture: Mixture) -> SitePlan:
    inside = isinstance(mixture, FfnMixture)
    static = is_static(mixture) or _indifferent(mixture)
    dynamic = "experts inside the FFN's activation" if inside else "router reads the token"
    return SitePlan(
        site=site,
        shape=describe_mixture(mixture)["shape"],
        policy=mixture.policy,
        experts=mixture.num_experts,
        ranks=_ranks(site, mixture),
        bytes=sum(tensor.nbytes for _, tensor in site_tensors(mixture)),
        static=static is not None,
        reason=static or dynamic,
    )


def _ranks(site: str, mixture: Mixture) -> dict[str, tuple[int, ...]]:
    if isinstance(mixture, LinearMixture):
        return {site.rpartition(".")[2]: mixture.experts.ranks}
    if isinstance(mixture, ScaleMixture):
        return {}
    return {name: experts.ranks for name, experts in sorted(mixture.experts.items())}


def _indifferent(mixture: Mixture) -> str | None:
    """Whichever experts a token gets, their weighted sum is the same."""
    if isinstance(mixture, FfnMixture) or not sums_to_one(mixture.policy):
        return None
    if isinstance(mixture, ScaleMixture):
        identical = bool((mixture.vectors == mixture.vectors[:, :1]).all())
    else:
        identical = _identical(mixture.experts)
    return "identical experts with weights summing to 1" if identical else None


def _identical(experts: Experts) -> bool:
    (first_a, first_b), *others = experts.split()
    return all(torch.equal(a, first_a) and torch.equal(b, first_b) for a, b in others)
