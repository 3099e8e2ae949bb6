"""What routing came to: a site's and an adapter's figures, from counters and shapes.

FLOPs are those of the low-rank products and of the routers, a multiply-add counted as two, of the
whole adapter (not of one tensor-parallel rank's part). Element-wise work is left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from molehill.engine.adapter import Adapter
from molehill.kernels.backend import SiteCounters, SlotCounters
from molehill.kernels.mixture import Experts, LinearMixture, Mixture


@dataclass(frozen=True)
class SiteCost:
    """FLOPs at one site. experts: of one token through each expert. router: of one decision, None
    where there is no router."""

    experts: tuple[int, ...]
    router: int | None


def costs(adapter: Adapter) -> dict[str, SiteCost]:
    """By site. An expert of rank r costs 2 r (in + out), a router 2 rows in."""
    return {site: _cost(mixture) for site, mixture in adapter.sites.items()}


def _cost(mixture: Mixture) -> SiteCost:
    router = None if mixture.router is None else 2 * mixture.router.numel()
    if isinstance(mixture, LinearMixture):
        return SiteCost(_expert_costs(mixture.experts), router)
    projections = [_expert_costs(pair) for pair in mixture.experts.values()]
    experts = range(mixture.num_experts)
    return SiteCost(tuple(sum(cost[e] for cost in projections) for e in experts), router)


def _expert_costs(pair: Experts) -> tuple[int, ...]:
    width = pair.a.shape[1] + pair.b.shape[0]
    return tuple(2 * rank * width for rank in pair.ranks)


@dataclass(frozen=True)
class SiteFigures:
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


def site_figures(counters: SlotCounters, sites: Mapping[str, SiteCost]) -> dict[str, SiteFigures]:
    """By site, of an adapter with these counters and costs."""
    return {
        site: _routed(counters.sites.get(site, SiteCounters()), cost, cost.router)
        if cost.router is not None
        else _unrouted(counters.tokens, cost)
        for site, cost in sites.items()
    }


def _routed(counters: SiteCounters, cost: SiteCost, router: int) -> SiteFigures:
    chosen = counters.expert_tokens or [0] * len(cost.experts)
    done = sum(tokens * flops for tokens, flops in zip(chosen, cost.experts, strict=True))
    return SiteFigures(
        experts=len(cost.experts),
        decisions=counters.decisions,
        soft=counters.soft,
        entropy=counters.entropy,
        expert_tokens=tuple(chosen),
        flops_done=done + counters.decisions * router,
        flops_avoided=counters.decisions * sum(cost.experts) - done,
    )


def _unrouted(tokens: int, cost: SiteCost) -> SiteFigures:
    experts = len(cost.experts)
    return SiteFigures(experts, 0, 0, 0.0, (0,) * experts, tokens * sum(cost.experts), 0)


@dataclass
class Figures:
    """One adapter, over sites; figures of several add up.

    tokens: that ran through it. expert_tokens: by expert index, over all routers. imbalance: sum of
    the sites' imbalances; imbalanced: number of sites in that sum. The rest as in SiteFigures.
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

    def add(self, other: "Figures") -> None:
        """In place, tokens too."""
        for name, value in vars(other).items():
            if name != "expert_tokens":
                setattr(self, name, getattr(self, name) + value)
        self._choose(other.expert_tokens)

    def add_site(self, site: SiteFigures) -> None:
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
            own + more for own, more in zip_longest(self.expert_tokens, tokens, fillvalue=0)
        ]


def total(counters: SlotCounters, sites: Mapping[str, SiteCost]) -> Figures:
    """The figures of an adapter with these counters and costs."""
    figures = Figures(counters.tokens)
    for site in site_figures(counters, sites).values():
        figures.add_site(site)
    return figures


def joined(first: SlotCounters, second: SlotCounters) -> SlotCounters:
    """Counters of one adapter from two stays in a backend."""
    sites = dict(first.sites)
    for name, site in second.sites.items():
        sites[name] = _joined(sites[name], site) if name in sites else site
    return SlotCounters(first.tokens + second.tokens, sites)


def _joined(first: SiteCounters, second: SiteCounters) -> SiteCounters:
    return SiteCounters(
        first.decisions + second.decisions,
        first.soft + second.soft,
        first.entropy + second.entropy,
        [a + b for a, b in zip(first.expert_tokens, second.expert_tokens, strict=True)],
    )
