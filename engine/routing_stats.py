"""What routing came to: the stats of a site and of an adapter, from counters and shapes.

FLOPs are those of the low-rank products and of the routers, a multiply-add counted as two, of the
whole adapter (not of one tensor-parallel rank's part). Element-wise work is left out.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter
from molehill.kernels.counters import SiteCounters, SlotCounters
from molehill.kernels.mixture import (
    ClassifierMixture,
    Experts,
    LinearMixture,
    Mixture,
    Reflection,
    ScaleMixture,
)


@dataclass(frozen=True)
class SiteCost:
    """FLOPs at one site. experts: of one token through each expert. router: of one decision, and of
    the pair that every token gets beside what is decided; None where there is no router."""

    experts: tuple[int, ...]
    router: int | None


@dataclass(frozen=True)
class Costs:
    """Of an adapter's sites, and the same by row: float64 `[sites, E]` of the experts, E the most
    experts of a site, float64 `[sites]` of the routers. static: of one token through all sites that
    have none. Adapters of one shape share them.

    Not int64: at a GFLOP per token that is full after a few billion tokens.
    """

    sites: Mapping[str, SiteCost]
    experts: Tensor = field(compare=False)
    routers: Tensor = field(compare=False)
    rows: Mapping[str, int] = field(compare=False)
    static: int = field(compare=False)


def costs(
    adapter: Adapter,
    counted: Callable[[str], bool] = lambda site: True,
    base: BaseModel | None = None,
) -> Costs:
    """An expert of rank r costs 2 r (in + out), a vector nothing, a router 2 rows in.

    counted: whether a site belongs to them. base: tells a reflection's outputs, which count as none
    without it.
    """

    def outputs(site: str) -> int:
        return base.linears[site][1] if base and site in base.linears else 0

    return cost_table(
        tuple(
            (site, _cost(mixture, outputs(site)))
            for site, mixture in adapter.sites.items()
            if counted(site)
        )
    )


# The name under which the choices of a token's adapter by its id are counted.
TOKEN_IDS = "token_ids"


def token_costs(members: Sequence[Costs]) -> Costs:
    """Of adapters of which a token has one by its id, which costs nothing to look up."""
    flops = tuple(member.static for member in members)
    return cost_table(((TOKEN_IDS, SiteCost(flops, 0)),))


@functools.lru_cache(maxsize=64)
def cost_table(sites: tuple[tuple[str, SiteCost], ...]) -> Costs:
    """Costs of these sites."""
    most = max((len(cost.experts) for _, cost in sites), default=0)
    experts = [[*cost.experts, *[0] * (most - len(cost.experts))] for _, cost in sites]
    return Costs(
        sites=dict(sites),
        experts=torch.tensor(experts, dtype=torch.float64).view(len(sites), most),
        routers=torch.tensor([cost.router or 0 for _, cost in sites], dtype=torch.float64),
        rows={site: row for row, (site, _) in enumerate(sites)},
        static=sum(sum(cost.experts) for _, cost in sites if cost.router is None),
    )


def _cost(mixture: Mixture, outputs: int) -> SiteCost:
    """outputs: of the site's linear."""
    router = None if mixture.router is None else 2 * mixture.router.numel()
    if isinstance(mixture, LinearMixture):
        if router is not None and mixture.shared is not None:
            router += sum(_expert_costs(mixture.shared))
        return SiteCost(_expert_costs(mixture.experts), router)
    if isinstance(mixture, ClassifierMixture):
        return SiteCost(_expert_costs(mixture.experts), None)
    if isinstance(mixture, ScaleMixture):
        return SiteCost((0,) * mixture.num_experts, router)
    if isinstance(mixture, Reflection):
        return SiteCost((2 * mixture.rank * (mixture.a.shape[1] + outputs),), router)
    projections = [_expert_costs(pair) for pair in mixture.experts.values()]
    experts = range(mixture.num_experts)
    return SiteCost(tuple(sum(cost[e] for cost in projections) for e in experts), router)


def _expert_costs(pair: Experts) -> tuple[int, ...]:
    width = pair.a.shape[1] + pair.b.shape[0]
    return tuple(2 * rank * width for rank in pair.ranks)


@dataclass(frozen=True)
class SiteRoutingStats:
    """One site. Without a router nothing is decided: then all but `experts` and FLOPs is zero.

    experts: how many there are. decisions: one token at the router. soft: decisions that fell back
    to all experts. entropy: summed over decisions, each in [0, 1]. expert_tokens: decisions that
    chose each expert, `[experts]`. flops_avoided: what all experts would have cost beside
    flops_done.
    """

    experts: int
    decisions: int
    soft: int
    entropy: float
    expert_tokens: tuple[int, ...]
    flops_done: int
    flops_avoided: int

    @property
    def imbalance(self) -> float | None:
        """Tokens of the busiest expert over the mean of all: 1 is even, `experts` is one for all.
        None before anything is decided."""
        chosen = sum(self.expert_tokens)
        return max(self.expert_tokens) * self.experts / chosen if chosen else None

    @classmethod
    def total(cls, parts: Sequence["SiteRoutingStats"]) -> "SiteRoutingStats":
        """Of one site over engines, at least one."""
        return cls(
            parts[0].experts,
            sum(part.decisions for part in parts),
            sum(part.soft for part in parts),
            sum(part.entropy for part in parts),
            tuple(map(sum, zip(*(part.expert_tokens for part in parts), strict=True))),
            sum(part.flops_done for part in parts),
            sum(part.flops_avoided for part in parts),
        )


def site_stats(counters: SlotCounters, costs: Costs) -> dict[str, SiteRoutingStats]:
    """By site, of an adapter with these counters and costs."""
    counted = counters.sites
    return {
        site: _routed(counted.get(site, SiteCounters()), cost, cost.router)
        if cost.router is not None
        else _unrouted(counters.tokens, cost)
        for site, cost in costs.sites.items()
    }


def _routed(counters: SiteCounters, cost: SiteCost, router: int) -> SiteRoutingStats:
    chosen = counters.expert_tokens or [0] * len(cost.experts)
    done = sum(tokens * flops for tokens, flops in zip(chosen, cost.experts, strict=True))
    return SiteRoutingStats(
        experts=len(cost.experts),
        decisions=counters.decisions,
        soft=counters.soft,
        entropy=counters.entropy,
        expert_tokens=tuple(chosen),
        flops_done=done + counters.decisions * router,
        flops_avoided=counters.decisions * sum(cost.experts) - done,
    )


def _unrouted(tokens: int, cost: SiteCost) -> SiteRoutingStats:
    experts = len(cost.experts)
    return SiteRoutingStats(experts, 0, 0, 0.0, (0,) * experts, tokens * sum(cost.experts), 0)


@dataclass
class RoutingStats:
    """One adapter, over sites; the stats of several add up.

    tokens: that ran through it. expert_tokens: by expert index, over all routers. imbalance: sum of
    the sites' imbalances; imbalanced: number of sites in that sum. op_seconds: of the adapter ops,
    where they are measured. The rest as in SiteRoutingStats.
    """

    tokens: int = 0
    decisions: int = 0
    soft: int = 0
    entropy: float = 0.0
    expert_tokens: list[int] = field(default_factory=list)
    flops_done: int = 0
    flops_avoided: int = 0
    imbalance: float = 0.0
    imbalanced: int = 0
    op_seconds: float = 0.0

    def add(self, other: "RoutingStats") -> None:
        """In place, tokens too."""
        for name, value in vars(other).items():
            if name != "expert_tokens":
                setattr(self, name, getattr(self, name) + value)
        self._choose(other.expert_tokens)

    def add_site(self, site: SiteRoutingStats) -> None:
        """All but the tokens, which all sites share."""
        for name in ("decisions", "soft", "entropy", "flops_done", "flops_avoided"):
            setattr(self, name, getattr(self, name) + getattr(site, name))
        if site.decisions:
            self._choose(site.expert_tokens)
        if site.imbalance is not None:
            self.imbalance += site.imbalance
            self.imbalanced += 1

    def _choose(self, tokens: Sequence[int]) -> None:
        self.expert_tokens = [
            before + more for before, more in zip_longest(self.expert_tokens, tokens, fillvalue=0)
        ]


def total_stats(counters: SlotCounters, costs: Costs) -> RoutingStats:
    """The stats of an adapter with these counters and costs: those of its sites added up, but
    all sites at once. FLOPs are exact up to 2^53, then to 16 digits."""
    stats = RoutingStats(counters.tokens, flops_done=counters.tokens * costs.static)
    if not counters.names:
        return stats
    rows = torch.tensor([costs.rows[name] for name in counters.names])
    prices = costs.experts[rows, : counters.chosen.shape[1]]
    decisions = counters.decisions.double()
    not_chosen = decisions[:, None] - counters.chosen
    stats.decisions = int(counters.decisions.sum())
    stats.soft = int(counters.soft.sum())
    stats.entropy = float(counters.entropy.sum())
    stats.flops_done += int((counters.chosen * prices).sum() + decisions @ costs.routers[rows])
    stats.flops_avoided = int((not_chosen * prices).sum())
    experts, chosen = torch.tensor(counters.experts), counters.chosen.sum(1)
    # A site that has decided nothing tells of no expert.
    known = int((experts * (counters.decisions > 0)).max())
    stats.expert_tokens = counters.chosen.sum(0)[:known].tolist()
    busy = chosen > 0
    busiest = counters.chosen.amax(1) * experts
    stats.imbalance = float((busiest[busy] / chosen[busy].double()).sum())
    stats.imbalanced = int(busy.sum())
    return stats
