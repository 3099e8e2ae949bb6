"""The low-rank pairs that an adapter has on the experts of a mixture-of-experts base model."""

from collections.abc import Mapping

import torch

from molehill.engine.adapter.expert_sites import split
from molehill.kernels.mixture import Experts, LinearMixture, Mixture
from molehill.kernels.policy import Constant


def group(sites: Mapping[str, Mixture]) -> dict[str, dict[str, dict[int, Experts]]]:
    """What is on experts by block, projection and expert: one pair each, the constant gate weights
    of its parts folded into b."""
    found: dict[str, dict[str, dict[int, Experts]]] = {}
    for name, mixture in sites.items():
        site = split(name)
        if site is None or not isinstance(mixture, LinearMixture):
            continue
        assert isinstance(mixture.policy, Constant), name
        experts = mixture.experts
        weights = torch.tensor(mixture.policy.weights)[experts.expert_of_row]
        pair = Experts(experts.a, experts.b * weights, (sum(experts.ranks),))
        found.setdefault(site.block, {}).setdefault(site.projection, {})[site.expert] = pair
    return found


def stack(pairs: Mapping[int, Experts], experts: int) -> Experts:
    """One stack in which `ranks[e]` is the rank on base expert e, 0 where it has no pair."""
    own = [pairs[e] for e in sorted(pairs)]
    ranks = tuple(sum(pairs[e].ranks) if e in pairs else 0 for e in range(experts))
    return Experts(torch.cat([p.a for p in own]), torch.cat([p.b for p in own], dim=1), ranks)
