"""What routing came to in a slot, as backends count it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SiteCounters:
    """Routing counters of a site. One decision is one token at one router, or at one of its heads.

    expert_tokens: decisions that chose each expert, `[E]`.
    """

    decisions: int = 0
    soft: int = 0
    entropy: float = 0.0
    expert_tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class SlotCounters:
    """Routing counters of one adapter, by row those of its routed sites.

    A scrape adds hundreds of sites up between two steps: so they are tensors, on the host.

    tokens: that ran through the adapter. names, experts: of the sites. counts: int64
    `[sites, 2 + E]`, E the most experts of a site: decisions, soft decisions, and the decisions
    that chose each expert. entropy: float64 `[sites]`, summed over decisions.
    """

    tokens: int = 0
    names: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.int64))
    entropy: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))

    @classmethod
    def of(cls, tokens: int, sites: Mapping[str, SiteCounters]) -> "SlotCounters":
        """From sites one by one."""
        experts = tuple(len(site.expert_tokens) for site in sites.values())
        most = max(experts, default=0)
        rows = [[site.decisions, site.soft, *site.expert_tokens] for site in sites.values()]
        padded = [row + [0] * (2 + most - len(row)) for row in rows]
        counts = torch.tensor(padded, dtype=torch.int64).view(len(sites), 2 + most)
        entropy = torch.tensor([site.entropy for site in sites.values()], dtype=torch.float64)
        return cls(tokens, tuple(sites), experts, counts, entropy)

    @property
    def sites(self) -> dict[str, SiteCounters]:
        """One by one."""
        sites = zip(self.names, self.experts, self.entropy.tolist(), strict=True)
        return {
            name: SiteCounters(decisions, soft, entropy, chosen[:experts])
            for (name, experts, entropy), (decisions, soft, *chosen) in zip(
                sites, self.counts.tolist(), strict=True
            )
        }

    @property
    def decisions(self) -> Tensor:
        """int64 `[sites]`."""
        return self.counts[:, 0]

    @property
    def soft(self) -> Tensor:
        """int64 `[sites]`."""
        return self.counts[:, 1]

    @property
    def chosen(self) -> Tensor:
        """int64 `[sites, E]`: decisions that chose each expert."""
        return self.counts[:, 2:]


def joined(first: SlotCounters, second: SlotCounters) -> SlotCounters:
    """One adapter's counters from two stays in a backend, which may list its sites in any order."""
    tokens = first.tokens + second.tokens
    if not first.names:
        return replace(second, tokens=tokens)
    if not second.names:
        return replace(first, tokens=tokens)
    rows = {name: row for row, name in enumerate(second.names)}
    order = torch.tensor([rows[name] for name in first.names])
    counts, entropy = first.counts + second.counts[order], first.entropy + second.entropy[order]
    return replace(first, tokens=tokens, counts=counts, entropy=entropy)
