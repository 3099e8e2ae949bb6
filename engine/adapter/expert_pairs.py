"""The low-rank pairs that an adapter has on the experts of a mixture-of-experts base model."""

from collections.abc import Mapping

import torch

from molehill.engine.adapter.expert_sites import split
from molehill.kernels.mixture import Experts, LinearMixture, Mixture


def group(sites: Mapping[str, Mixture]) -> dict[str, dict[str, dict[int, Experts]]]:
    """What is on experts by block, projection and expert: one pair each, the constant gate weights
    of its parts folded into b."""
    blocks: dict[str, dict[str, dict[int, Experts]]] = {}
    for name, mixture in sites.items():
        site = split(name)
        if site is None or not isinstance(mixture, LinearMixture):
            continue
        constant, experts = mixture.policy.constant_weights, mixture.experts
        assert constant is not None, name
        weights = torch.tensor(constant)[experts.expert_of_row]
        pair = Experts(experts.a, experts.b * weights, (sum(experts.ranks),))
        blocks.setdefault(site.block, {}).setdefault(site.projection, {})[site.expert] = pair
    return blocks


def stack(pairs: Mapping[int, Experts], experts: int) -> Experts:
    """One stack in which `ranks[e]` is the rank on base expert e, 0 where it has no pair."""
    in_order = [pairs[e] for e in sorted(pairs)]
    ranks = tuple(sum(pairs[e].ranks) if e in pairs else 0 for e in range(experts))
    return Experts(
        torch.cat([p.a for p in in_order]), torch.cat([p.b for p in in_order], dim=1), ranks
    )
